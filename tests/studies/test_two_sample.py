"""The two-sample test itself: it accepts equal laws and rejects small differences."""

import json

import numpy as np
import pytest
from rich.console import Console

import specjax as sj
from specjax.studies.runner import run_config
from specjax.studies.two_sample import TwoSample, p_value


def draws(seed, n, tilt=0.0):
    """Continuations of three tokens, partly frequent, partly all different."""
    rng = np.random.default_rng(seed)
    law = np.array([0.4, 0.3, 0.2, 0.1]) + tilt * np.array([1, -1, 0, 0])
    common = rng.choice(4, (n, 3), p=law)
    rare = rng.integers(0, 8192, (n, 3))
    return np.where(rng.random((n, 1)) < 0.7, common, rare)


def test_equal_laws_give_uniform_p_values():
    values = [p_value(draws(2 * i, 4000), draws(2 * i + 1, 4000)) for i in range(60)]
    assert 0.3 < np.mean(values) < 0.7
    assert min(values) > 1e-4
    assert np.mean(np.array(values) < 0.1) < 0.25


def test_a_small_difference_is_rejected():
    assert p_value(draws(0, 20_000), draws(1, 20_000, tilt=0.02)) < 1e-3
    shifted = draws(1, 20_000)
    shifted[:, 2] = shifted[:, 1]  # the marginals of the first two tokens are right
    assert p_value(draws(0, 20_000), shifted) < 1e-6


def test_an_experiment_end_to_end(checkpoint, tmp_path):
    experiment = TwoSample(
        name="tiny", model=str(checkpoint), prompt="ab", drafters=(("ngram", "chain:2"), ("medusa", "cartesian:2,1")),
        heads=str(checkpoint / "heads" / "heads.safetensors"), samples=300, length=2, batch_size=100,
    )  # fmt: skip
    assert run_config(experiment, tmp_path / "out", Console(quiet=True)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["drafter"] for row in result["rows"]] == ["autoregressive", "ngram", "medusa"]
    assert all(row["p_value"] > 1e-3 for row in result["rows"])
    assert result["distinct_continuations"] > 10


def test_refusals():
    with pytest.raises(sj.DataError, match="cannot be compared"):
        p_value(draws(0, 10), draws(0, 10)[:, :2])
    with pytest.raises(sj.DataError, match="draw more"):
        p_value(np.arange(9).reshape(3, 3), np.arange(9).reshape(3, 3))
