"""Shards on disk: a killed run loses and duplicates nothing, other models and full disks are refused, splits hold."""

import dataclasses
import json
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import tiny_model
from rich.console import Console

import specjax as sj
from specjax.cli.main import main
from specjax.corpus import manifest
from specjax.corpus.build import Corpus, load_corpus, make_corpus
from specjax.corpus.conversation import Conversation
from specjax.corpus.features import check_budget, with_features
from specjax.corpus.shards import read_shards, shard_path
from specjax.corpus.split import joined, split
from specjax.loading.tokenizer import Tokenizer
from specjax.target.model import forward

SHARDS, SIZE, LENGTH = 5, 4, 6
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of prompts, the last shard's partly missing, one of them twice."""
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [{"question_id": i, "category": "c", "turns": [f"say {i % (SHARDS * SIZE - 1)}"]} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """The tiny Llama with its tokenizer."""
    return sj.load_model(checkpoint)


def settings(directory, file, **changes) -> Corpus:
    """Small shards."""
    data = Corpus(str(directory), str(file), shards=SHARDS, shard_size=SIZE, batch_size=SIZE, max_answer_tokens=LENGTH)
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def whole(tiny, prompts, tmp_path_factory):
    """What an uninterrupted run writes."""
    return make_corpus(tiny, settings(tmp_path_factory.mktemp("whole"), prompts), QUIET)


def assert_same(paths, others):
    ours, theirs = read_shards(paths), read_shards(others)
    assert len(ours) == len(theirs) == SHARDS * SIZE - 1
    for a, b in zip(ours, theirs, strict=True):
        for field in ("prompt", "answer", "features"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


# Kills itself at its n-th fsync: a shard costs two (file, folder) and its manifest two more.
CHILD = f"""
import os, signal, sys
from rich.console import Console
import specjax as sj
from specjax.corpus.build import Corpus, make_corpus
directory, prompts, checkpoint, deadly = *sys.argv[1:4], int(sys.argv[4])
calls, fsync = 0, os.fsync
def counted(file):
    global calls
    calls += 1
    if calls == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = counted
sizes = dict(shards={SHARDS}, shard_size={SIZE}, batch_size={SIZE}, max_answer_tokens={LENGTH})
data = Corpus(directory, prompts, **sizes)
make_corpus(sj.load_model(checkpoint), data, Console(quiet=True))
"""


@pytest.mark.full
def test_kills_lose_and_duplicate_nothing(tiny, prompts, checkpoint, whole, tmp_path):
    def run(deadly):
        return subprocess.Popen([sys.executable, "-c", CHILD, tmp_path, prompts, checkpoint, str(deadly)])

    assert run(7).wait() == -signal.SIGKILL  # the first shard is in its place, the manifest does not count it yet
    assert shard_path(tmp_path, 0).exists()
    assert manifest.load(tmp_path)[1]["shards"] == 0
    assert (tmp_path / "manifest.json.tmp").exists()
    child = run(0)
    while not shard_path(tmp_path, 1).exists():
        assert child.poll() is None
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)  # anywhere in the third or fourth shard
    child.kill()
    child.wait()
    assert_same(make_corpus(tiny, settings(tmp_path, prompts), QUIET), whole)
    counts = manifest.load(tmp_path)[1]
    assert counts == {"shards": SHARDS, "conversations": SHARDS * SIZE - 1, "answer_tokens": (SHARDS * SIZE - 1) * 6}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk(tiny, prompts, whole, tmp_path):
    data = settings(tmp_path, prompts)
    make_corpus(tiny, dataclasses.replace(data, shards=1), QUIET)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole[1].stat().st_size - 100, hard))
    try:
        with pytest.raises(sj.DataError, match=r"cannot write .*shard_00001.*what was written before is intact.*again"):
            make_corpus(tiny, data, QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard_00000.npz"]
    assert_same(make_corpus(tiny, data, QUIET), whole)


def test_no_space_left(tmp_path):
    (tmp_path / "x.tmp").symlink_to("/dev/full")
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(sj.DataError, match=r"cannot write .*No space left on device"):
        manifest.write_atomically(tmp_path / "x", b"after")
    assert (tmp_path / "x").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "answers .*'temperature': 0.0.*now .*0.7"),
        ({"max_answer_tokens": 5}, "answers .*'max_tokens': 6"),
        ({"prompts": "seeds"}, "prompts .*'file'.*now .*'seeds'"),
        ({"shard_size": 3}, r"shard_size 4 \(now 3\)"),
        ({"features": False}, r"features True \(now False\)"),
    ],
)
def test_shards_of_other_settings_are_refused(tiny, whole, prompts, changes, message):
    with pytest.raises(sj.DataError, match=f"were made with {message}"):
        make_corpus(tiny, settings(whole[0].parent, prompts, **changes), QUIET)


def test_shards_of_another_model_or_template_are_refused(tiny, whole, prompts):
    data = settings(whole[0].parent, prompts)
    other = dataclasses.replace(tiny, params=tiny_model(5, vocab=256).params)
    with pytest.raises(sj.DataError, match=r"made with model \w{16} \(now \w{16}\)\. Name another directory"):
        make_corpus(other, data, QUIET)
    tokenizer = Tokenizer(tiny.tokenizer.backend, chat_template=tiny.tokenizer.chat_template + " ")
    with pytest.raises(sj.DataError, match="made with template"):
        make_corpus(dataclasses.replace(tiny, tokenizer=tokenizer), data, QUIET)


def test_directories_that_cannot_be_read(tiny, prompts, whole, tmp_path):
    data = settings(tmp_path, prompts)
    with pytest.raises(sj.DataError, match="no data shards"):
        read_shards([])
    shard = shard_path(tmp_path, 0)
    shard.write_bytes(whole[0].read_bytes())
    with pytest.raises(sj.DataError, match=r"holds 1 shards and no manifest\.json"):
        make_corpus(tiny, data, QUIET)
    (tmp_path / "manifest.json").write_bytes((whole[0].parent / "manifest.json").read_bytes())
    shard.write_bytes(whole[0].read_bytes()[:-300])
    with pytest.raises(sj.DataError, match=r"shard_00000\.npz cannot be read .*delete the file"):
        make_corpus(tiny, data, QUIET)
    with np.load(whole[0]) as file:
        np.savez(shard, **{**file, "lengths": file["lengths"] + 1})
    with pytest.raises(sj.DataError, match="which disagree; delete the file"):
        read_shards([shard])
    (tmp_path / "manifest.json").write_text('{"format": "specjax.conversations", "version": 9, "counts": {}}')
    with pytest.raises(sj.DataError, match=r"version .*9.*Make the data again"):
        make_corpus(tiny, data, QUIET)
    (tmp_path / "file").touch()
    with pytest.raises(sj.DataError, match="cannot make or write the directory"):
        make_corpus(tiny, settings(tmp_path / "file", prompts), QUIET)


def test_the_feature_budget(tiny, prompts, whole, tmp_path):
    with pytest.raises(sj.DataError, match=r"up to 120 tokens .* take 0.00 GB, the budget is 1e-06 GB.*fly"):
        make_corpus(tiny, settings(tmp_path, prompts, feature_budget_gb=1e-6), QUIET)
    assert not list(tmp_path.iterdir())
    bare = settings(tmp_path, prompts, feature_budget_gb=1e-6, features=False)  # computed afterwards, if at all
    with pytest.raises(sj.DataError, match=r"up to 120 tokens .* take 0.00 GB, the budget is 1e-06 GB"):
        load_corpus(tiny, bare, QUIET)
    assert not list(tmp_path.iterdir())
    exact = (SHARDS * SIZE - 1) * LENGTH * 16 * 2 / 1e9  # all shards are there: what they hold counts
    make_corpus(tiny, settings(whole[0].parent, prompts, feature_budget_gb=exact), QUIET)
    one = SIZE * LENGTH * 16 * 2 / 1e9  # of five shards that are there, only those that are asked for
    assert make_corpus(tiny, settings(whole[0].parent, prompts, shards=1, feature_budget_gb=one), QUIET) == whole[:1]
    with pytest.raises(sj.DataError, match="up to 24 tokens"):
        make_corpus(tiny, settings(whole[0].parent, prompts, shards=1, feature_budget_gb=one * 0.99), QUIET)
    check_budget(1000, tiny.config, 1000 * 16 * 2 / 1e9)


def test_a_template_that_writes_the_date_writes_the_one_in_the_manifest(tiny, prompts, tmp_path):
    template = "{{ strftime_now('%Y-%m-%d') }}" + tiny.tokenizer.chat_template
    model = dataclasses.replace(tiny, tokenizer=Tokenizer(tiny.tokenizer.backend, chat_template=template))
    data = settings(tmp_path, prompts, shards=1, date="2025-02-03")
    (item, *_) = read_shards(make_corpus(model, data, QUIET))
    assert model.tokenizer.decode(item.prompt).startswith("2025-02-03<user>")
    assert manifest.load(tmp_path)[0].prompts["date"] == "2025-02-03"
    with pytest.raises(sj.DataError, match="2025-02-03"):
        make_corpus(model, dataclasses.replace(data, date="2025-02-04"), QUIET)


def test_a_prompt_that_cannot_be_answered_stops_the_run_before_it_begins(tiny, tmp_path):
    file = tmp_path / "p.jsonl"
    texts = ["short", "long " * 600]
    file.write_text("\n".join(json.dumps({"question_id": 1, "category": "c", "turns": [text]}) for text in texts))
    data = settings(tmp_path / "d", file, shard_size=1)
    with pytest.raises(sj.DataError, match=r"prompt 2 of .*p\.jsonl \('long long .*takes 1 to 2042\. Shorten it"):
        make_corpus(tiny, data, QUIET)
    assert not (tmp_path / "d").exists()


def test_prompts_beyond_the_shards_are_counted(tiny, prompts, tmp_path, capsys):
    make_corpus(tiny, settings(tmp_path, prompts, shards=1), Console(width=200))
    assert "has 19 different prompts, 1 shards take the first 4: set shards to 5" in capsys.readouterr().out


def test_bad_settings(tiny, tmp_path):
    with pytest.raises(sj.ConfigError, match=r"date is 'today'; expected a day as in 2026-01-31"):
        Corpus(date="today")
    with pytest.raises(sj.ConfigError, match=r"chats is 'c.jsonl', which is trained on as it is; prompts 'seeds'"):
        Corpus(chats="c.jsonl", prompts="seeds")
    with pytest.raises(sj.ConfigError, match="evaluation_share < 1"):
        Corpus(evaluation_share=0.0)
    with pytest.raises(sj.ConfigError, match=r"top_k 5 and top_p 1.0 shape sampling, but greedy decoding has none"):
        Corpus(top_k=5)
    with pytest.raises(sj.ConfigError, match="top_p is 2"):
        Corpus(temperature=1.0, top_p=2)
    with pytest.raises(sj.DataError, match="prompts is 'seed'; expected a JSONL file"):
        make_corpus(tiny, Corpus(str(tmp_path), "seed"), QUIET)


def test_run_makes_text_of_either_source(checkpoint, tmp_path, capsys):
    """Random weights end no user turn, so that seed prompts stand in; without them it is an error."""
    file, out = tmp_path / "make.py", tmp_path / "out"
    file.write_text(
        "from specjax.corpus.build import Corpus\nfrom specjax.studies.make_text import MakeText\n"
        f"def get_config(): return MakeText('made', {str(checkpoint)!r}, Corpus({str(tmp_path / 'd')!r}, "
        "shards=2, shard_size=4, batch_size=4, max_answer_tokens=4, temperature=0.5, prompt_seed=18))\n"
    )
    assert main(["run", str(file), "--output-dir", str(out), "--data.evaluation-share", "0.4"]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["manifest"]["counts"] == {"shards": 2, "conversations": 8, "answer_tokens": 32}
    assert result["manifest"]["answers"]["temperature"] == 0.5
    assert sum(side["conversations"] for side in result["split"].values()) == 8
    other = [f"--data.directory={tmp_path / 'e'}", "--data.prompts", "model"]
    assert main(["run", str(file), f"--output-dir={tmp_path / 'o'}", *other]) == 2
    assert "ended only 0 of 48 user turns" in capsys.readouterr().err


def made(count: int, seed: int = 0) -> list[Conversation]:
    """Prompts and answers that repeat now and then, alone and together."""
    rng = np.random.default_rng(seed)
    return [Conversation(np.array([1, p]), np.array([a, 2])) for p, a in rng.integers(0, count, (count, 2))]


def pairs(data):
    return {(item.prompt.tobytes(), item.answer.tobytes()) for item in data}


def test_evaluation_text_never_leaks():
    data = made(4000)
    training, evaluation = split(data, 0.1)
    for name in ("prompt", "answer"):
        ours, theirs = ({getattr(item, name).tobytes() for item in part} for part in (training, evaluation))
        assert not ours & theirs
    assert 0.05 < len(evaluation) / len(training) < 0.15
    for part in (training, evaluation):
        assert len({item.answer.tobytes() for item in part}) == len(part)  # each answer once
    assert {item.answer.tobytes() for item in data} == {item.answer.tobytes() for item in training + evaluation}


def test_the_split_depends_on_no_order():
    data = made(3000)
    shuffled = [data[i] for i in np.random.default_rng(1).permutation(len(data))]
    for one, other in zip(split(data, 0.1), split(shuffled, 0.1), strict=True):
        assert pairs(one) == pairs(other)
    # More text moves no prompt to the other side.
    before, after = split(data, 0.1), split(data + made(3000, seed=2), 0.1)
    for ours, theirs in (before, after[::-1]), (before[::-1], after):
        assert not {item.prompt.tobytes() for item in ours[0]} & {item.prompt.tobytes() for item in theirs[0]}


def test_a_later_turn_leaks_neither():
    turn = np.array([7, 8, 9])
    data = [Conversation(np.array([i]), np.array([i, *turn]), mask=np.array([1, 0, 1, 1], bool)) for i in range(60)]
    training, evaluation = split(data, 0.3)
    assert len(training) + len(evaluation) == 60
    assert all(item.answer.tolist() == item.prompt.tolist() for item in evaluation)  # without the turn [8, 9]
    same = [dataclasses.replace(item, mask=np.array([0, 0, 1, 1], bool)) for item in data]
    with pytest.raises(sj.DataError, match=r"of 60 conversations .* and 0 to evaluate with"):
        split(same, 0.3)
    with pytest.raises(sj.ConfigError, match="share is 1"):
        split(data, 1.0)
    with pytest.raises(sj.DataError, match="no features"):
        joined(data)


def test_chats_get_features_from_one_pass(tiny, tmp_path):
    """Chunks, batches and padding do not show: loaded text equals a forward pass over each conversation alone."""
    chats = [
        {"messages": [{"role": role, "content": f"{role} {i} " * (1 + 12 * (i == 3))} for role in roles]}
        for i in range(8)
        for roles in [("user", "assistant", "user", "assistant")]
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, chats)))
    tokenizer = Tokenizer(
        tiny.tokenizer.backend, chat_template=tiny.tokenizer.chat_template.replace("<a>", "<assistant>")
    )
    model = dataclasses.replace(tiny, tokenizer=tokenizer)
    training, evaluation = load_corpus(model, Corpus(chats=str(tmp_path / "c.jsonl"), evaluation_share=0.4), QUIET)
    assert len(training) + len(evaluation) == 8
    item = max(training + evaluation, key=len)
    assert len(item) > 512
    ids = np.concatenate([item.prompt, item.answer])
    alone = jax.jit(forward, static_argnums=1)(model.params, model.config, ids)
    exact = alone.features[len(item.prompt) - 1 : -1]
    np.testing.assert_allclose(item.features.astype(np.float32), exact, rtol=1e-2, atol=2e-3)
    with pytest.raises(sj.DataError, match="token id 256, the model's vocabulary is 256"):
        with_features(model, [Conversation(np.array([1]), np.array([256]))])
    with pytest.raises(sj.DataError, match="the budget is 1e-06 GB"):
        with_features(model, training, budget_gb=1e-6)
