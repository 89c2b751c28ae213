"""Likely mistakes with the API get an error that says what to pass instead."""

import jax
import numpy as np
import pytest
from conftest import byte_tokenizer, noisy_heads, tiny_model

import specjax as sj
import specjax.loading.load
from specjax.cli.main import main
from specjax.loading.tokenizer import Tokenizer
from specjax.studies.compare import Contender, Request, compare
from specjax.studies.decode import Decoding

TREE = sj.Tree.chain(2)


@pytest.fixture(scope="module")
def heads(model):
    return noisy_heads(model, 2)


def decode(model, **request):
    return sj.generate(model, [1, 2], max_new_tokens=2, **request)


MISTAKES = {
    "a tree's text, medusa": (lambda m, h: sj.MedusaDrafter(h, "chain:2"), "tree is 'chain:2'"),
    "a tree's text, ngram": (lambda m, h: sj.NgramDrafter("chain:2"), "tree is 'chain:2'"),
    "a tree's text, draft": (lambda m, h: sj.DraftModelDrafter(m, "chain:2"), "tree is 'chain:2'"),
    "the heads' name": (lambda m, h: decode(m, drafter=sj.MedusaDrafter("smollm2-draft", TREE)), "load_heads"),
    "load_draft's pair": (
        lambda m, h: decode(m, drafter=sj.DraftModelDrafter((m, None), TREE)),
        "a tuple, not a Model",
    ),
    "a pair as model": (lambda m, h: decode((m, None)), "a tuple, not a Model"),
    "a model as config": (lambda m, h: sj.load_heads("smollm2-draft", m), "model.config"),
    "half a token": (lambda m, h: sj.NgramDrafter(TREE, max_n=2.5), "max_n 2.5"),
    "a number's text": (lambda m, h: sj.NgramDrafter(TREE, max_n="3"), "max_n '3'"),
    "one part": (lambda m, h: sj.HybridDrafter(sj.NgramDrafter(TREE)), "a NgramDrafter; give a tuple"),
    "a temperature's text": (lambda m, h: sj.Sample("hot"), "temperature is 'hot'"),
    "typical, infinite": (lambda m, h: sj.Typical(float("inf")), "temperature is inf"),
    "less than float32 holds": (lambda m, h: sj.Sample(1e-38), "use Greedy"),
    "heads in another dtype": (lambda m, h: sj.load_heads("smollm2-draft", m.config, dtype="foo"), "dtype is 'foo'"),
    "no repeats": (lambda m, h: Decoding(repeats=0), "repeats 0"),
    "one token to time": (lambda m, h: Decoding(max_new_tokens=1), "max_new_tokens is 1"),
    "repeats": (lambda m, h: compare([Contender("a", m)], [Request((1,), "x")], max_new_tokens=4, repeats=0), "is 0"),
}
UNREADABLE = {
    "no model": (lambda m: sj.load_model(None), "source is None"),
    "an empty name": (lambda m: sj.load_model(""), "source is ''"),
    "no heads": (lambda m: sj.load_heads(None, m.config), "source is None"),
    "an empty name of heads": (lambda m: sj.load_heads("", m.config), "no heads at ''"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, model, heads):
    make, message = MISTAKES[name]
    with pytest.raises(sj.ConfigError, match=message):
        make(model, heads)


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_source_is_named(name, model):
    read, message = UNREADABLE[name]
    with pytest.raises(sj.CheckpointError, match=message):
        read(model)


def test_prompts_of_other_forms(model):
    with pytest.raises(sj.PromptError, match="flat sequence"):
        sj.generate(model, [[1, 2], [3]])


CHAT = byte_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
MESSAGES = ["hello", {"role": "user", "content": "hello"}, ["hello"], [{"content": "hello"}], [{"role": "user"}],
            [{"role": "user", "content": 3}], [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
            [{"role": "user", "content": "half \ud83d"}], []]  # fmt: skip


@pytest.mark.parametrize("messages", MESSAGES, ids=repr)
def test_messages_of_other_forms(messages):
    for use in (Tokenizer.apply_chat_template, Tokenizer.encode_chat):
        with pytest.raises(sj.PromptError):
            use(CHAT, messages)


def test_messages_of_tool_calls_need_no_text():
    template = "{% for m in messages %}{{ m.role }}{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"name": "clock"}]}
    for message in (call, call | {"content": None}):
        assert byte_tokenizer(template).render_chat([MESSAGES[1], message]) == "userhelloassistantclock"


def test_a_list_of_parts_is_taken_as_a_tuple():
    ngram = sj.NgramDrafter(TREE)
    assert sj.HybridDrafter([ngram]) == sj.HybridDrafter((ngram,))


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999"])
def test_a_seed_that_would_be_cut_is_refused_before_anything_is_loaded(seed, capsys):
    assert main(["generate", "--model", "nowhere", "--prompt", "x", "--seed", seed]) == 2
    assert f"--seed is {seed}" in capsys.readouterr().err


def test_a_text_to_measure_needs_two_tokens(tmp_path, capsys):
    command = ["tree", "measure", "--model", "nowhere", "--heads", "nowhere", "--prompts", "nowhere"]
    assert main([*command, "--save", str(tmp_path / "a.npz"), "--max-new-tokens", "1"]) == 2
    assert "--max-new-tokens is 1" in capsys.readouterr().err


@pytest.mark.parametrize("load", [sj.load_model, sj.load_draft])
def test_a_wrong_dtype_is_told_before_anything_is_downloaded(load, monkeypatch):
    monkeypatch.setattr(specjax.loading.load, "_downloaded", lambda repo: pytest.fail("downloaded"))
    with pytest.raises(sj.ConfigError, match="dtype is float16"):
        load("some/repository", dtype="float16")


@pytest.mark.parametrize("text", [None, 3, "\udcff"])
def test_what_is_no_text_is_not_encoded(text):
    with pytest.raises(sj.PromptError):
        CHAT.encode(text)


@pytest.mark.parametrize("acceptance", [sj.Sample(1.2e-38), sj.Typical(1.2e-38)], ids=str)
def test_the_least_temperature_is_greedy(acceptance):
    model = tiny_model(seed=3)
    drafter = sj.NgramDrafter(sj.Tree.cartesian((2, 1)))
    greedy = sj.generate(model, [1, 2, 1], max_new_tokens=12)
    out = sj.generate(
        model, [1, 2, 1], max_new_tokens=12, drafter=drafter, acceptance=acceptance, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(out.tokens, greedy.tokens)
