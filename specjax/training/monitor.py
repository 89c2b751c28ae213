"""What a training run shows while it runs: a live line on the terminal, and TensorBoard event files."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

EVENTS = "tensorboard"  # the folder of the event files
_SECONDS = 0.5  # between two updates of the live line: reading a loss waits for its step


class RunMonitor:
    """A `steps.Monitor`, to be used as a context: `with RunMonitor(...) as monitor: train(..., monitor=monitor)`.

    The line has the step, the mean loss, how good it was at the last evaluation (head 1's top-1 accuracy, a draft
    model's acceptance), tokens per second and the time that is left. The events have every number of the log, under its
    path in a record (`eval/accuracy/top1/head_1`).
    A resumed run writes the whole log once more, with the same values.

    Args:
      directory: the run's; events go into its folder `tensorboard`.
      console: where the line is drawn.
      steps: of the whole run.
      tokens_per_step: for the tokens per second.
    """

    def __init__(self, directory: Path, console: Console, *, steps: int, tokens_per_step: float) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[quality]}  {task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._writer = SummaryWriter(str(directory / EVENTS))
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("training", total=steps, loss="-", quality="", rate="-")
        self._tokens, self._shown = tokens_per_step, (time.perf_counter(), 0)

    def __enter__(self) -> "RunMonitor":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._writer.close()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Draws the line anew, if it has been long enough."""
        now, (then, before) = time.perf_counter(), self._shown
        if before and now - then < _SECONDS:
            return
        loss = float(metrics["loss"])  # waits for the step
        now = time.perf_counter()
        rate = f"{self._tokens * (step - before) / (now - then):,.0f}" if before else "-"  # the first step compiles
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
        self._shown = now, step

    def logged(self, records: list[dict[str, Any]]) -> None:
        """Writes the records as events."""
        for record in records:
            for tag, value in _scalars(record):
                if tag != "step":
                    self._writer.add_scalar(tag, value, record["step"])
            if "loss" in record:
                self._progress.update(self._task, loss=f"{record['loss']:.3f}")
            if "tokens_per_second" in record:
                self._progress.update(self._task, rate=f"{record['tokens_per_second']:,.0f}")
            if "eval" in record:
                self._show(record["eval"])
            self._progress.update(self._task, completed=record["step"])
        self._writer.flush()
        self._shown = time.perf_counter(), self._shown[1] and max(self._shown[1], records[-1]["step"])

    def _show(self, found: Mapping[str, Any]) -> None:
        top1 = found.get("accuracy", {}).get("top1")
        if top1:
            self._progress.update(self._task, quality=f"top-1 {top1[0]:.3f}")
        elif "acceptance" in found:
            self._progress.update(self._task, quality=f"acceptance {found['acceptance']:.3f}")


def evaluation_line(entry: Mapping[str, Any]) -> str:
    """An evaluation of the log in one line."""
    found = entry["eval"]
    if "accuracy" not in found:
        return f"step {entry['step']}: {json.dumps(found)}"
    backbone = f", backbone loss {found['backbone']:.4f}" if "backbone" in found else ""
    return (
        f"step {entry['step']}: top-1 {found['accuracy']['top1']}, top-3 {found['accuracy']['top3']}, "
        f"loss {[round(x, 3) for x in found['losses']]}, {found['tokens_per_round']:.3f} tokens per round{backbone}"
    )


def throughput(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last amounts by the second in a log."""
    return {k: v for entry in log if "loss" in entry for k, v in entry.items() if k.endswith("_per_second")}


def _scalars(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    # Every number in a record with its path; lists are by head.
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _scalars(part, f"{path}/{name}" if path else str(name))
    elif isinstance(value, list):
        for i, part in enumerate(value, 1):
            yield from _scalars(part, f"{path}/{'rank' if 'head_' in path else 'head'}_{i}")
    elif isinstance(value, (int, float)):
        yield path, float(value)


def warn_of_other_backbone(console: Console, wrong: str | None) -> None:
    """Says what `backbone_of` finds wrong with heads to go on from, if anything: they can be a start all the same."""
    if wrong is not None:
        console.print(f"[yellow]{escape(wrong)} As it is, they are a start for heads of this model.[/]")


def warn_if_worse(
    console: Console, log: Sequence[dict[str, Any]], judgement: dict[str, Any], start_from: str, remedy: str = ""
) -> None:
    """Says so where heads that went on from others commit fewer tokens a round than those did.

    Args:
      log: begins with the evaluation before the first step.
      judgement: the evaluation of the heads that are exported.
      remedy: a further one, to stand before the others.
    """
    began, ended = log[0]["eval"]["tokens_per_round"], judgement["tokens_per_round"]
    if ended < began:
        console.print(
            f"[yellow]On the held-out text these heads commit {ended:.4f} tokens a round, those of {start_from} "
            f"{began:.4f}: try {remedy}a lower learning rate, or more text.[/]"
        )
