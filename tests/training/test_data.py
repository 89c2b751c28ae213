"""Packing: nothing is lost or doubled, nothing crosses conversations, and the position can be restored."""

import dataclasses

import numpy as np
import pytest

import specjax as sj
from specjax.corpus.conversation import Conversation, conversations, cut_tokens
from specjax.training.packing import PackedConfig, attention_mask, labels, packed, packed_steps
from specjax.training.preflight import check_cut


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


LENGTHS = {
    "one that halves badly": lambda rng: 300,
    "full rows": lambda rng: 512,
    "beyond": lambda rng: 900,
    "short": lambda rng: int(rng.integers(2, 60)),
    "any": lambda rng: int(rng.integers(2, 700)),
    "a few long ones": lambda rng: int(min(700, 2 + rng.exponential(60))),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("epochs", "accumulate"), [(1, 1), (3, 2)])
def test_a_run_visits_every_conversation_in_every_epoch(lengths, epochs, accumulate):
    """But for those in the rows that fill no update any more: the packing itself is counted, not its tokens."""
    rng = np.random.default_rng(0)
    sizes = [LENGTHS[lengths](rng) for _ in range(130)]
    data = [Conversation(np.full(1, i), np.full(size - 1, i)) for i, size in enumerate(sizes)]
    config = PackedConfig(epochs=epochs, batch_size=2, length=512, seed=3, accumulate=accumulate)
    seen = [
        [int(batch["tokens"][0][batch["segments"][0] == s][0]) for s in range(1, batch["segments"].max() + 1)]
        for batch in packed(data, length=512, batch_size=1, seed=3, epochs=epochs)
    ]
    trained = 2 * packed_steps(data, config)
    assert 0 <= len(seen) - trained < 2 * accumulate
    assert (np.bincount(np.concatenate(seen)) == epochs).all()
    assert (np.bincount(np.concatenate(seen[:trained])) <= epochs).all()


def test_rows_are_counted_where_their_tokens_would_not_fill_a_batch():
    """Eight conversations that are each a little more than half a row make eight rows, not five."""
    data = [Conversation(np.zeros(1, int), np.zeros(12, int)) for _ in range(8)]
    assert packed_steps(data, PackedConfig(epochs=1, batch_size=4, length=24)) == 2
    (batch,) = packed(data, length=24, batch_size=8, seed=0, epochs=1)
    assert (batch["segments"].max(1) == 1).all()
    with pytest.raises(sj.DataError, match=r"104 tokens, 8 rows in 1 epochs, do not fill two batches of 5 x 24, 1 tim"):
        packed_steps(data, PackedConfig(epochs=1, batch_size=5, length=24))
    with pytest.raises(sj.DataError, match="0 rows in 1 epochs, do not fill"):
        packed_steps([], PackedConfig(epochs=1))


def test_what_there_is_to_learn():
    mask = np.array([1, 1, 1, 0, 1, 0, 1, 1], bool)
    item = Conversation(np.array([10, 11]), np.arange(8), mask=mask)
    assert labels(item, 99, 1).tolist() == [0, 1, 2, 4, 6, 7]
    assert labels(item, 99, 2).tolist() == [1, 2, 7]
    assert labels(item, 9, 2).tolist() == [1, 2]
    assert labels(item, 3, 1).tolist() == [0]
    assert [len(labels(item, length, 2)) for length in (0, 1, 2, 3, 4)] == [0, 0, 0, 0, 1]
    whole = Conversation(np.zeros(0, int), np.arange(3))
    assert (labels(whole, 3, 1).tolist(), labels(whole, 3, 2).tolist()) == ([1, 2], [2])  # no slot before the first


def test_text_is_refused_where_the_cut_leaves_nothing_to_learn(recwarn):
    data = [Conversation(np.zeros(5, int), np.zeros(4, int)), Conversation(np.zeros(9, int), np.zeros(2, int))]
    check_cut(data, 11, "training", ahead=2)
    assert not recwarn
    with pytest.warns(
        UserWarning, match=r"the training text is cut at length 9, .* 2 of its 6 answer tokens \(33.3%\)"
    ):
        check_cut(data, 9, "training", ahead=2)
    cut = r"the evaluation text is cut at length 6, which takes 5 of its 6 .*no label; set its length to .*\(11 "
    with pytest.raises(sj.DataError, match=cut):
        check_cut(data, 6, "evaluation", ahead=2)
    with pytest.warns(UserWarning, match="takes 5 of its 6"):
        check_cut(data, 6, "evaluation", ahead=1)
    short = [Conversation(np.zeros(3, int), np.zeros(1, int))]
    with pytest.raises(sj.DataError, match="none of the 1 conversations in the training text has 2 of the assistant's"):
        check_cut(short, 2, "training", ahead=2)


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
