"""Steps: killed and resumed runs equal uninterrupted ones, bit for bit; bad losses and data are refused."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import specjax as sj
from specjax import run_settings
from specjax.loading import checkpoint
from specjax.training.steps import LOG, best_state, run_steps

TRAIN = """
import sys
from pathlib import Path
import jax, numpy as np
import specjax as sj
from specjax.target import params
from specjax.heads import init_heads
from specjax.corpus.answers import Answers
from specjax.training.cached_medusa import CachedMedusa, CachedMedusaConfig, dataset
from specjax.training.run import train

config = sj.ModelConfig("llama", 23, 32, 24, 1, 4, 2, 8)
weights = params.init(jax.random.key(0), config)
rng = np.random.default_rng(0)
text = Answers(rng.integers(0, 23, 3200), rng.normal(size=(3200, 32)).astype(np.float32), np.full(100, 32))
heads = init_heads(sj.MedusaConfig(2, 32, 23, projection="shared"), weights)
data = dataset(text, heads)
settings = CachedMedusaConfig(epochs=16, batch_size=64, checkpoint_every=10, accumulate=3, ema=0.9)
out = Path(sys.argv[1])
objective = CachedMedusa(heads=heads, target=weights, data=data, held_out=data, settings=settings)
heads, _ = train(objective, out, report=lambda record: print(record["step"], flush=True))
sj.save_heads(out / "heads.safetensors", heads)
"""


def losses(directory):
    """The logged loss of every step."""
    records = map(json.loads, (directory / LOG).read_text().splitlines())
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.full
def test_five_kills_change_nothing(tmp_path):
    """SIGKILL at five random moments, each resumed: the same losses and averaged weights as one run.

    Most checkpoints fall between two updates, in the midst of gathering gradients.
    """
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
            assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
            killed += 1
            continue
        process.communicate()
        assert process.returncode == 0
        break
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 798

    # Not the files' bytes: safetensors writes its metadata in an order that differs from process to process.
    ours, theirs = (safetensors.numpy.load_file(directory / "heads.safetensors") for directory in (cut, whole))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.tobytes() == theirs[name].tobytes()


HOSTS = """
import sys
from pathlib import Path
import grain, jax, jax.numpy as jnp, numpy as np
from specjax.errors import CheckpointError
from specjax.training.steps import run_steps
from specjax.training.mesh import HostsConfig

root, coordinator, process = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
HostsConfig(coordinator, 2, process).join()
numbers = grain.MapDataset.range(9).map(lambda i: {"x": np.float32(i)}).to_iter_dataset()

def run(directory, settings):
    try:
        run_steps(
            lambda state, batch: (state, {"loss": batch["x"]}), lambda: {"sum": jnp.zeros(())}, numbers,
            steps=6, directory=directory, checkpoint_every=3, settings=settings,
        )
    except CheckpointError as error:
        print(error)

run(root / "one", {"text": process})
run(root / ("begun" if process else "new"), {"text": 0})
"""


@pytest.mark.full
def test_hosts_with_other_text_or_checkpoints_are_refused(tmp_path):
    """By all of them, before the first step."""
    run_steps(add, start, counting(), steps=3, directory=tmp_path / "begun", checkpoint_every=3, settings={"text": 0})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    script = tmp_path / "hosts.py"
    script.write_text(HOSTS)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script), str(tmp_path), coordinator]
    both = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    for out, _ in said:
        text, steps = [line for line in out.splitlines() if "processes" in line]
        assert text.startswith("processes [1] have other settings, text, heads or target than process 0; give")
        assert "data.directory" in text
        assert steps.startswith("the processes find checkpoints of steps [-1, 3] (-1: none) in ")
        assert "one --output-dir" in steps
    assert not list((tmp_path / "one").iterdir())


FIRST = """
import sys, time
from pathlib import Path
from specjax.errors import DataError
from specjax.training.mesh import HostsConfig, first_alone

def act():
    time.sleep(1)
    if sys.argv[2] == "fails":
        raise DataError("no text")
    return "made"

mark, process = Path(sys.argv[1]) / "new" / "mark", int(sys.argv[4])
HostsConfig(sys.argv[3], 2, process).join()
for _ in range(2 if sys.argv[2] == "works" else 1):  # a mark of before does not count
    begun = time.time()
    try:
        print(first_alone(act, mark), time.time() - begun >= 0.9, flush=True)
    except DataError as error:
        print(error, flush=True)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("works", ["made True", "None True"]),
        ("fails", ["no text", "the first process failed, so this one ends too (DataError: no text)."]),
    ],
)
def test_hosts_wait_for_what_the_first_does_alone(tmp_path, outcome, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    (tmp_path / "first.py").write_text(FIRST)
    command = [sys.executable, str(tmp_path / "first.py"), str(tmp_path), outcome, coordinator]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    both = [subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True) for i in range(2)]
    try:
        outs = [process.communicate(timeout=120)[0].splitlines() for process in both]
    finally:
        for process in both:
            process.kill()
    for lines, expected in zip(outs, said, strict=True):
        assert [line for line in lines if "Gloo" not in line] == [expected] * (2 if outcome == "works" else 1)


def counting(limit=None):
    """A dataset of 0, 1, 2, ..."""
    numbers = grain.MapDataset.range(10**6 if limit is None else limit)
    return numbers.map(lambda i: {"x": np.float32(i)}).to_iter_dataset()


@jax.jit
def add(state, batch):
    """Sums the data; the loss is the batch's value."""
    return {"sum": state["sum"] + batch["x"]}, {"loss": batch["x"]}


def start():
    return {"sum": jnp.zeros(())}


def test_the_log_and_the_final_state(tmp_path):
    seen = []
    state, log = run_steps(
        add, start, counting(), steps=25, directory=tmp_path, checkpoint_every=10,
        evaluate=lambda state: {"sum": float(state["sum"])}, report=seen.append,
    )  # fmt: skip
    assert float(state["sum"]) == sum(range(25))
    assert [r["loss"] for r in log if "loss" in r] == list(range(25))
    assert [(r["step"], r["eval"]["sum"]) for r in seen] == [(0, 0), (10, 45), (20, 190), (25, 300)]
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == log
    assert checkpoint.latest(tmp_path / "checkpoints") == 25
    further, longer = run_steps(add, start, counting(), steps=30, directory=tmp_path, checkpoint_every=10)
    assert float(further["sum"]) == sum(range(30))
    assert len([r for r in longer if "loss" in r]) == 30


def test_a_bad_loss_keeps_the_last_good_checkpoint(tmp_path):
    bad = counting().map(lambda row: {"x": np.float32(np.nan) if row["x"] == 14 else row["x"]})
    saved = r"loss of step 15 is nan; the last state that was saved is step 10's, in .*checkpoints\. .*another --output"
    with pytest.raises(sj.DataError, match=saved):
        run_steps(add, start, bad, steps=30, directory=tmp_path, checkpoint_every=10)
    assert checkpoint.latest(tmp_path / "checkpoints") == 10
    with pytest.raises(sj.DataError, match=saved):  # found there by a run that goes on
        run_steps(add, start, bad, steps=30, directory=tmp_path, checkpoint_every=10)
    state, _ = run_steps(add, start, counting(), steps=20, directory=tmp_path, checkpoint_every=10)
    assert float(state["sum"]) == sum(range(20))


def test_a_bad_loss_before_the_first_checkpoint(tmp_path):
    """There is no state to point to, and with nothing kept other settings may take the same directory."""
    bad = counting().map(lambda row: {"x": np.float32(np.nan) if row["x"] == 4 else row["x"]})
    with pytest.raises(sj.DataError, match=r"loss of step 5 is nan; nothing had been saved.*begin again") as refused:
        run_steps(add, start, bad, steps=30, directory=tmp_path, checkpoint_every=10, settings={"rate": 0.2})
    assert "checkpoints" not in str(refused.value)
    again = run_steps(add, start, counting(), steps=5, directory=tmp_path, checkpoint_every=5, settings={"rate": 0.1})
    assert float(again.state["sum"]) == sum(range(5))


def test_refusals(tmp_path):
    with pytest.raises(sj.DataError, match="ended after 7 of 9"):
        run_steps(add, start, counting(7), steps=9, directory=tmp_path / "a", checkpoint_every=3)
    run_steps(add, start, counting(), steps=9, directory=tmp_path / "b", checkpoint_every=3)
    with pytest.raises(sj.CheckpointError, match="at step 9, past the 5"):
        run_steps(add, start, counting(), steps=5, directory=tmp_path / "b", checkpoint_every=3)
    with pytest.raises(sj.CheckpointError, match="does not fit"):
        run_steps(
            add, lambda: {"sum": jnp.zeros(3)}, counting(), steps=12, directory=tmp_path / "b", checkpoint_every=3
        )


def test_a_run_goes_on_only_with_what_it_was_begun_with(tmp_path):
    begun = {"training": {"learning_rate": 0.1, "clip": None}, "data": {"positions": 9}}

    def run(steps, settings, directory=tmp_path / "run"):
        return run_steps(
            add, start, counting(), steps=steps, directory=directory, checkpoint_every=3, settings=settings
        )

    run(3, begun)
    log = (tmp_path / "run" / LOG).read_bytes()
    other = {"training": {"learning_rate": 0.2, "clip": None}, "data": {"positions": 8}, "heads": 2}
    with pytest.raises(sj.CheckpointError) as refused:
        run(6, other)
    assert (
        "begun with training.learning_rate 0.1 (now 0.2); data.positions 9 (now 8); heads absent (now 2): go back"
        in (str(refused.value))
    )
    assert "name another --output-dir" in str(refused.value)
    assert (checkpoint.latest(tmp_path / "run" / "checkpoints"), (tmp_path / "run" / LOG).read_bytes()) == (3, log)
    assert float(run(6, begun).state["sum"]) == sum(range(6))
    (tmp_path / "run" / run_settings.FILE).write_text("{")
    with pytest.raises(sj.CheckpointError, match=r"settings\.json, .*cannot be read .*put it back"):
        run(9, begun)
    (tmp_path / "run" / run_settings.FILE).unlink()
    with pytest.raises(sj.CheckpointError, match=r"settings\.json, .*is missing: an older version .*name another"):
        run(9, begun)
    # Begun, but with no checkpoint yet: there is nothing to keep.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / run_settings.FILE).write_text(run_settings.as_json(other))
    assert float(run(3, begun, tmp_path / "new").state["sum"]) == sum(range(3))


@contextlib.contextmanager
def disk_with(size):
    """No file of this process can grow beyond `size` bytes: writing more is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "what"), [(20_000, "checkpoint 6 cannot be written"), (150, r"cannot write .*log\.jsonl")]
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, size, what):
    """The weights do not fit, or not even the log."""
    vector = {"sum": jax.random.normal(jax.random.key(0), (20_000,))}  # 80 kB that do not compress

    def run(steps):
        return run_steps(add, lambda: vector, counting(), steps=steps, directory=tmp_path, checkpoint_every=3)

    run(3)
    with disk_with(size), pytest.raises(sj.CheckpointError, match=f"{what}.*is the disk full"):
        run(6)
    assert checkpoint.latest(tmp_path / "checkpoints") == 3
    state, log = run(6)
    np.testing.assert_allclose(state["sum"], vector["sum"] + sum(range(6)), rtol=1e-6)
    assert [r["loss"] for r in log] == list(range(6))


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    def run(steps):
        return run_steps(
            add, start, counting(), steps=steps, directory=tmp_path, checkpoint_every=1, keep=2,
            evaluate=lambda state: {"sum": float(state["sum"])}, score=lambda e: -abs(e["sum"] - 6.0),
        )  # fmt: skip

    run(7)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]  # 0 + 1 + 2 + 3 is 6
    state, _ = run(9)  # after a restart the old best one is still known
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 9]
    assert float(best_state(tmp_path, state, counting())["sum"]) == 6.0
    run_steps(add, start, counting(), steps=1, directory=tmp_path / "x", checkpoint_every=1)
    with pytest.raises(sj.CheckpointError, match="has a score; evaluate while training"):
        best_state(tmp_path / "x", state, counting())


def test_placement_and_amounts(tmp_path):
    devices = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def put(tree):
        return jax.tree.map(lambda leaf: jax.device_put(leaf, devices), tree)

    seen = []

    class Watch:
        def step(self, step, metrics):
            seen.append((step, float(metrics["loss"])))

        def logged(self, records):
            seen.append([r["step"] for r in records])

    def run(steps):
        return run_steps(
            add, lambda: put(start()), counting(), steps=steps, directory=tmp_path, checkpoint_every=2,
            per_step={"tokens": 64}, monitor=Watch(), place=put,
        )  # fmt: skip

    state, log = run(2)
    assert state["sum"].committed
    assert log[-1]["tokens_per_second"] == pytest.approx(64 * log[-1]["steps_per_second"])
    assert seen == [[], (1, 0.0), (2, 1.0), [1, 2]]
    assert run(3)[0]["sum"].committed  # restored where it was


def refusal(function, *arguments):
    """The message of the CheckpointError that it raises; None where it does not."""
    try:
        function(*arguments)
    except sj.CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_called_so(tmp_path, how):
    """Whichever of its files it is; the message says where the run then goes on, and it does."""

    def run(steps, directory):
        return run_steps(add, start, counting(), steps=steps, directory=directory, checkpoint_every=3, keep=3)

    run(6, tmp_path / "whole")
    files = [f for f in (tmp_path / "whole" / "checkpoints" / "6").rglob("*") if f.is_file() and f.stat().st_size]
    refused = 0
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", directory)
        damaged = directory / file.relative_to(tmp_path / "whole")
        if how == "missing":
            damaged.unlink()
        else:
            damaged.write_bytes(b"" if how == "empty" else damaged.read_bytes()[: damaged.stat().st_size // 2])
        told = refusal(run, 9, directory)
        if told is not None:
            refused += 1
            assert re.search(
                r"checkpoint 6 in .* is damaged.*Remove the folder .*6, and .* goes on from checkpoint 3", told
            )
            shutil.rmtree(directory / "checkpoints" / "6")
            assert float(run(9, directory).state["sum"]) == sum(range(9))
    assert refused >= 3  # the others repeat what can be read elsewhere


def test_the_only_checkpoint_damaged(tmp_path):
    run_steps(add, start, counting(), steps=3, directory=tmp_path, checkpoint_every=3)
    (tmp_path / "checkpoints" / "3" / "state" / "_METADATA").unlink()
    with pytest.raises(sj.CheckpointError, match=r"is damaged.*and the same command begins again"):
        run_steps(add, start, counting(), steps=6, directory=tmp_path, checkpoint_every=3)
