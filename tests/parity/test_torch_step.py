"""Our training step and PyTorch's plain one do the same work: the same losses, step by step."""

import io

import pytest
from rich.console import Console

from specjax.studies.torch_step import TorchStep


@pytest.mark.full
def test_both_sides_take_the_same_steps(checkpoint, tmp_path):
    config = TorchStep(
        name="x", model=str(checkpoint), reduced_vocab_size=200, num_heads=3, batch_size=96, steps=6, repeats=2,
        learning_rate=2e-2,
    )  # fmt: skip
    rows = config.run(tmp_path, Console(file=io.StringIO()))["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert rows[0]["loss_gap"] < 1e-4
    assert rows[1]["loss_gap"] < 1e-2
    for row in rows:
        assert 0 < row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
