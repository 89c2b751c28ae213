"""Scale: eight devices, or two processes, train as one device does; checkpoints move between meshes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import scale_job
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import specjax as sj
from specjax.heads import init_heads
from specjax.training import mesh
from specjax.training.lora import init_lora, lora_shardings
from specjax.training.mesh import HostsConfig, MeshConfig
from specjax.training.optimiser import build

JOB = Path(scale_job.__file__)
LORA = scale_job.SETTINGS.lora
MESHES = ("8x1", "4x2", "2x4")


def start(devices: int, *arguments: object) -> subprocess.Popen[str]:
    """A process of the job with simulated CPU devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, str(JOB), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def coordinator() -> str:
    """An address that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def finish(processes: list[subprocess.Popen[str]]) -> list[list[dict]]:
    """The JSON lines of every process; all are ended when one fails or takes ten minutes."""
    try:
        done = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    return [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in done]


def is_adam(part):
    """Adam's own state, with its moments."""
    return isinstance(part, optax.ScaleByAdamState)


def losses(log):
    """The loss of every step, with its parts."""
    steps = [record for record in log if "loss" in record]
    return np.array([[r["loss"], r["backbone"], *r["losses"]] for r in steps])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run on one device, in this process."""
    fitted = scale_job.run(tmp_path_factory.mktemp("single") / "run", MeshConfig(1, 1))
    assert losses(fitted.log).shape == (scale_job.STEPS, 4)
    assert np.ptp(losses(fitted.log)[:, 0]) > 0.1  # it learns something
    return fitted


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The runs on eight simulated devices: a record per mesh, and the directory with their checkpoints."""
    directory = tmp_path_factory.mktemp("eight")
    jobs = [f"{shape}:{shape}" for shape in MESHES] + ["4x2:2x4"]  # the last one finds another mesh's checkpoint
    (records,) = finish([start(8, directory, " ".join(jobs))])
    return {record["job"]: record for record in records}, directory


@pytest.mark.full
@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_give_the_losses_of_one(single, eight, shape):
    record = eight[0][f"{shape}:{shape}"]
    assert record["devices"] == 8
    np.testing.assert_allclose(losses(record["log"]), losses(single.log), rtol=0, atol=1e-5)
    ours, theirs = (next(r["eval"] for r in log[::-1] if "eval" in r) for log in (record["log"], single.log))
    np.testing.assert_allclose(ours["hits"], theirs["hits"], atol=1e-5)
    assert ours["backbone"] == pytest.approx(theirs["backbone"], abs=1e-5)
    assert ours["tokens_per_round"] == pytest.approx(theirs["tokens_per_round"], abs=1e-5)
    np.testing.assert_allclose(ours["losses"], theirs["losses"], atol=2e-5)  # rounded to five places


@pytest.mark.full
def test_two_processes_give_the_losses_of_one(single, tmp_path):
    at = coordinator()
    both = finish([start(1, tmp_path, "run:2x1", at, 2, i) for i in range(2)])
    for ((record,),) in zip(both, strict=True):
        assert record["devices"] == 2
        np.testing.assert_allclose(losses(record["log"]), losses(single.log), rtol=0, atol=1e-5)
        assert record["digest"] == both[0][0]["digest"]
    again = scale_job.run(tmp_path / "run", MeshConfig(1, 1))  # one device reads what the two saved together
    assert scale_job.digest(again) == both[0][0]["digest"]
    assert again.log == both[0][0]["log"]


@pytest.mark.full
def test_hosts_with_disks_of_their_own_are_told_so(tmp_path):
    """One name, two disks: both processes stop before the first step."""
    roots = [tmp_path / name for name in ("here", "there")]
    at = coordinator()
    both = [start(1, root, "run:2x1", at, 2, i) for i, root in enumerate(roots)]
    try:
        said = [process.communicate(timeout=600)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert all(process.returncode != 0 for process in both)
    assert all("processes [1] do not see what process 0 wrote to" in errors for errors in said), said
    assert not any((root / "run" / "log.jsonl").exists() for root in roots)


@pytest.mark.full
def test_a_checkpoint_of_one_mesh_is_restored_on_others(eight):
    """Saved under (4, 2), restored under (2, 4) and on this process's one device, where nothing is left to do."""
    records, directory = eight
    saved, moved = records["4x2:4x2"], records["4x2:2x4"]
    assert (moved["digest"], moved["log"]) == (saved["digest"], saved["log"])
    assert moved["digest"] != records["2x4:2x4"]["digest"]  # sums in another order end in other bits
    here = scale_job.run(directory / "4x2", MeshConfig(1, 1))
    assert (scale_job.digest(here), here.log) == (saved["digest"], saved["log"])


def test_what_is_split_and_what_is_whole():
    """Moments lie as their parameters do; projections split over the vocabulary; counters are everywhere."""
    on = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights, heads = scale_job.target()
    where = {"heads": mesh.head_shardings(heads, on), "lora": lora_shardings(scale_job.CONFIG, LORA, on)}
    assert where["heads"]["projection_1"].spec == P("model", None)
    assert where["heads"]["kernel_0"].spec == P(None, None, None)
    layer = where["lora"].layers[0]
    assert (layer.q.a.spec, layer.q.b.spec) == (P(None, None), P("model", None, None, None))
    assert (layer.out.a.spec, layer.out.b.spec) == (P(None, "model", None, None), P(None, None))
    assert (layer.down.a.spec, layer.up.b.spec) == (P(None, "model"), P("model", None))
    optimiser = build(scale_job.SETTINGS, 20, {"lora": 0.5})
    trained = {"heads": heads.params, "lora": init_lora(jax.random.key(0), scale_job.CONFIG, LORA)}
    state = mesh.optimiser_shardings(optimiser, trained, where, on)
    adam = next(part for part in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(part))
    assert adam.mu == where
    assert adam.nu == where
    assert adam.count.spec == P()
    assert state["params"] == state["ema"].ema == state["opt"].acc_grads == where
    assert state["step"].spec == P()
    shared = init_heads(sj.MedusaConfig(2, 32, 64, projection="shared"), weights)
    assert set(mesh.head_shardings(shared, on)) == {"kernel_0", "bias_0"}


def test_refusals():
    with pytest.raises(sj.ConfigError, match="mesh of 64 x 2 needs 128 devices"):
        MeshConfig(64, 2).build()
    with pytest.raises(sj.ConfigError, match="mesh's model is 0"):
        MeshConfig(1, 0)
    on = AbstractMesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(sj.ConfigError, match="V of size 64 does not divide over mesh axis 'model' of size 3"):
        mesh.head_shardings(scale_job.target()[1], on)
    with pytest.raises(sj.ConfigError, match="batch of 3 rows does not divide over mesh axis 'data' of size 2"):
        mesh.check_rows(3, on)
    for bad in (
        {"processes": 2},
        {"coordinator": "here"},
        {"coordinator": "h:1"},
        {"coordinator": "auto", "processes": 2},
    ):
        with pytest.raises(sj.ConfigError, match=r"coordinator|process_id"):
            HostsConfig(**bad)
    with pytest.raises(sj.ConfigError, match="from 0 up to below"):
        HostsConfig("h:1", 2, 2)
    with pytest.raises(sj.ConfigError, match="cannot be joined"):  # the devices are up
        HostsConfig("127.0.0.1:1", 2, 1).join()
