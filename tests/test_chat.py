"""Streaming detokenisation."""

import numpy as np
import pytest
import tokenizers

import specjax as sj
from specjax.loading.tokenizer import Tokenizer
from specjax.text import TextStream


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
    text, stops = "".join(rng.choice(list("ab\n🙂"), 60)), ("ab\n", "aab", "🙂🙂")
    ids = bytewise.encode(text)
    stream, shown = TextStream(bytewise, stops), ""
    for part in np.split(np.array(ids), np.sort(rng.integers(0, len(ids) + 1, 12))):
        shown += stream.push(part)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += stream.finish()
    first = min((text.find(s) for s in stops if s in text), default=None)
    assert stream.stopped == (first is not None)
    assert shown == text[:first]


def test_what_only_begins_a_stop_string_is_shown_at_the_end(bytewise):
    stream = TextStream(bytewise, ["<end>"])
    assert stream.push(bytewise.encode("1 <en")) == "1 "
    assert stream.push(bytewise.encode("t <e")) == "<ent "
    assert stream.finish() == "<e"
    with pytest.raises(sj.PromptError, match="stop string"):
        TextStream(bytewise, [""])
