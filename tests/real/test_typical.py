"""Typical acceptance simulated beside the decoder, on the small trained Qwen2 and its heads."""

import numpy as np
import pytest

import specjax as sj
from specjax.corpus.prompts import load_prompts
from specjax.ranks.measuring import Text, measure
from specjax.ranks.simulation import simulate
from specjax.ranks.typical import typical_reach

TREE = sj.Tree.cartesian((3, 2, 2))
RULES = [
    sj.Typical(0.7),
    sj.Typical(0.7, 0.9, 0.6),  # this one and the next are decided by the entropy
    sj.Typical(0.7, 0.02, 0.6, rule="abyo"),
]


@pytest.fixture(scope="module")
def case(smollm2):
    """The model, its heads, its greedy answers, and the table of these."""
    small, token_map = sj.load_draft("smollm2-draft")
    heads = sj.load_heads("smollm2-draft", small.config)
    row = {token: i for i, token in enumerate(token_map.tolist())}
    chats = [smollm2.tokenizer.apply_chat_template([{"role": "user", "content": p.turns[0]}]) for p in load_prompts()]
    prompts = [[row.get(token, len(row) - 1) for token in chat] for chat in chats[:12]]
    made = sj.generate_batch(small, prompts, max_new_tokens=48, eos_token_ids=(), capacity=384)
    texts = [Text(ids, out.tokens) for ids, out in zip(prompts, made, strict=True)]
    return small, heads, texts, measure(small, heads, texts, typical_temperature=0.7, candidates=8)


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rounds_that_stay_on_the_text_are_the_decoders(case, rule):
    """The first round after every prefix: each head's draft is judged by the law of its own row."""
    model, heads, texts, table = case
    depth, on_text = typical_reach(table, TREE, rule)
    prefixes, expected = [], []
    for text, start in zip(texts, table.starts, strict=True):
        for j in range(len(text.answer) - TREE.max_depth - 1):  # past the end nothing was recorded
            if on_text[start + j]:
                prefixes.append(np.concatenate([text.prompt, text.answer[:j]]))
                expected.append(int(depth[start + j]))
    picked = [i for i, d in enumerate(expected) if d > 1][:48] + [i for i, d in enumerate(expected) if d < 2][:48]
    drafter = sj.MedusaDrafter(heads, TREE)
    request = {"drafter": drafter, "acceptance": rule, "max_new_tokens": 5, "eos_token_ids": (), "capacity": 384}
    out = sj.generate_batch(model, [prefixes[i] for i in picked], **request)
    assert [int(one.accepted_lengths[0]) for one in out] == [expected[i] for i in picked]
    assert sum(expected[i] > 1 for i in picked) > 20


@pytest.mark.full
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_tokens_per_round_are_near_the_decoders(case, rule):
    """Decoding leaves the text, the simulation does not: there is an error (seen: -9.9%, -7.3% and 0.0%)."""
    model, heads, texts, table = case
    (simulated,) = simulate(table, [TREE], rule)
    out = sj.generate_batch(
        model, [text.prompt for text in texts], drafter=sj.MedusaDrafter(heads, TREE), acceptance=rule,
        max_new_tokens=48, eos_token_ids=(), capacity=384,
    )  # fmt: skip
    rounds = np.concatenate([one.accepted_lengths for one in out])
    error = simulated.tokens_per_round / (rounds.mean() + 1) - 1
    print(f"{rule}: {rounds.mean() + 1:.3f} decoded, {error:+.1%}, {simulated.on_text:.0%} judged on the text")
    assert abs(error) < 0.15
