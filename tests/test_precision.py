"""The same numbers under other settings of JAX: 64-bit types, and no implicit promotion of dtypes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import precision_job
import pytest

X64, STRICT = {"JAX_ENABLE_X64": "1"}, {"JAX_NUMPY_DTYPE_PROMOTION": "strict"}


def run(settings, *arguments):
    """The job's outcomes in a process with these settings, compiled as the tests are."""
    job = Path(precision_job.__file__)
    path = os.pathsep.join([str(job.parents[1]), str(job.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(job), *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path} | settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plain():
    assert not jax.config.jax_enable_x64
    assert jax.config.jax_numpy_dtype_promotion == "standard"
    return json.loads(json.dumps(precision_job.decoded()))


@pytest.mark.full  # 20 seconds each
@pytest.mark.parametrize("settings", [X64 | STRICT, X64, STRICT])
def test_decoding_and_ranks_are_the_same(plain, settings):
    assert run(settings) == plain


@pytest.mark.full
def test_training_is_nearly_the_same():
    """Schedules are computed in float64 there. (optax itself needs implicit promotion.)"""
    found, plain = run(X64, "train"), run({}, "train")
    for name, losses in plain.items():
        assert found[name] == pytest.approx(losses, rel=1e-3), name
