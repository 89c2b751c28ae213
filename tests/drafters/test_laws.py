"""Losslessness under sampling: the joint law of four consecutive tokens, for every drafter, and mutants that must fail.

The targets are context-dependent and random, so that an error that a single token hides shows in the joint law.
"""

import dataclasses
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import noisy_heads, tiered, tiny_model
from fast_keys import fast_key

import specjax as sj
import specjax.target.model
from specjax import acceptance as rules
from specjax import decode, loop
from specjax.loading.tokenizer import Tokenizer
from specjax.target.model import forward, unembed

LENGTH, BATCH = 4, 4_000
RUNS, RUNS_FAST = 200_000, 40_000  # the tests' level is the same; with fewer samples only smaller errors are missed
SLOTS = 12  # the prompt, LENGTH tokens and a path; also the prefill chunk here, which a draft model reads for every run
SHAPES = {"chain": sj.Tree.chain(3), "branching": sj.Tree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0)])}
SETTINGS = {"T=1": sj.Sample(), "T=0.7, top-p": sj.Sample(0.7, top_p=0.9)}


@pytest.fixture(scope="module")
def runs(fast):
    """How many generations are drawn."""
    return RUNS_FAST if fast else RUNS


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Prefill in chunks of the whole buffer, not of 64 tokens."""
    monkeypatch.setattr(specjax.target.model, "PREFILL_CHUNK", SLOTS)


@functools.cache
def mock(vocab, seed=2):
    """A target, or with another seed a draft model, over a tiny vocabulary."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    return tiny_model(seed, 0.25, vocab=vocab, num_layers=1, **shape)


def worded(model, words):
    """The model with a tokenizer: rows past its `words` are padding."""
    vocab = {f"word{n}": n for n in range(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="word0"))
    return dataclasses.replace(model, tokenizer=Tokenizer(backend))


def target(vocab):
    """The target, whose tokenizer lacks its last token."""
    return worded(mock(vocab), vocab - 1)


def prompt(vocab):
    """With repetitions, for the n-gram drafter to find."""
    return np.array([1, 0, vocab - 1, 1])


def drafter_for(name, vocab, tree, acceptance):
    """A drafter that is wrong often enough to be rejected and right often enough to be accepted."""
    ngram = sj.NgramDrafter(tree, reach=(1,))  # rounds of the root alone, of its children, and of the whole tree
    medusa = sj.MedusaDrafter(noisy_heads(mock(vocab), 3), tree)
    draft = sj.DraftModelDrafter(mock(vocab, 5), tree, acceptance.temperature, top_p=acceptance.top_p)
    known = [token for token in reversed(range(vocab)) if token not in (1, 3)]
    token_map = jnp.array([known[0], -1, *known[1:]])  # what it does not know it reads as its second row
    reduced = dataclasses.replace(draft, draft=mock(len(token_map), 6), token_map=token_map)
    padded, narrow = (dataclasses.replace(draft, draft=worded(mock(n, 5), vocab - 1)) for n in (vocab + 2, vocab - 1))
    return {
        "medusa": medusa,
        "ngram": ngram,
        "draft model": draft,
        "reduced draft model": reduced,
        "padded draft model": padded,
        "narrow draft model": narrow,
        "greedy draft model": sj.DraftModelDrafter(mock(vocab, 5), tree),
        "ngram + medusa": sj.HybridDrafter((ngram, medusa)),
        "ngram + draft model": sj.HybridDrafter((ngram, draft)),
    }[name]


DRAFTERS = ["medusa", "ngram", "draft model", "greedy draft model", "ngram + medusa", "ngram + draft model"]
VOCABULARIES = ["reduced draft model", "padded draft model", "narrow draft model"]  # other than the target's


@functools.cache
def exact_law(vocab, acceptance):
    """The probability of every continuation of LENGTH tokens, by enumeration."""
    model, law = mock(vocab), np.ones([vocab] * LENGTH)

    @jax.jit
    @jax.vmap
    def next_law(tokens):
        logits = unembed(model.params, forward(model.params, model.config, tokens).features[-1:])[0]
        return jax.nn.softmax(logits / acceptance.temperature)

    for n in range(LENGTH):
        prefixes = np.array(list(itertools.product(range(vocab), repeat=n)), int).reshape(vocab**n, n)
        p = np.asarray(next_law(np.hstack([np.tile(prompt(vocab), (vocab**n, 1)), prefixes])), np.float64)
        order = np.argsort(-p, axis=1, kind="stable")
        ordered = np.take_along_axis(p, order, 1)
        ordered[:, acceptance.top_k or vocab :] = 0
        ordered /= ordered.sum(1, keepdims=True)
        kept = np.where(np.cumsum(ordered, 1) - ordered < acceptance.top_p, ordered, 0)
        np.put_along_axis(p, order, kept, 1)
        p /= p.sum(1, keepdims=True)
        law *= p.reshape([vocab] * (n + 1) + [1] * (LENGTH - n - 1))
    return law


@functools.cache
def prompt_read(vocab):
    """What a generation begins with: the prompt in its buffer, its length, and what the target made of it."""
    text = prompt(vocab)
    tokens, n = jnp.zeros(SLOTS, jnp.int32).at[: len(text)].set(text), jnp.int32(len(text))
    return tokens, n, *decode.read_prompt(mock(vocab).params, mock(vocab).config, tokens, n)


def empirical_law(vocab, acceptance, drafter, runs):
    """Counts over `runs` independent generations, and the mean number of drafts accepted in a round."""
    model = mock(vocab)

    # Everything but the config is an argument: the compiler would spend seconds on folding constants. It runs often
    # enough for some optimisation to pay (tests/conftest.py turns it off).
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def batch(params, drafter, key, tokens, n, features, cache):
        plan = loop.Plan(params, drafter, (), model.config, acceptance)

        def begin(key):
            return loop.first_token(plan, tokens, n, n + LENGTH, key, features, cache)

        states = jax.vmap(begin)(jax.random.split(key, BATCH))
        states = loop.batch_rounds(plan, states)
        said = jax.lax.dynamic_slice_in_dim(states.tokens, n, LENGTH, axis=1)
        return said, (LENGTH - 1 - states.rounds).mean()

    counts, accepted = np.zeros([vocab] * LENGTH), []
    for i in range(runs // BATCH):
        out, drafts = batch(model.params, drafter.prepare(model.params), fast_key(i), *prompt_read(vocab))
        np.add.at(counts, tuple(np.asarray(out).T), 1)
        accepted.append(float(drafts))
    return counts, np.mean(accepted)


def total_variation(law, counts):
    """Half the L1 distance."""
    return 0.5 * np.abs(law - counts / counts.sum()).sum()


def assert_same_law(law, counts):
    """Chi-square at 1e-3, no impossible outcome, and total variation where the outcomes are few."""
    assert law.sum() == pytest.approx(1)
    assert counts[law == 0].sum() == 0
    expected = law * counts.sum()
    likely = expected > 5
    cells = np.append((counts - expected)[likely], (counts - expected)[~likely].sum())
    means = np.append(expected[likely], max(expected[~likely].sum(), 1e-9))
    cells, means = cells[means > 5], means[means > 5]
    freedom = len(cells) - 1
    assert freedom > 10  # a law worth testing
    statistic = (cells**2 / means).sum()
    # Wilson-Hilferty: a chi-square beyond 3.09 of these deviations has probability below 1e-3.
    assert ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)) < 3.09
    if law.size <= 81:
        assert total_variation(law, counts) <= 0.02


def essential(name, shape, setting, vocab):
    """In the fast tier, every drafter on a chain at T = 1, and on a branching tree with top-p."""
    return vocab == 6 and (shape == "chain") == (setting == "T=1")


@pytest.mark.parametrize(("name", "shape", "setting", "vocab"), tiered(essential, DRAFTERS, SHAPES, SETTINGS, [3, 6]))
def test_sampling_keeps_the_joint_law(name, shape, setting, vocab, runs):
    acceptance = SETTINGS[setting]
    drafter = drafter_for(name, vocab, SHAPES[shape], acceptance)
    drafter.check(target(vocab))
    counts, accepted = empirical_law(vocab, acceptance, drafter, runs)
    assert_same_law(exact_law(vocab, acceptance), counts)
    assert accepted > 0.05  # drafts do get accepted


@pytest.mark.parametrize(("name", "setting"), tiered(lambda name, setting: setting != "T=1", VOCABULARIES, SETTINGS))
def test_drafts_of_another_vocabulary_keep_the_joint_law(name, setting, runs):
    test_sampling_keeps_the_joint_law(name, "branching", setting, 6, runs)


@pytest.mark.parametrize(
    "acceptance", tiered(lambda rule: rule.top_p < 1, [sj.Sample(top_k=4), sj.Sample(0.8, top_k=4, top_p=0.8)])
)
def test_top_k_keeps_the_joint_law(acceptance, runs):
    """Alone and with top-p, target and draft warped alike."""
    drafter = drafter_for("draft model", 6, SHAPES["chain"], acceptance)
    drafter = dataclasses.replace(drafter, top_k=acceptance.top_k)
    counts, accepted = empirical_law(6, acceptance, drafter, runs)
    law = exact_law(6, acceptance)
    assert (law == 0).any()
    assert_same_law(law, counts)
    assert accepted > 0.05


# --- mutants ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KeepsRejected(sj.Sample):
    """After a rejection the rejected draft stays: the Rust system's error."""

    def __call__(self, logits, proposal, tree, key):
        """Right, but for the token it commits."""
        right = super().__call__(logits, proposal, tree, key)
        child = jnp.asarray([min(c, default=n) for n, c in enumerate(tree.children)])[right.node]
        kept = jnp.where(child == right.node, right.next_token, proposal.tokens[child])
        return dataclasses.replace(right, next_token=kept)


def rewritten(old, new):
    """`_walk_siblings` with one expression changed."""
    source = inspect.getsource(rules._walk_siblings)
    assert source.count(old) == 1
    scope = dict(vars(rules))
    exec(source.replace(old, new), scope)
    return scope["_walk_siblings"]


MUTANTS = {
    "sibling not renormalised": ("residual / jnp.where(mass > 0, mass, 1.0)", "residual"),
    "ratio inverted": ("uniform[child] * q_x < p_x", "uniform[child] * p_x < q_x"),
    "residual forgotten": ("jnp.maximum(p - q[child], 0.0)", "p"),
}


@pytest.mark.parametrize("name", ["medusa", "draft model"])
def test_keeping_the_rejected_draft_fails(name, runs):
    counts, _ = empirical_law(3, KeepsRejected(), drafter_for(name, 3, SHAPES["chain"], sj.Sample()), runs)
    with pytest.raises(AssertionError):
        assert_same_law(exact_law(3, sj.Sample()), counts)
    assert total_variation(exact_law(3, sj.Sample()), counts) > 0.05


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_sibling_walk_fails(mutant, runs, monkeypatch):
    monkeypatch.setattr(rules, "_walk_siblings", rewritten(*MUTANTS[mutant]))
    # With three tokens and two siblings little is left to renormalise: six tokens tell.
    counts, _ = empirical_law(6, sj.Sample(), drafter_for("draft model", 6, SHAPES["branching"], sj.Sample()), runs)
    with pytest.raises(AssertionError):
        assert_same_law(exact_law(6, sj.Sample()), counts)


# --- what must never be said ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
def test_impossible_tokens_never_appear(stochastic):
    tree, vocab = SHAPES["branching"], 6
    # Flat, so that every possible token keeps some probability after the rejections.
    logits = 0.2 * jax.random.normal(fast_key(0), (tree.size, vocab)).at[:, [1, 4]].set(-jnp.inf)
    tokens = jnp.array([0, 1, 2, 4, 3, 1])  # impossible ones among them
    log_q = jnp.log(jnp.full((tree.size, vocab), 1 / vocab)) if stochastic else None

    @jax.jit
    @jax.vmap
    def run(key):
        verdict = sj.Sample()(logits, rules.Proposal(tokens, log_q), tree, key)
        return verdict.node, verdict.next_token

    nodes, said = map(np.asarray, run(jax.random.split(fast_key(1), 20_000)))
    assert not np.isin(tokens[nodes[nodes > 0]], [1, 4]).any()
    assert not np.isin(said, [1, 4]).any()
    assert len(set(said.tolist())) == 4
    assert (nodes > 0).any()


@pytest.mark.parametrize(
    "acceptance", [sj.Sample(top_k=1), pytest.param(sj.Sample(top_p=1e-6), marks=pytest.mark.full)]
)
@pytest.mark.parametrize("name", [*DRAFTERS, *VOCABULARIES])
def test_narrow_sampling_is_greedy(name, acceptance):
    drafter = drafter_for(name, 6, SHAPES["branching"], sj.Sample())
    greedy = sj.generate(mock(6), prompt(6), max_new_tokens=40)
    out = sj.generate(target(6), prompt(6), drafter=drafter, acceptance=acceptance, max_new_tokens=40, key=fast_key(3))
    np.testing.assert_array_equal(out.tokens, greedy.tokens)
