"""With native products bfloat16 drafts change nothing either: greedy answers of SmolLM2, token for token.

40 prompts of up to 128 tokens; in the fast tier 10 of up to 32.
"""

import numpy as np
import pytest

import specjax as sj
from specjax.corpus.prompts import load_prompts
from specjax.drafters.registry import build_drafter
from specjax.ops import native

# drafter, tree
IN_BFLOAT16 = [("medusa", "paths:0,1,2,0.0,0.1,1.0,0.0.0"), ("draft", "chain:2"), ("ngram", "chain:4")]
IN_BFLOAT16 += [pytest.param("ngram+medusa", "chain:3+paths:0,1,2,0.0", marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def in_bfloat16(fast):
    """The model, and its answers one by one: a batch has XLA's products."""
    model = sj.load_model("smollm2-135m-instruct", dtype="bfloat16")
    asked = [prompt for prompt in load_prompts() if prompt.question_id <= 40][:: 4 if fast else 1]
    prompts = [model.tokenizer.apply_chat_template([{"role": "user", "content": p.turns[0]}]) for p in asked]
    request = {"max_new_tokens": 32 if fast else 128, "capacity": 448}
    return model, lambda drafter: [sj.generate(model, ids, drafter=drafter, **request).tokens for ids in prompts]


@pytest.fixture(scope="module")
def told_in_bfloat16(in_bfloat16):
    return in_bfloat16[1](None)


@pytest.mark.skipif(native.missing() is not None, reason="there are no native products here")
@pytest.mark.parametrize(("name", "tree"), IN_BFLOAT16, ids=lambda text: text)
def test_native_products_leave_bfloat16_as_it_is_too(in_bfloat16, told_in_bfloat16, name, tree):
    model, answers = in_bfloat16
    files = {"heads": "smollm2-135m-instruct", "draft_model": "smollm2-draft"}
    for ours, theirs in zip(answers(build_drafter(name, model, tree=tree, files=files)), told_in_bfloat16, strict=True):
        np.testing.assert_array_equal(ours, theirs)
