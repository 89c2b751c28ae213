"""The training loop: killed and resumed runs equal uninterrupted ones, bit for bit; bad losses and data are refused."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.loading import checkpoint
from specjax.training import loop

TRAIN = """
import sys
from pathlib import Path
import jax, numpy as np
import specjax as sj
from specjax import params
from specjax.heads import init_heads
from specjax.training.distill import Answers
from specjax.training.trainer import TrainConfig, dataset, train

config = sj.ModelConfig("llama", 23, 32, 24, 1, 4, 2, 8)
weights = params.init(jax.random.key(0), config)
rng = np.random.default_rng(0)
text = Answers(rng.integers(0, 23, 3200), rng.normal(size=(3200, 32)).astype(np.float32), np.full(100, 32))
heads = init_heads(sj.MedusaConfig(2, 32, 23, projection="shared"), weights)
data = dataset(text, heads)
settings = TrainConfig(epochs=16, batch_size=64, checkpoint_every=10)
out = Path(sys.argv[1])
heads, _ = train(heads, weights, data, data, settings, out, report=lambda record: print(record["step"], flush=True))
sj.save_heads(out / "heads.safetensors", heads)
"""


def losses(directory):
    """The logged loss of every step."""
    records = map(json.loads, (directory / loop.LOG).read_text().splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_five_kills_change_nothing(tmp_path):
    """SIGKILL at five random moments, each resumed: the same losses and weights as one run."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([sys.executable, script, whole], check=True, stdout=subprocess.DEVNULL)
    rng, killed = random.Random(0), 0
    while True:
        process = subprocess.Popen([sys.executable, script, cut], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if killed < 5:
            process.stdout.readline()  # it is under way
            time.sleep(rng.uniform(0.05, 0.6))
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += process.returncode == -signal.SIGKILL
            continue
        process.communicate()
        assert process.returncode == 0
        break
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 800

    assert (cut / "heads.safetensors").read_bytes() == (whole / "heads.safetensors").read_bytes()


def counting(limit=None):
    """A dataset of 0, 1, 2, ..."""
    numbers = grain.MapDataset.range(10**6 if limit is None else limit)
    return numbers.map(lambda i: {"x": np.float32(i)}).to_iter_dataset()


@jax.jit
def add(state, batch):
    """Sums the data; the loss is the batch's value."""
    return {"sum": state["sum"] + batch["x"]}, {"loss": batch["x"]}


START = {"sum": jnp.zeros(())}


def test_the_log_and_the_final_state(tmp_path):
    seen = []
    state, log = loop.fit(
        add, START, counting(), steps=25, directory=tmp_path, checkpoint_every=10,
        evaluate=lambda state: {"sum": float(state["sum"])}, report=seen.append,
    )  # fmt: skip
    assert float(state["sum"]) == sum(range(25))
    assert [r["loss"] for r in log if "loss" in r] == list(range(25))
    assert [(r["step"], r["eval"]["sum"]) for r in seen] == [(0, 0), (10, 45), (20, 190), (25, 300)]
    assert [json.loads(line) for line in (tmp_path / loop.LOG).read_text().splitlines()] == log
    assert checkpoint.latest(tmp_path / "checkpoints") == 25
    assert float(START["sum"]) == 0
    further, longer = loop.fit(add, START, counting(), steps=30, directory=tmp_path, checkpoint_every=10)
    assert float(further["sum"]) == sum(range(30))
    assert len([r for r in longer if "loss" in r]) == 30


def test_a_bad_loss_keeps_the_last_good_checkpoint(tmp_path):
    bad = counting().map(lambda row: {"x": np.float32(np.nan) if row["x"] == 14 else row["x"]})
    with pytest.raises(sj.DataError, match="loss of step 15 is nan"):
        loop.fit(add, START, bad, steps=30, directory=tmp_path, checkpoint_every=10)
    assert checkpoint.latest(tmp_path / "checkpoints") == 10
    state, _ = loop.fit(add, START, counting(), steps=20, directory=tmp_path, checkpoint_every=10)
    assert float(state["sum"]) == sum(range(20))


def test_refusals(tmp_path):
    with pytest.raises(sj.DataError, match="ended after 7 of 9"):
        loop.fit(add, START, counting(7), steps=9, directory=tmp_path / "a", checkpoint_every=3)
    loop.fit(add, START, counting(), steps=9, directory=tmp_path / "b", checkpoint_every=3)
    with pytest.raises(sj.CheckpointError, match="at step 9, past the 5"):
        loop.fit(add, START, counting(), steps=5, directory=tmp_path / "b", checkpoint_every=3)
    with pytest.raises(sj.CheckpointError, match="does not fit"):
        loop.fit(add, {"sum": jnp.zeros(3)}, counting(), steps=12, directory=tmp_path / "b", checkpoint_every=3)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    loop.fit(add, START, counting(), steps=3, directory=tmp_path, checkpoint_every=3)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            loop.fit(add, START, counting(), steps=6, directory=tmp_path, checkpoint_every=3)
    state, log = loop.fit(add, START, counting(), steps=6, directory=tmp_path, checkpoint_every=3)
    assert float(state["sum"]) == sum(range(6))
    assert [r["loss"] for r in log] == list(range(6))
