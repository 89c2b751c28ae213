"""SIGINT, SIGTERM and `kill -9`: an experiment ends with what it has, and the same command goes on from there."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import specjax as sj
from specjax import files, stopping
from specjax.cli.main import main
from specjax.corpus import manifest
from specjax.corpus.build import Corpus
from specjax.journal import NOWHERE, Journal, whole
from specjax.ranks.table import RankTable
from specjax.report import records
from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts
from specjax.studies.fuzz import Fuzz
from specjax.studies.make_text import MakeText
from specjax.studies.rank_pass import RankPass
from specjax.studies.round_time import RoundTime
from specjax.studies.runner import run_config
from specjax.studies.train_random import TrainRandomQwen2
from specjax.studies.tree_search import TreeSearch
from specjax.studies.two_sample import TwoSample
from specjax.training.cached_medusa import CachedMedusaConfig
from specjax.training.steps import LOG

HERE = Path(__file__).parent
QUIET = Console(quiet=True)


def decoding(checkpoint, folder):
    """Two methods on five prompts."""
    heads = str(checkpoint / "heads" / "heads.safetensors")
    methods = (Method("autoregressive", "float32"), Method("medusa", "float32", heads, "cartesian:2,1"))
    return DecodeExperiment("tiny", str(checkpoint), methods, Prompts(per_category=1), Decoding(max_new_tokens=8))


def training(checkpoint, folder):
    """Eleven steps, three of them with a checkpoint."""
    settings = CachedMedusaConfig(epochs=1, batch_size=64, checkpoint_every=4, select="best")
    sizes = {"conversations": 64, "held_out": 8, "answer_tokens": 12}
    return TrainRandomQwen2(name="fit", num_heads=2, reduced_vocab_size=None, training=settings, **sizes)


def text(checkpoint, folder):
    """Four shards."""
    sizes = {"shards": 4, "shard_size": 6, "batch_size": 6, "max_answer_tokens": 6, "evaluation_share": 0.4}
    return MakeText("text", str(checkpoint), Corpus(str(folder / "shards"), str(questions(folder)), **sizes))


def questions(folder):
    """A file of 24 prompts."""
    file = folder / "prompts.jsonl"
    lines = [{"question_id": i, "category": "c", "turns": [f"say {i}"]} for i in range(24)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def ranks(checkpoint, folder):
    """Answers in three batches, ranks in two groups."""
    sizes = {"max_new_tokens": 8, "batch_size": 8, "tokens": 190, "trees": 2, "nodes": 4}
    return RankPass("ranks", str(checkpoint), str(checkpoint / "heads"), "float32", str(questions(folder)), **sizes)


def samples(checkpoint, folder):
    """Three laws, three batches each."""
    return TwoSample(
        name="tiny", model=str(checkpoint), prompt="ab", drafters=(("ngram", "chain:2"), ("medusa", "cartesian:2,1")),
        heads=str(checkpoint / "heads" / "heads.safetensors"), samples=300, length=2, batch_size=100,
    )  # fmt: skip


def rounds(checkpoint, folder):
    """Three repeats of two sizes."""
    return RoundTime("bench", str(checkpoint), str(checkpoint / "heads"), "float32", (1, 2), repeats=3)


def measuring(checkpoint):
    """`specjax tree measure`, up to the file."""
    options = ["--model", str(checkpoint), "--heads", str(checkpoint / "heads"), "--dtype", "float32"]
    return ["tree", "measure", *options, "--max-new-tokens", "8", "--save"]


def search(checkpoint, folder):
    """All its stages."""
    assert main([*measuring(checkpoint), str(folder / "searched.npz")]) == 0
    sizes = {"max_new_tokens": 8, "sizes": (2, 3), "timed_sizes": (2,), "timed_per_category": 1, "repeats": 1}
    table = str(folder / "searched.npz")
    return TreeSearch("search", str(checkpoint), str(checkpoint / "heads"), "float32", table, **sizes)


def attacks(checkpoint, folder):
    """Three readers."""
    return Fuzz("fuzz", mutants=20, readers=("tree", "prompts", "settings of a run"))


def read(directory):
    """The result."""
    return json.loads((directory / "result.json").read_text())


def same_always(result, directory):
    """What of a result and its files does not depend on the clock."""
    kept = {name: result[name] for name in ("experiment", "config", "prompts", "tokens", "split") if name in result}
    for method in result.get("methods", result.get("measured", ())):
        kept[method["name"]] = [method[name] for name in ("tree_nodes", "tokens_per_round", "acceptance_by_depth")]
    timed = ("milliseconds", "cost", "slowest", "expected_tokens_per_second")
    rows = result.get("rows", ())
    kept["rows"] = [{name: value for name, value in row.items() if name not in timed} for row in rows]
    if (log := directory / LOG).exists():
        steps = map(json.loads, log.read_text().splitlines())
        kept["log"] = [{k: v for k, v in step.items() if not k.endswith("_per_second")} for step in steps]
        kept["heads"] = load_file(directory / "heads.safetensors")
    for file in directory.glob("*.ranks.npz"):
        table = RankTable.load(file)
        kept[file.name] = [table.ranks, table.confidence, table.entropy, table.tokens, table.lengths]
    return kept


def shards(directory):
    """All text in a directory, and what its manifest counts."""
    found = {file.name: dict(np.load(file)) for file in directory.glob("*.npz")}
    return found | {"counts": manifest.load(directory)[1]}


def signalled(monkeypatch, number, at):
    """Sends this process a signal with the `at`-th file or folder that is written to disk."""
    calls, fsync = 0, os.fsync

    def counted(file):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        fsync(file)

    monkeypatch.setattr(os, "fsync", counted)


# The signal comes with the `at`-th write; what the partial result must say.
STOPS = {
    "decoding": (decoding, signal.SIGTERM, 8, r"SIGTERM: 2 of 5 prompts"),
    "training": (training, signal.SIGINT, 5, r"SIGINT: step \d of 11"),
    "text": (text, signal.SIGTERM, 8, r"SIGTERM: \d of 4 shards"),
    "ranks": (ranks, signal.SIGINT, 5, r"SIGINT: 2 of 3 answers"),
    "ranks, measuring": (ranks, signal.SIGINT, 9, r"SIGINT: 1 of 2 groups of texts"),
    "samples": (samples, signal.SIGTERM, 17, r"SIGTERM: 1 of 3 samples of ngram"),
    "rounds": (rounds, signal.SIGINT, 5, r"SIGINT: 2 of 3 repeats"),
    "search": (search, signal.SIGTERM, 5, r"SIGTERM: .* of .*"),
    "attacks": (attacks, signal.SIGTERM, 3, r"SIGTERM: \d of 3 readers"),
}
ESSENTIAL = ("decoding", "training")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ESSENTIAL else pytest.mark.full) for name in STOPS]
)
def test_a_signal_ends_with_what_there_is_and_a_second_run_goes_on(name, checkpoint, tmp_path, monkeypatch):
    make, number, at, told = STOPS[name]
    config = make(checkpoint, tmp_path)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signalled(patch, number, at)
        assert run_config(config, out, QUIET) == 128 + number
    partial = read(out)
    assert re.fullmatch(told, partial["partial"])
    assert partial["experiment"] == config.name
    assert partial["environment"]["date"]
    if name == "decoding":  # what there is
        assert partial["prompts"] == 2
        assert partial["methods"][1]["speedup"]["median"] > 0
    if name == "training":
        assert (out / "heads.safetensors").exists()
        assert partial["evaluations"][-1]["step"] == partial["step"] < 11
    assert run_config(config, out, QUIET) == 0
    assert not read(out).get("partial")
    assert not (out / "journal").exists()
    with pytest.raises(sj.ConfigError, match="exists; choose another"):
        run_config(config, out, QUIET)
    resumed = same_always(read(out), out)
    if isinstance(config, MakeText):
        ours = shards(tmp_path / "shards")
        (tmp_path / "shards").rename(tmp_path / "before")
    assert run_config(config, tmp_path / "whole", QUIET) == 0
    np.testing.assert_equal(resumed, same_always(read(tmp_path / "whole"), tmp_path / "whole"))
    if isinstance(config, MakeText):
        np.testing.assert_equal(ours, shards(tmp_path / "shards"))


def test_a_table_of_ranks_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    command = measuring(checkpoint)
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, 5)
        assert main([*command, str(tmp_path / "a.npz")]) == 130
    assert "The same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()
    assert (tmp_path / "a.npz.journal").exists()
    assert main([*command, str(tmp_path / "a.npz"), "--cap", "5"]) == 2
    assert "cap 32 (now 5)" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "a.npz")]) == main([*command, str(tmp_path / "b.npz")]) == 0
    ours, theirs = (RankTable.load(tmp_path / f"{name}.npz") for name in "ab")
    np.testing.assert_array_equal(ours.ranks, theirs.ranks)
    np.testing.assert_array_equal(ours.confidence, theirs.confidence)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_second_signal_ends_at_once():
    with stopping.on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked() is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stopping.asked() is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_partial_result_is_no_record(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({
        "experiment": "x", "environment": {"date": "2026-01-01T00:00:00"}, "partial": "SIGINT: 1 of 2 prompts",
    }))  # fmt: skip
    with pytest.raises(sj.DataError, match=r"is partial .*1 of 2 prompts.*to its end first"):
        records.add(tmp_path / "result.json", tmp_path)


def test_the_journal(tmp_path):
    made = []

    def make(number):
        made.append(number)
        if number == 2 and len(made) == 3:
            raise sj.DataError("the disk is full")
        return {"x": np.arange(number), "y": np.float32(number)}

    journal = Journal.open(tmp_path / "j", {"a": 1})
    with pytest.raises(sj.DataError, match="the disk is full"):
        journal.pieces("work", 4, make)
    (tmp_path / "j" / "work" / "000002.npz.tmp").write_bytes(b"half")  # as a kill leaves it
    journal = Journal.open(tmp_path / "j", {"a": 1})
    assert not list(tmp_path.rglob("*.tmp"))
    done = whole(journal.pieces("work", 4, make))
    assert made == [0, 1, 2, 2, 3]
    assert [int(piece["y"]) for piece in done] == [0, 1, 2, 3]
    assert done[3]["x"].tolist() == [0, 1, 2]
    assert journal.once("choice", lambda: {"tree": (1, 2)}) == {"tree": [1, 2]}
    assert journal.once("choice", lambda: 1 / 0) == {"tree": [1, 2]}
    with pytest.raises(sj.CheckpointError, match=r"begun with a 1 \(now 2\)"):
        Journal.open(tmp_path / "j", {"a": 2})
    (tmp_path / "j" / "work" / "000001.npz").write_bytes(b"no zip")
    with pytest.raises(sj.CheckpointError, match=r"000001\.npz cannot be read .*delete it"):
        journal.pieces("work", 4, make)
    with stopping.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(stopping.Stopped, match="0 of 3 other"):
            journal.pieces("other", 3, make)
        assert len(whole(NOWHERE.pieces("other", 3, make))) == 3  # what keeps nothing would lose it


def test_one_run_at_a_time(tmp_path, checkpoint):
    hold = "import sys; from pathlib import Path; from specjax.files import locked\n"
    hold += "with locked(Path(sys.argv[1]), 'run', ''):\n print('held', flush=True)\n input()"
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "out"], stdin=-1, stdout=-1, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(sj.DataError, match=rf"out is in use by process {other.pid}; wait for it, or choose another"):
        run_config(decoding(checkpoint, tmp_path), tmp_path / "out", QUIET)
    other.kill()
    other.communicate()
    with files.locked(tmp_path / "out", "run", ""):
        assert (tmp_path / "out" / ".run.lock").read_text() == str(os.getpid())
        with pytest.raises(sj.DataError, match="is in use"), files.locked(tmp_path / "out", "run", ""):
            pass
        with files.locked(tmp_path / "out", "shards", ""):
            pass
    assert not list((tmp_path / "out").iterdir())


KILLED = {"decoding": decoding, "training": training, "text": text, "ranks": ranks}


@pytest.mark.full
@pytest.mark.parametrize("name", KILLED)
def test_fifty_kills_lose_and_double_nothing(name, checkpoint, tmp_path):
    """At random moments between a run's first write and its end; whenever one comes to its end, a new one begins."""
    command = [sys.executable, HERE / "kill_job.py", name, checkpoint, tmp_path, "50"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == 50
    assert told["finished"] >= 2
