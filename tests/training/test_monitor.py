"""The live line of a training run."""

import io

from rich.console import Console

from specjax.training.monitor import RunMonitor


def test_the_line_ends_with_the_last_loss_and_evaluation(tmp_path):
    """A run that is shorter than the time between two updates draws its first step alone, until it is logged."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200)
    with RunMonitor(tmp_path, console, steps=3, tokens_per_step=8) as monitor:
        for step, loss in enumerate((4.0, 3.0, 2.5), 1):
            monitor.step(step, {"loss": loss})
        monitor.logged([
            *({"step": step, "loss": loss} for step, loss in enumerate((4.0, 3.0, 2.5), 1)),
            {"step": 3, "eval": {"accuracy": {"top1": [0.625]}}},
        ])  # fmt: skip
    last = [line for line in screen.getvalue().splitlines() if "tokens/s" in line][-1]
    assert "3/3" in last
    assert "loss 2.500  top-1 0.625" in last
