"""The README's figure, from two records: `make figures`."""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from specjax.report.records import Record
from specjax.report.style import BLUE, DPI, INK, drafter_style, plain, wrapped

DRAFTERS = Path("compare_drafters_smollm2") / "zen3-2026-11-27.json"
SEARCHES = (
    Path("tree_search_smollm2") / "zen3-2026-11-27.json",
    Path("tree_search_smollm2") / "xeon-amx-2026-11-27-first-heads.json",
)


def headline(drafters: Record, searches: list[Record]) -> Figure:
    """Tokens per round by drafter, and the speed-up of Medusa trees against their nodes, machines named."""
    figure = Figure(figsize=(9.4, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    methods: list[dict[str, Any]] = [m for m in drafters.result["methods"] if m["temperature"] == 0]
    for row, method in enumerate(methods):
        left.barh(
            row, method["tokens_per_round"], 0.66, **drafter_style(method["name"], method["tree_nodes"], "float32")
        )
        told = f"{method['tokens_per_round']:.2f} ({method['accepted_per_round']:.2f})"
        left.annotate(
            told, (method["tokens_per_round"], row), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    left.set_yticks(range(len(methods)), [wrapped(f"{m['name']}, {m['tree_nodes']}") for m in methods], fontsize=8)
    left.set_ylim(len(methods) - 0.5, -0.5)
    left.set_xlim(0, 2.2)
    left.set_xticks([0, 0.5, 1, 1.5, 2])
    left.set_xlabel(f"tokens per round (of them drafts), greedy, {drafters.result['prompts']} prompts", fontsize=9)
    left.set_title("What a target forward commits (drafter, nodes)", loc="left", fontsize=10)
    right.axhline(1.0, color=INK, lw=1, label="autoregressive, same dtype")
    for record, colour, mark in zip(searches, (BLUE, "#e08a1e"), ("o", "s"), strict=True):
        rows = [row for row in record.result["measured"] if "speedup" in row]
        nodes, found = [row["tree_nodes"] for row in rows], [row["speedup"] for row in rows]
        config = record.result["config"]
        label = f"{record.machine}, {config.get('dtype', 'float32')}, {record.result['prompts']} prompts"
        if "first-heads" in record.name:
            label += ", earlier heads"
        right.plot(nodes, [s["median"] for s in found], color=colour, marker=mark, ms=5, label=label)
        right.fill_between(nodes, [s["min"] for s in found], [s["max"] for s in found], color=colour, alpha=0.16, lw=0)
    right.set_xlabel("nodes of the Medusa tree (root included)", fontsize=9)
    right.set_title("What that is worth: speed-up, median and range", loc="left", fontsize=10)
    for axes, grid in ((left, "x"), (right, "y")):
        plain(axes, grid)
        axes.tick_params(labelsize=8)
    figure.legend(loc="outside lower right", frameon=False, fontsize=8, ncols=3)
    return figure


def main() -> None:
    """Draws docs/assets/headline.png below the folder that is named, or this one."""
    root = Path(sys.argv[1] if sys.argv[1:] else ".")
    drafters, *searches = (
        Record(path.stem, json.loads((root / "experiments" / "records" / path).read_text("utf-8")))
        for path in (DRAFTERS, *SEARCHES)
    )
    (root / "docs" / "assets").mkdir(parents=True, exist_ok=True)
    headline(drafters, searches).savefig(root / "docs" / "assets" / "headline.png", dpi=DPI)


if __name__ == "__main__":
    main()
