"""The decoding loop: losslessness, exact lengths, statistics, one trace, and agreement with the oracle."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads, scripted, tiered, tiny_model

import specjax as sj
from specjax import batch, decode, loop, reference
from specjax.drafters.base import Drafter, NoDrafter
from specjax.heads import draft_projection, top_tokens
from specjax.proposal import Proposal
from specjax.target import cache as kv
from specjax.target.model import forward, unembed

PROMPT = np.array([7, 3, 50, 11, 4])
PRESETS = "mc_sim_7b_63", "vicuna_7b_stage2", "zephyr_stage2"  # those of the fast tier, one of each source
TREES = [sj.Tree.preset(name) for name in sj.Tree.presets()] + [
    sj.Tree.chain(1),
    sj.Tree.chain(5),
    sj.Tree.cartesian((2, 2)),
    sj.Tree.cartesian((3, 1, 2)),
    sj.Tree.from_paths([(0,), (2,), (2, 1), (2, 1, 0)]),
]


@pytest.mark.parametrize(
    "tree", tiered(lambda tree: tree.size < 64 or tree.name in PRESETS, TREES, ids=lambda tree: tree.name or "paths")
)
def test_greedy_output_is_autoregressive(model, tree):
    base = sj.generate(model, PROMPT, max_new_tokens=40, capacity=256)
    for kind in ("oracle", "wrong", "random"):
        out = sj.generate(model, PROMPT, drafter=scripted(model, PROMPT, tree, kind), max_new_tokens=40, capacity=256)
        np.testing.assert_array_equal(out.tokens, base.tokens)
        if kind == "oracle":
            assert set(out.accepted_lengths[:-1]) == {tree.max_depth}
        if kind == "wrong":
            assert out.tokens_per_round == 1.0
            assert out.accepted_per_round == 0.0
    drafter = sj.MedusaDrafter(noisy_heads(model, 5), tree)
    np.testing.assert_array_equal(
        sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=40, capacity=256).tokens, base.tokens
    )


@pytest.mark.parametrize("changes", [{"family": "qwen2", "qkv_bias": True}, {"sliding_window": 6}, {"num_kv_heads": 4}])
def test_greedy_output_is_autoregressive_for_other_architectures(changes):
    model, tree = tiny_model(3, **changes), sj.Tree.cartesian((2, 2, 1))
    base = sj.generate(model, PROMPT, max_new_tokens=50)
    for kind in ("oracle", "random"):
        drafter = scripted(model, PROMPT, tree, kind)
        np.testing.assert_array_equal(
            sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=50).tokens, base.tokens
        )


def test_loop_equals_the_path_by_path_oracle(model):
    tree, heads = sj.Tree.cartesian((3, 2)), noisy_heads(model, 2)
    projection = draft_projection(heads, model.params.unembedding)

    def propose(context, features):
        return np.asarray(top_tokens(heads, projection, jnp.asarray(features), 3)).tolist()

    for typical in (False, True):
        acceptance = sj.Typical(temperature=1.5, epsilon=0.05) if typical else sj.Greedy()
        judge = reference.typical(temperature=1.5, epsilon=0.05) if typical else reference.greedy
        ours = sj.generate(
            model, PROMPT, drafter=sj.MedusaDrafter(heads, tree), acceptance=acceptance, max_new_tokens=24
        )
        oracle = reference.generate(
            reference.ModelDecoder(model.params, model.config), PROMPT.tolist(), propose, tree, judge=judge,
            max_new_tokens=24,
        )  # fmt: skip
        assert ours.tokens.tolist() == list(oracle.tokens)
        assert ours.accepted_lengths.tolist() == list(oracle.accepted_lengths)


def test_token_zero_is_a_token_like_any_other():
    # The target says 0 for ever; short paths must not be extended by a padding token that happens to be right.
    model = tiny_model()
    embed = model.params.embed.at[0].set(0.0)
    lm_head = jnp.zeros_like(embed)
    model = dataclasses.replace(model, params=dataclasses.replace(model.params, embed=embed, lm_head=lm_head))
    tree = sj.Tree.from_paths([(0,), (1,), (0, 0), (0, 0, 0)])
    base = sj.generate(model, PROMPT, max_new_tokens=20)
    assert set(base.tokens.tolist()) == {0}
    oracle = sj.generate(model, PROMPT, drafter=scripted(model, PROMPT, tree, "oracle"), max_new_tokens=20)
    np.testing.assert_array_equal(oracle.tokens, base.tokens)
    assert set(oracle.accepted_lengths[:-1]) == {3}
    wrong = sj.generate(model, PROMPT, drafter=scripted(model, PROMPT, tree, "wrong"), max_new_tokens=20)
    np.testing.assert_array_equal(wrong.tokens, base.tokens)
    assert wrong.tokens_per_round == 1.0


@pytest.mark.parametrize("kind", ["oracle", "random", "wrong"])
def test_cache_after_every_commit_equals_a_fresh_prefill(model, kind):
    tree = sj.Tree.cartesian((2, 2, 1))
    drafter = scripted(model, PROMPT, tree, kind)
    step = jax.jit(loop.decode_round)
    state = decode.prefill(model, PROMPT, drafter=drafter, max_new_tokens=30)
    prefill = jax.jit(lambda tokens: forward(model.params, model.config, tokens).rows)
    while True:
        length = int(state.cache.length)
        assert length == int(state.length) - 1
        fresh = prefill(state.tokens)  # what stands past the length cannot be seen from before it
        for mine, theirs in zip(state.cache.k, fresh.k, strict=True):
            np.testing.assert_allclose(mine[:, :, :length], theirs[:, :, :length], atol=1e-5)
        for mine, theirs in zip(state.cache.v, fresh.v, strict=True):
            np.testing.assert_allclose(mine[:, :length], theirs[:, :length], atol=1e-5)
        if state.finished:
            break
        state = step(loop.Plan(model.params, drafter, (), model.config, sj.Greedy()), state)
    assert int(state.length) == len(PROMPT) + 30


def test_commit_is_the_same_in_a_compiled_loop_and_eager(model):
    # In a loop the compiler may update the cache in place, from rows that it gathers (openxla/xla 49176).
    cache = dataclasses.replace(kv.zeros(model.config, 32), length=jnp.int32(9))
    rows = forward(model.params, model.config, jnp.arange(7)).rows
    paths = jnp.array([[0, 2, 5, 5], [0, 1, 1, 1], [0, 3, 6, 6], [0, 2, 4, 4]])

    def commit(i, cache):
        return kv.write(cache, kv.gather(rows, paths[i]), 1 + i, after=paths[i, 0])

    looped = jax.jit(lambda cache: jax.lax.fori_loop(0, 4, commit, cache))(cache)
    eager = cache
    for i in range(4):
        eager = commit(i, eager)
    assert int(eager.length) == 9 + 1 + 2 + 3 + 4
    chex.assert_trees_all_equal(looped, eager)


def test_eos_ends_the_output_at_any_depth_of_a_path(model):
    told = sj.generate(model, PROMPT, max_new_tokens=24).tokens.tolist()
    for tree in (sj.Tree.chain(4), sj.Tree.cartesian((2, 1, 1))):
        drafter = scripted(model, PROMPT, tree, "oracle")
        for eos in dict.fromkeys(told):
            out = sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=24, eos_token_ids=(eos,))
            assert out.tokens.tolist() == told[: told.index(eos) + 1]
            alone = sj.generate(model, PROMPT, max_new_tokens=24, eos_token_ids=(eos,))
            assert alone.tokens.tolist() == out.tokens.tolist()
            assert int((out.accepted_lengths + 1).sum()) == len(out.tokens) - 1


def test_exactly_max_new_tokens(model):
    told = sj.generate(model, PROMPT, max_new_tokens=24).tokens
    drafter = scripted(model, PROMPT, sj.Tree.chain(4), "oracle")
    for budget in range(24):
        out = sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=budget, eos_token_ids=())
        np.testing.assert_array_equal(out.tokens, told[:budget])
        assert int((out.accepted_lengths + 1).sum()) == max(budget - 1, 0)
    assert np.isnan(sj.generate(model, PROMPT, max_new_tokens=1).tokens_per_round)


def test_prompts_that_just_fit_and_just_do_not():
    model = tiny_model(max_positions=70)
    drafter = scripted(model, [5], sj.Tree.chain(4), "oracle", length=60)
    for prompt in ([5], list(range(1, 61))):
        budget = 70 - len(prompt)
        base = sj.generate(model, prompt, max_new_tokens=budget)
        assert len(base.tokens) == budget
        drafter = scripted(model, prompt, sj.Tree.chain(4), "random", length=budget)
        out = sj.generate(model, prompt, drafter=drafter, max_new_tokens=budget)
        np.testing.assert_array_equal(out.tokens, base.tokens)
        with pytest.raises(sj.PromptError, match="70"):
            sj.generate(model, prompt, max_new_tokens=budget + 1)


def test_capacity_is_checked_before_tracing(model):
    drafter = scripted(model, PROMPT, sj.Tree.chain(4), "oracle")
    assert len(sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=118, capacity=128).tokens) == 118
    with pytest.raises(sj.PromptError, match="capacity is 128"):
        sj.generate(model, PROMPT, drafter=drafter, max_new_tokens=119, capacity=128)
    for capacity in (100, 128.0, True):
        with pytest.raises(sj.PromptError, match=f"capacity is {capacity}"):
            sj.generate(model, PROMPT, max_new_tokens=4, capacity=capacity)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "at least one"), ([[1, 2]], "flat"), ([1.5], "integer"), ([1, 61], "61"), ([-1], "-1"), ("hello", "shape")],
)
def test_bad_prompts(model, prompt, message):
    for call in (sj.generate, sj.stream):  # at the call, not at the first round
        with pytest.raises(sj.PromptError, match=message):
            call(model, prompt, max_new_tokens=4)


def test_bad_requests(model):
    for call in (sj.generate, sj.stream, decode.prefill):
        with pytest.raises(sj.PromptError, match=r"max_new_tokens is -3; expected"):
            call(model, PROMPT, max_new_tokens=-3)
        with pytest.raises(sj.PromptError, match=r"jax\.random\.key"):
            call(model, PROMPT, acceptance=sj.Sample())
    with pytest.raises(sj.PromptError, match=r"2\.5"):
        sj.generate(model, PROMPT, max_new_tokens=2.5)
    for key in (0, jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(sj.PromptError, match="PRNG key"):
            sj.generate(model, PROMPT, acceptance=sj.Sample(), key=key)
    for eos in (2, "</s>", (1.5,), (61,)):
        with pytest.raises(sj.PromptError, match="eos_token_ids"):
            sj.generate(model, PROMPT, eos_token_ids=eos)
    heads = noisy_heads(model, 2)
    with pytest.raises(sj.TreeError, match="3 deep"):
        sj.generate(model, PROMPT, drafter=sj.MedusaDrafter(heads, sj.Tree.chain(3)))
    with pytest.raises(sj.TreeError, match="62"):
        sj.generate(model, PROMPT, drafter=sj.MedusaDrafter(heads, sj.Tree.cartesian((62,))))
    with pytest.raises(sj.ConfigError, match="hidden size"):
        sj.generate(tiny_model(hidden_size=32), PROMPT, drafter=sj.MedusaDrafter(heads, sj.Tree.chain(1)))


class HalfWritten(Drafter):
    """Everything else is the protocol's own, empty."""

    def check(self, target):
        """Fits every target."""


class Unhashable(sj.Greedy):
    """As a dataclass that is not frozen."""

    __hash__ = None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drafter": "ngram"}, "'ngram' is no Drafter: it lacks check, init, "),
        ({"drafter": sj.NgramDrafter}, "NgramDrafter is a class; pass an instance"),
        ({"drafter": HalfWritten()}, "lacks init, max_positions, prepare, propose, subtrees, tree, update"),
        ({"drafter": sj.HybridDrafter((sj.NgramDrafter(sj.Tree.chain(1)), "medusa"))}, "'medusa' is no Drafter"),
        ({"acceptance": "greedy"}, "'greedy' is no Acceptance: it lacks __call__, lossless, needs_key"),
        ({"acceptance": sj.Sample}, "Sample is a class"),
        ({"acceptance": lambda *_: None}, "lacks lossless, needs_key"),
    ],
)
def test_what_is_no_drafter_or_no_rule_is_refused(model, wrong, message):
    state = decode.prefill(model, PROMPT, max_new_tokens=4)
    for call in (sj.generate, sj.stream, decode.prefill, lambda model, _, **kw: decode.decode(model, state, **kw)):
        if "Hybrid" in str(wrong) and call not in (sj.generate, sj.stream, decode.prefill):
            continue  # a prefill has checked its parts
        with pytest.raises(sj.ConfigError, match=message):
            call(model, PROMPT, **wrong)


def test_a_rule_that_cannot_be_hashed_is_refused(model):
    rule = Unhashable()
    with pytest.raises(sj.ConfigError, match="frozen"):
        sj.generate(model, PROMPT, acceptance=rule)


@pytest.mark.parametrize("acceptance", [sj.Greedy(), sj.Sample(0.9), sj.Typical(epsilon=1e-6, delta=1e-6)], ids=str)
def test_ids_outside_the_vocabulary_are_no_drafts(model, acceptance):
    drafter = scripted(model, PROMPT, sj.Tree.chain(2), "oracle")
    beyond = dataclasses.replace(drafter, shift=drafter.shift + 70, vocab=jnp.int32(1000))  # the vocabulary has 61
    request = {"acceptance": acceptance, "max_new_tokens": 12, "key": jax.random.key(3)}
    out = sj.generate(model, PROMPT, drafter=beyond, **request)
    assert out.accepted_per_round == 0
    assert (out.tokens < 61).all()
    if isinstance(acceptance, sj.Greedy):
        np.testing.assert_array_equal(out.tokens, sj.generate(model, PROMPT, max_new_tokens=12).tokens)


def test_a_proposal_for_another_tree_is_refused(model):
    drafter = scripted(model, PROMPT, sj.Tree.chain(2), "oracle")

    class Longer(type(drafter)):
        """Proposes one node too many."""

        def propose(self, *arguments):
            """One more than the tree has."""
            return Proposal(jnp.append(super().propose(*arguments).tokens, 0))

    fields = ("future", "shift", "vocab")
    jax.tree_util.register_dataclass(Longer, data_fields=fields, meta_fields=("tree",))
    longer = Longer(drafter.future, drafter.shift, drafter.vocab, drafter.tree)
    with pytest.raises(sj.ConfigError, match=r"tokens of shape \(4,\); its tree of 3 nodes"):
        sj.generate(model, PROMPT, drafter=longer, max_new_tokens=4)


@pytest.mark.parametrize("acceptance", [sj.Greedy(), sj.Sample(0.9), sj.Typical(bonus="sample")])
def test_stream_gives_what_generate_gives(model, acceptance):
    drafter = scripted(model, PROMPT, sj.Tree.cartesian((2, 2, 1)), "random")
    told = sj.generate(model, PROMPT, max_new_tokens=24).tokens
    for eos in ((), (int(told[9]),)):
        request = {
            "drafter": drafter, "acceptance": acceptance, "max_new_tokens": 33, "key": jax.random.key(4),
            "eos_token_ids": eos,
        }  # fmt: skip
        out, rounds = sj.generate(model, PROMPT, **request), list(sj.stream(model, PROMPT, **request))
        np.testing.assert_array_equal(np.concatenate([r.tokens for r in rounds]), out.tokens)
        assert [len(r.tokens) - 1 for r in rounds[1:]] == out.accepted_lengths.tolist()
        assert len(rounds[0].tokens) == 1
        assert rounds[0].accepted == 0
        assert all(r.accepted in (len(r.tokens) - 1, len(r.tokens)) for r in rounds[1:-1])
    assert list(sj.stream(model, PROMPT, max_new_tokens=0)) == []


def test_one_trace_whatever_the_prompt_and_the_budget(model):
    traced = jax.jit(chex.assert_max_traces(loop.run_rounds, n=1))
    begun = jax.jit(chex.assert_max_traces(loop.start, n=1))
    rng = np.random.default_rng(0)
    for n, budget in ((1, 9), (17, 40), (64, 3), (65, 20), (100, 25)):
        prompt = rng.integers(0, 61, n)
        # An equal tree made anew must not retrace either.
        drafter = sj.MedusaDrafter(noisy_heads(model, 3), sj.Tree.cartesian((2, 2, 1)))
        plan = loop.Plan(model.params, drafter, (), model.config, sj.Greedy())
        tokens = jnp.zeros(192, jnp.int32).at[:n].set(prompt)
        state = begun(plan, tokens, jnp.int32(n), jnp.int32(n + budget), jax.random.key(0))
        out = decode.summarise(traced(plan, state))
        np.testing.assert_array_equal(out.tokens, sj.generate(model, prompt, max_new_tokens=budget).tokens)


@pytest.mark.parametrize("name", tiered(lambda name: name == "hybrid", ["medusa", "draft", "ngram", "hybrid"]))
def test_public_entry_points_compile_once(name):
    model, draft, chain = tiny_model(num_layers=1, eos_token_ids=(8,)), tiny_model(9, num_layers=1), sj.Tree.chain(2)
    sample = sj.Sample() if name == "draft" else sj.Greedy()

    def run(n, seed, eos):
        drafter = {  # everything anew
            "medusa": lambda: sj.MedusaDrafter(noisy_heads(model, 2), sj.Tree.chain(2)),
            "draft": lambda: sj.DraftModelDrafter(draft, sj.Tree.chain(2), 1.0),
            "ngram": lambda: sj.NgramDrafter(sj.Tree.chain(2)),
            "hybrid": lambda: sj.HybridDrafter((sj.NgramDrafter(chain), sj.DraftModelDrafter(draft, chain))),
        }[name]()
        prompt, key = np.arange(n) % 61, jax.random.key(seed)
        request = {
            "drafter": drafter, "acceptance": sample, "capacity": 192, "max_new_tokens": n, "eos_token_ids": eos,
        }  # fmt: skip
        sj.generate(model, prompt, key=key, **request)
        list(sj.stream(model, prompt, key=key, **request))
        sj.generate_batch(model, [prompt, prompt[:1]], keys=jax.random.split(key, 2), **request)
        programs = (
            decode.read_prompt, decode._first_token, decode._run_rounds, decode._decode_round, batch._read_prompts,
            batch._batch,
        )  # fmt: skip
        return tuple(program._cache_size() for program in programs)

    first = run(3, 0, None)
    assert run(1, 1, (7,)) == run(70, 2, ()) == first


@pytest.mark.full
def test_sampling_at_a_tiny_temperature_is_greedy(model):
    tree = sj.Tree.cartesian((2, 1))
    base = sj.generate(model, PROMPT, max_new_tokens=30)
    medusa, draft = sj.MedusaDrafter(noisy_heads(model, 2), tree), sj.DraftModelDrafter(tiny_model(9), tree, 1e-5)
    ngram = sj.NgramDrafter(tree)
    hybrids = sj.HybridDrafter((ngram, medusa)), sj.HybridDrafter((ngram, draft))
    for drafter in (None, medusa, draft, ngram, *hybrids):
        request = {"drafter": drafter, "acceptance": sj.Sample(1e-5), "key": jax.random.key(1)}
        np.testing.assert_array_equal(sj.generate(model, PROMPT, max_new_tokens=30, **request).tokens, base.tokens)


def test_vmapped_rounds_give_each_prompt_what_it_gets_alone(model):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 61, n) for n in (1, 6, 30, 64)]
    tree, heads = sj.Tree.cartesian((2, 2)), noisy_heads(model, 2)
    drafter = sj.MedusaDrafter(heads, tree)
    tokens = np.zeros((4, 128), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.array([len(p) for p in prompts])

    def run(tokens, length, key):
        plan = loop.Plan(model.params, drafter, (), model.config, sj.Greedy())
        return loop.run_rounds(plan, loop.start(plan, tokens, length, length + 20, key))

    states = jax.jit(jax.vmap(run))(jnp.asarray(tokens), lengths, jax.random.split(jax.random.key(0), 4))
    for i, prompt in enumerate(prompts):
        alone = sj.generate(model, prompt, drafter=drafter, max_new_tokens=20, eos_token_ids=())
        batch = decode.summarise(jax.tree.map(lambda x, i=i: x[i], states))
        np.testing.assert_array_equal(batch.tokens, alone.tokens)
        np.testing.assert_array_equal(batch.accepted_lengths, alone.accepted_lengths)


def test_a_round_on_a_finished_state_commits_nothing(model):
    state = decode.decode(model, decode.prefill(model, PROMPT, max_new_tokens=6))
    again = loop.decode_round(loop.Plan(model.params, NoDrafter(), (), model.config, sj.Greedy()), state)
    for name in ("length", "rounds", "finished"):
        assert getattr(again, name) == getattr(state, name)
    np.testing.assert_array_equal(decode.summarise(again).tokens, decode.summarise(state).tokens)


def test_bfloat16_decodes_the_same_sequence_in_a_tree_and_alone():
    # bf16 single rows take another product (see model.dot), so that near-ties may flip; elsewhere the loop must hold.
    model = tiny_model()
    half = dataclasses.replace(model, params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), model.params))
    base = sj.generate(half, PROMPT, max_new_tokens=30).tokens
    for kind in ("oracle", "random"):
        drafter = scripted(half, PROMPT, sj.Tree.cartesian((2, 1)), kind)
        out = sj.generate(half, PROMPT, drafter=drafter, max_new_tokens=30).tokens
        if not np.array_equal(out, base):
            at = int(np.argmax(out != base))
            text = jnp.asarray(np.concatenate([PROMPT, base[:at]]))
            logits = np.sort(unembed(half.params, forward(half.params, half.config, text).features[-1:])[0])
            assert at >= 10
            assert logits[-1] - logits[-2] < 0.05  # of logits that spread over several units
    row = jnp.asarray([PROMPT[0]])
    one = forward(half.params, half.config, row).features
    two = forward(half.params, half.config, jnp.repeat(row, 2), mask=np.eye(2, dtype=bool), positions=jnp.zeros(2, int))
    np.testing.assert_allclose(one[0], two.features[0], atol=2e-2)


def poisoned(model, change):
    """The model with a number in one of its weights that is none."""
    return dataclasses.replace(model, params=change(model.params))


def in_layer(number, value):
    def change(params):
        layer = params.layers[number]
        layers = list(params.layers)
        layers[number] = dataclasses.replace(layer, down=layer.down.at[0, 0].set(value))
        return dataclasses.replace(params, layers=tuple(layers))

    return change


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (in_layer(1, jnp.nan), r"after layer 1 \(of 0 to 1\)"),
        (in_layer(0, jnp.inf), r"after layer 0 \(of 0 to 1\)"),
        (lambda p: dataclasses.replace(p, embed=p.embed.at[PROMPT[0]].set(jnp.nan)), "after the embedding"),
        (lambda p: dataclasses.replace(p, final_norm=p.final_norm.at[0].set(jnp.nan)), "after the final norm"),
    ],
)
def test_weights_that_are_no_numbers_end_decoding(model, change, where):
    """In place of token 0 for ever."""
    wrong = poisoned(model, change)
    for how in ({}, {"drafter": sj.NgramDrafter(sj.Tree.chain(2))}):
        with pytest.raises(sj.CheckpointError, match=f"features are not finite {where}.*check_finite"):
            sj.generate(wrong, PROMPT, max_new_tokens=9, **how)
    with pytest.raises(sj.CheckpointError, match=where):
        list(sj.stream(wrong, PROMPT, max_new_tokens=9))
    with pytest.raises(sj.CheckpointError, match=where):
        sj.generate_batch(wrong, [PROMPT, PROMPT[:2]], max_new_tokens=9)
    state = decode.prefill(wrong, PROMPT, max_new_tokens=9)
    assert bool(state.finished)
    with pytest.raises(sj.CheckpointError, match="features are not finite: its weights"):
        decode.summarise(decode.decode(wrong, state))


def test_a_number_that_is_none_in_the_midst_of_an_answer(model):
    """What was said before it is streamed."""
    base = sj.generate(model, PROMPT, max_new_tokens=12).tokens
    late = int(next(t for t in base[3:] if t not in PROMPT and t not in base[:3]))
    at = base.tolist().index(late)
    wrong = poisoned(model, lambda p: dataclasses.replace(p, embed=p.embed.at[late].set(jnp.nan)))
    wrong = dataclasses.replace(wrong, params=dataclasses.replace(wrong.params, lm_head=model.params.unembedding))
    seen = []

    def decoded():
        for item in sj.stream(wrong, PROMPT, max_new_tokens=12):
            seen.extend(item.tokens.tolist())

    with pytest.raises(sj.CheckpointError, match="after the embedding"):
        decoded()
    assert seen == base[: at + 1].tolist()
