"""Streaming detokenisation, stop strings, and what the terminal shows."""

import io
import re

import numpy as np
import pytest
import tokenizers
from conftest import noisy_heads, tiered, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import decoders

import specjax as sj
from specjax.cli.terminal import Shown, show
from specjax.loading.text_stream import TextStream
from specjax.loading.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bytewise():
    """One token per byte, so that characters are spread over tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_add_up_to_the_whole_text_however_it_is_cut(bytewise, seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab \n0é€漢🙂\ufffdß"), 40))
    ids = bytewise.encode(text)
    cuts = np.sort(rng.integers(0, len(ids) + 1, 12))
    stream = TextStream(bytewise)
    pieces = [stream.push(part) for part in np.split(np.array(ids), cuts)]
    assert "".join(pieces) + stream.finish() == text == bytewise.decode(ids)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁Hi", "▁a", "b", ".", "▁", "▁▁", "你", "\ufffd", "ab\n"]
DECODERS = {
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "unigram": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "metaspace": decoders.Metaspace(),
}


def falling_back(decoder):
    """A tokenizer with a token for every byte, as SentencePiece's are, and special tokens."""
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *PIECES])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = DECODERS[decoder]
    backend.add_special_tokens(["<end>"])
    backend.add_tokens(["<tool>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=["bytes", *DECODERS])
def any_tokenizer(request, bytewise):
    return bytewise if request.param == "bytes" else falling_back(request.param)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_add_up(any_tokenizer, data):
    """Also of bytes that are no UTF-8, and of ones that a special token, which is not printed, stands between."""
    vocab, count = any_tokenizer.backend.get_vocab(), any_tokenizer.vocab_size
    # Few ids, so that they meet: whole characters and their parts among them.
    parts = {vocab.get(f"<0x{byte:02X}>", byte) for byte in (*"你é🙂 ab".encode(), 0xFF)}
    ids = data.draw(st.lists(st.sampled_from(sorted(parts)) | st.integers(0, count - 1), max_size=24))
    whole = any_tokenizer.decode(ids)
    for stops in ((), ("b",), ("ab", "\ufffd\ufffd", " a", "Hi")):
        stream, rest, said = TextStream(any_tokenizer, stops), list(ids), ""
        while rest and not stream.stopped:
            size = data.draw(st.integers(1, 4))
            piece, rest = rest[:size], rest[size:]
            said += stream.push(piece)
        said += stream.finish()
        first = min(((whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole), default=None)
        assert stream.stopped == (first is not None)
        assert said == (whole if first is None else whole[: first[1]])


def test_a_bad_byte_after_a_good_character():
    """The whole run is replaced, so that nothing of it may be shown before it ends."""
    tokenizer = falling_back("llama")
    tokens = ["▁Hi", "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "▁a", "b", "."]
    ids = [tokenizer.backend.token_to_id(token) for token in tokens]
    stream = TextStream(tokenizer)
    assert [stream.push([i]) for i in ids] == ["Hi", "", "", "", "", "\ufffd\ufffd\ufffd\ufffd a", "b", "."]
    good = TextStream(tokenizer)
    assert [good.push([i]) for i in [*ids[:4], *ids[5:]]] == ["Hi", "", "", "", "你 a", "b", "."]


def test_a_special_token_ends_the_text_where_it_comes():
    tokenizer = falling_back("llama")
    end, *ids = (tokenizer.backend.token_to_id(token) for token in ("<end>", "▁Hi", "<0xE4>", "b", "."))
    stream = TextStream(tokenizer, ["<end>", "b."])
    assert stream.push(ids[:2]) == "Hi"
    assert stream.push([end, *ids[2:]]) == "\ufffd"
    assert stream.stopped
    assert stream.push(ids) + stream.finish() == ""
    assert TextStream(tokenizer, ["<end>", "b."]).push([*ids, end]) == "Hi\ufffd"
    assert TextStream(tokenizer).push([ids[0], end, ids[2]]) == "Hib"  # not asked for
    assert TextStream(tokenizer, ["<tool>"]).push([ids[0], tokenizer.backend.token_to_id("<tool>")]) == "Hi"
    with pytest.raises(sj.PromptError, match="holds the special token '<end>', which is never printed; use that"):
        TextStream(tokenizer, ["b<end>"])


def test_an_incomplete_character_is_held_back_and_shown_at_the_end(bytewise):
    ids = bytewise.encode("a🙂")
    stream = TextStream(bytewise)
    assert stream.push(ids[:3]) == "a"
    assert stream.push(ids[3:]) == "🙂"
    assert stream.finish() == ""
    cut = TextStream(bytewise)
    assert cut.push(ids[:3]) == "a"
    assert "a" + cut.finish() == bytewise.decode(ids[:3])


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_end_the_text_however_it_is_cut(bytewise, seed):
    rng = np.random.default_rng(seed)
    text, stops = "".join(rng.choice(list("ab\n🙂"), 60)), ("ab\n", "aab", "🙂🙂", "b\naa", "\na")
    ids = bytewise.encode(text)
    stream, shown = TextStream(bytewise, stops), ""
    for part in np.split(np.array(ids), np.sort(rng.integers(0, len(ids) + 1, 12))):
        shown += stream.push(part)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += stream.finish()
    first = min(((text.find(s) + len(s), text.find(s)) for s in stops if s in text), default=None)  # that ends first
    assert stream.stopped == (first is not None)
    assert shown == (text if first is None else text[: first[1]])
    assert TextStream(bytewise, ("abc", "b")).push(bytewise.encode("abc")) == "a"  # as token by token


def test_what_only_begins_a_stop_string_is_shown_at_the_end(bytewise):
    stream = TextStream(bytewise, ["<end>"])
    assert stream.push(bytewise.encode("1 <en")) == "1 "
    assert stream.push(bytewise.encode("t <e")) == "<ent "
    assert stream.finish() == "<e"
    with pytest.raises(sj.PromptError, match="stop string"):
        TextStream(bytewise, [""])
    for wrong in ("<end>", [3]):
        with pytest.raises(sj.PromptError, match="sequence of strings"):
            TextStream(bytewise, wrong)


@pytest.mark.parametrize("kind", tiered(lambda kind: kind == "hybrid", ["medusa", "ngram", "draft", "hybrid"]))
def test_stop_strings_end_a_stream(bytewise, kind):
    model, draft = tiny_model(vocab=256, num_layers=1), tiny_model(9, vocab=256, num_layers=1)
    vanilla = sj.DraftModelDrafter(draft, sj.Tree.chain(2))
    ngram, tree = sj.NgramDrafter(sj.Tree.chain(3)), sj.Tree.cartesian((2, 1))
    drafter = {
        "medusa": sj.MedusaDrafter(noisy_heads(model, 2), tree),
        "ngram": ngram,
        "draft": vanilla,
        "hybrid": sj.HybridDrafter((ngram, vanilla)),
    }[kind]
    request = {"drafter": drafter, "max_new_tokens": 40}
    whole = bytewise.decode(sj.generate(model, [3, 4], **request).tokens)
    stop = whole[12:15]
    text, said = sj.TextStream(bytewise, [stop]), ""
    for item in sj.stream(model, [3, 4], **request):
        said += text.push(item.tokens)
        if text.stopped:
            break
    assert text.stopped
    assert said + text.finish() == whole[: whole.index(stop)]


def printed(rounds, tokenizer, shown, **options):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", highlight=False)
    show(rounds, tokenizer, console, shown, **options)
    return file.getvalue()


def test_accepted_drafts_are_green(bytewise):
    rounds = [
        sj.Round(np.array(bytewise.encode("a")), 0),
        sj.Round(np.array(bytewise.encode("bcd")), 2),
        sj.Round(np.array(bytewise.encode("ef")), 2),  # cut by the budget: both are drafts
    ]
    shown = Shown()
    out = printed(rounds, bytewise, shown, colour=True)
    assert re.findall("\x1b\\[32m(.*?)\x1b", out) == ["bc", "ef"]
    assert re.sub("\x1b\\[[0-9;]*m", "", out) == "abcdef\n"
    assert shown.text == "abcdef"
    assert str(shown.tally) == "6 tokens, 2 rounds after the prefill: 2.50 tokens per round (1.50 of them drafts)"
    assert "\x1b[32m" not in printed(rounds, bytewise, Shown(), colour=False)


@pytest.mark.parametrize("colour", [False, True])
def test_the_text_is_printed_as_it_is(bytewise, colour):
    text = "all:\n\tcc a.c\r\n\t\tx [bold] :smile:  " + "long " * 60
    rounds = [sj.Round(np.array(bytewise.encode(part)), len(part) // 2) for part in (text[:9], text[9:])]
    out = printed(rounds, bytewise, Shown(), colour=colour)
    assert re.sub("\x1b\\[[0-9;]*m", "", out) == text + "\n"


def test_what_was_said_before_an_interruption_is_kept(bytewise):
    def rounds():
        yield sj.Round(np.array(bytewise.encode("so far")), 0)
        raise KeyboardInterrupt

    shown = Shown()
    with pytest.raises(KeyboardInterrupt):
        printed(rounds(), bytewise, shown, colour=True)
    assert shown.text == "so far"
