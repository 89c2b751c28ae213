"""Figures of a training log, drawn without touching matplotlib's global state."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from specjax.report.style import BLUE, DPI, legend_outside, new_axes, series

Log = Sequence[dict[str, Any]]


def _axes(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = new_axes(title, "step", ylabel, grid="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _split(log: Log) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [r for r in log if "loss" in r], [r for r in log if "eval" in r]


def loss_per_head(log: Log) -> Figure:
    """Training loss of every step, thin, and held-out loss at every evaluation, with marks; one colour per head."""
    steps, evaluations = _split(log)
    told = "Loss per head: training (thin), held out (marks)" if steps else "Held-out loss per head"
    figure, axes = _axes(told, "nats per token")
    for i in range(len(evaluations[0]["eval"]["losses"])):
        colour = series(i)["color"]
        axes.plot([r["step"] for r in steps], [r["losses"][i] for r in steps], color=colour, lw=0.7, alpha=0.6)
        at = [r["step"] for r in evaluations]
        axes.plot(at, [r["eval"]["losses"][i] for r in evaluations], label=f"head {i + 1}", **series(i))
    legend_outside(figure)
    return figure


def accuracy_per_head(log: Log) -> Figure:
    """Top-1 accuracy, solid, and top-3, dashed, on held-out text."""
    _, evaluations = _split(log)
    figure, axes = _axes("Held-out accuracy per head: top-1, top-3 (dashed)", "share of positions")
    at = [r["step"] for r in evaluations]
    for i in range(len(evaluations[0]["eval"]["losses"])):
        top1, top3 = ([r["eval"]["accuracy"][k][i] for r in evaluations] for k in ("top1", "top3"))
        axes.plot(at, top1, label=f"head {i + 1}", **series(i))
        axes.plot(at, top3, ls="--", lw=1, **{**series(i), "ms": 3})
    axes.set_ylim(0, 1)
    legend_outside(figure)
    return figure


def tokens_per_round(log: Log, tree: str) -> Figure:
    """What decoding the held-out text with `tree` would commit per target forward."""
    _, evaluations = _split(log)
    figure, axes = _axes(f"Tokens per target forward with {tree} (1 = autoregressive)", "tokens per round")
    axes.plot([r["step"] for r in evaluations], [r["eval"]["tokens_per_round"] for r in evaluations], **series(0))
    axes.axhline(1.0, color="black", lw=0.8)
    return figure


def backbone_loss(log: Log) -> Figure:
    """Medusa-2's backbone loss: of every step, thin, and held out at every evaluation, with marks."""
    steps, evaluations = _split(log)
    figure, axes = _axes("Backbone loss: training (thin), held out (marks)", "nats per token")
    axes.plot([r["step"] for r in steps], [r["backbone"] for r in steps], color=BLUE, lw=0.7, alpha=0.6)
    axes.plot([r["step"] for r in evaluations], [r["eval"]["backbone"] for r in evaluations], **series(0))
    return figure


def learning_rate(log: Log) -> Figure:
    """The schedule, as it was."""
    steps, _ = _split(log)
    figure, axes = _axes("Learning rate", "learning rate")
    axes.plot([r["step"] for r in steps], [r["learning_rate"] for r in steps], color=BLUE)
    return figure


def draft_losses(log: Log) -> Figure:
    """A draft's divergence from the target and its loss on the text at every step; the latter held out too, marks."""
    steps, evaluations = _split(log)
    figure, axes = _axes("Divergence and text loss: training (thin); held-out text (marks)", "nats per token")
    for number, name in enumerate(("divergence", "text")):
        colour = series(number)["color"]
        axes.plot([r["step"] for r in steps], [r[name] for r in steps], color=colour, lw=0.7, alpha=0.6, label=name)
    at = [r["step"] for r in evaluations]
    axes.plot(at, [r["eval"]["text"] for r in evaluations], **series(1))
    legend_outside(figure)
    return figure


def draft_acceptance(log: Log) -> Figure:
    """How often the target would take a draft's token on held-out text: sampled at temperature 1, and greedy."""
    _, evaluations = _split(log)
    figure, axes = _axes("Held-out acceptance, one token ahead", "share of positions")
    at = [r["step"] for r in evaluations]
    for number, (name, label) in enumerate((("acceptance", "sampled, temperature 1"), ("agreement", "greedy"))):
        axes.plot(at, [r["eval"][name] for r in evaluations], label=label, **series(number))
    axes.set_ylim(0, 1)
    legend_outside(figure)
    return figure


def save_draft_figures(log: Log, directory: Path) -> list[str]:
    """Writes loss.png, acceptance.png and learning_rate.png; gives their names."""
    return _save(
        {
            "loss.png": draft_losses(log),
            "acceptance.png": draft_acceptance(log),
            "learning_rate.png": learning_rate(log),
        },
        directory,
    )


def save_training_figures(log: Log, directory: Path, tree: str) -> list[str]:
    """Writes loss.png, accuracy.png, tokens_per_round.png, learning_rate.png and, of Medusa-2, backbone.png.

    Gives their names.
    """
    figures = {
        "loss.png": loss_per_head(log),
        "accuracy.png": accuracy_per_head(log),
        "tokens_per_round.png": tokens_per_round(log, tree),
        "learning_rate.png": learning_rate(log),
    }
    if "backbone" in log[-1].get("eval", {}):
        figures["backbone.png"] = backbone_loss(log)
    return _save(figures, directory)


def _save(figures: dict[str, Figure], directory: Path) -> list[str]:
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=DPI)
    return list(figures)
