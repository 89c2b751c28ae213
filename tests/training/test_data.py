"""Packing: nothing is lost or doubled, nothing crosses conversations, and the position can be restored."""

import dataclasses

import numpy as np
import pytest

import specjax as sj
from specjax.training.data import Conversation, attention_mask, conversations, cut_tokens, packed


def made(count, seed=0, width=3):
    """Conversations of random lengths; every token of conversation i is i + 1."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        p, a = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        features = rng.normal(size=(a, width)).astype(np.float32)
        items.append(Conversation(np.full(p, i + 1), np.full(a, i + 1), features))
    return items


def all_rows(data, **options):
    """Every packed row of one pass."""
    return list(packed(data, **({"length": 24, "batch_size": 1, "seed": 3, "epochs": 1} | options)))


def test_every_conversation_stands_whole_in_one_row():
    data, seen = made(80), []
    for batch in all_rows(data):
        tokens, segments, positions = (batch[name][0] for name in ("tokens", "segments", "positions"))
        for segment in range(1, segments.max() + 1):
            inside = np.flatnonzero(segments == segment)
            assert (np.diff(inside) == 1).all()
            (number,) = set(tokens[inside].tolist())
            item = data[number - 1]
            assert len(inside) == len(item)
            assert positions[inside].tolist() == list(range(len(item)))
            answer = inside[len(item.prompt) :]
            assert batch["answer"][0][inside].tolist() == [False] * len(item.prompt) + [True] * len(item.answer)
            np.testing.assert_array_equal(batch["features"][0][answer], item.features)
            assert not batch["features"][0][inside[: len(item.prompt)]].any()
            seen.append(number)
        assert not batch["answer"][0][segments == 0].any()
    assert sorted(seen) == list(range(1, 81))


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_a_whole_pass_leaves_nothing_out(batch_size):
    """The last batch has empty rows, that nothing in it counts in; the rows before are those of batches of one."""
    data = made(80)
    batches = all_rows(data, batch_size=batch_size, whole=True)
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    alone = {name: np.concatenate([batch[name] for batch in all_rows(data)]) for name in batches[0]}
    count = len(alone["tokens"])
    assert len(rows["tokens"]) == -(-count // batch_size) * batch_size
    for name, array in rows.items():
        np.testing.assert_array_equal(array[:count], alone[name])
        assert not array[count:].any()
        assert {batch[name].shape for batch in batches} == {(batch_size, *array.shape[1:])}
    assert rows["answer"].sum() == sum(len(item.answer) for item in data)


def test_attention_stays_within_a_conversation():
    mask = attention_mask(np.array([1, 1, 2, 2, 2, 0]))
    assert mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_the_order_is_fixed_by_the_seed_and_differs_between_passes():
    data = made(200)
    first, again, other = (
        np.concatenate([b["tokens"][0] for b in all_rows(data, seed=seed, epochs=2)]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("at", [1, 5, 23])
def test_a_restored_position_goes_on_with_the_same_batches(at):
    data = made(300)
    options = {"length": 24, "batch_size": 2, "seed": 0}
    iterator = iter(packed(data, **options))
    for _ in range(at):
        next(iterator)
    position = iterator.get_state()
    expected = [next(iterator) for _ in range(8)]
    resumed = iter(packed(data, **options))
    resumed.set_state(position)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed)["tokens"], batch["tokens"])


def test_long_conversations_are_cut():
    (batch,) = all_rows([Conversation(np.arange(10), np.arange(30))], length=16)
    assert batch["tokens"][0].tolist() == [*range(10), *range(6)]


@pytest.mark.parametrize("length", [3, 8, 24])
def test_what_is_cut_is_counted(length):
    data = made(80)
    data += [dataclasses.replace(item, mask=np.arange(len(item.answer)) % 3 > 0) for item in data]
    said = sum(len(item.answer) if item.mask is None else int(item.mask.sum()) for item in data)
    kept = sum(int(batch["answer"].sum()) for batch in all_rows(data, length=length))
    assert said - kept == cut_tokens(data, length)
    assert (said > kept) == (length < 24)


def test_refusals():
    data = made(2)
    with pytest.raises(sj.DataError, match="no conversations"):
        packed([], length=8, batch_size=1, seed=0)
    with pytest.raises(sj.DataError, match="conversation 1 is empty"):
        packed([data[0], Conversation(np.zeros(0, int), np.zeros(0, int))], length=8, batch_size=1, seed=0)
    with pytest.raises(sj.DataError, match="do not fill one batch of 64 x 128"):
        packed(data, length=128, batch_size=64, seed=0, epochs=1)
    with pytest.raises(sj.ConfigError, match="length is 0"):
        packed(data, length=0, batch_size=1, seed=0)
    with pytest.raises(sj.DataError, match="1 prompts and 2 answers"):
        conversations([np.arange(3)], np.arange(4), np.array([2, 2]))


def test_conversations_come_apart_again():
    items = made(5)
    joined = conversations(
        [i.prompt for i in items],
        np.concatenate([i.answer for i in items]),
        np.array([len(i.answer) for i in items]),
        np.concatenate([i.features for i in items]),
    )
    for a, b in zip(items, joined, strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
