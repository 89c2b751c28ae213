"""The tree-search experiment: from rank tables to a tree, checked by decoding with it on this machine."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from specjax.analysis import rank_plots
from specjax.analysis.ranks import RankTable, measure
from specjax.analysis.round_time import RoundTimes, time_rounds
from specjax.analysis.search import SEARCHES, Limits
from specjax.analysis.simulate import simulate, upper_bound
from specjax.analysis.texts import greedy_answers
from specjax.analysis.tree_plot import draw_tree
from specjax.bench import Contender, Request, compare, environment
from specjax.drafters.base import NoDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.errors import ConfigError
from specjax.loading.heads import load_heads, packaged_ranks
from specjax.loading.load import load_model
from specjax.prompts import load_prompts
from specjax.tree import Tree


@dataclass(frozen=True)
class TreeSearch:
    """Searches on a rank table, and checks the trees on the model's own answers to prompts."""

    name: str
    model: str
    heads: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ranks: str | None = None  # the table to search on; None: the one that lies beside the heads
    prompts: str | None = None  # Spec-Bench JSONL to check on; None: the ones that ship with specjax
    max_new_tokens: int = 128
    sizes: tuple[int, ...] = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    timed_sizes: tuple[int, ...] = (2, 4, 6, 8, 12, 16)  # decoded with, to check the prediction
    timed_prompts: int = 10
    repeats: int = 2

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Writes the rank tables, the chosen tree and the figures to `output_dir`, and gives the result."""
        model = load_model(self.model, dtype=self.dtype)
        heads = load_heads(self.heads, model.config, dtype=self.dtype)
        path = self.ranks or packaged_ranks(self.heads)
        if path is None:
            raise ConfigError(f"no rank table lies beside {self.heads}; make one with `specjax tree measure`.")
        searched = RankTable.load(path).check(model, heads)
        with console.status("measuring ranks"):
            prompts = load_prompts(self.prompts)
            texts = greedy_answers(model, prompts, max_new_tokens=self.max_new_tokens)
            checked = measure(model, heads, [text for text in texts if len(text.answer) > 1], cap=searched.cap)
        checked.save(output_dir / "check.ranks.npz")

        trees = {name: [search(searched, n, Limits()) for n in self.sizes] for name, search in SEARCHES.items()}
        rows: list[dict[str, Any]] = [
            {
                "search": name,
                "nodes": tree.size,
                "searched": found.tokens_per_round,
                "checked": other.tokens_per_round,
            }
            for name, family in trees.items()
            for tree, found, other in zip(family, simulate(searched, family), simulate(checked, family), strict=True)
        ]
        bounds = {
            "searched": [upper_bound(searched, d) for d in range(1, searched.num_heads + 1)],
            "checked": [upper_bound(checked, d) for d in range(1, checked.num_heads + 1)],
        }
        with console.status("timing rounds"):
            family = [Tree.chain(0), *trees["walk"]]
            prompt = np.concatenate([texts[0].prompt, texts[0].answer]).tolist()[:128]
            taken = time_rounds(model, heads, family, prompt, repeats=5)
        times = RoundTimes(tuple(t.size for t in family), tuple(row["median"] for row in taken))
        simulated = {row["nodes"]: row["searched"] for row in rows if row["search"] == "walk"}
        predicted = {n: times.speedup(n, tokens) for n, tokens in simulated.items()}
        best = max(predicted, key=predicted.__getitem__)
        chosen = next(tree for tree in trees["walk"] if tree.size == best)
        chosen.save(output_dir / "tree.json")

        step = max(1, len(texts) // self.timed_prompts)
        requests = [Request(tuple(int(t) for t in text.prompt), text.category) for text in texts[::step]]
        timed = [tree for tree in trees["walk"] if tree.size in self.timed_sizes or tree is chosen]
        contenders = [Contender("autoregressive", model, NoDrafter())]
        contenders += [Contender(f"walk_{t.size}", model, MedusaDrafter(heads, t)) for t in timed]
        with console.status("decoding, to check the prediction"):
            measured = compare(contenders, requests, max_new_tokens=self.max_new_tokens, repeats=self.repeats)
        speed = {m["tree_nodes"]: m["speedup"]["median"] for m in measured[1:]}
        self._show(console, rows, predicted, speed, best)
        self._figures(output_dir, searched, checked, rows, bounds, predicted, measured, chosen)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "text": {"searched": dict(searched.manifest), "checked": dict(checked.manifest)},
            "rows": rows,
            "upper_bounds_by_depth": bounds,
            "round_times": [{"nodes": n.size, "milliseconds": ms} for n, ms in zip(family, taken, strict=True)],
            "predicted_speedup": predicted,
            "measured": measured,
            "chosen_nodes": best,
            "chosen_speed_against_the_measured_best": speed[best] / max(speed.values()),
        }

    def _show(
        self,
        console: Console,
        rows: Sequence[dict[str, Any]],
        predicted: dict[int, float],
        speed: dict[int, float],
        best: int,
    ) -> None:
        table = Table(title=f"{self.name}: tokens per round on other text, simulated; speed-up of the walk trees")
        for column in ("nodes", *SEARCHES, "predicted", "measured"):
            table.add_column(column, justify="right")
        for n in self.sizes:
            cells = [f"{next(r['checked'] for r in rows if (r['search'], r['nodes']) == (s, n)):.3f}" for s in SEARCHES]
            table.add_row(str(n), *cells, f"{predicted[n]:.2f}", f"{speed[n]:.2f}" if n in speed else "")
        console.print(table)
        console.print(f"chosen: {best} nodes, measured at {speed[best] / max(speed.values()):.2f} of the best")

    def _figures(
        self,
        output_dir: Path,
        searched: RankTable,
        checked: RankTable,
        rows: Sequence[dict[str, Any]],
        bounds: dict[str, list[float]],
        predicted: dict[int, float],
        measured: Sequence[dict[str, Any]],
        chosen: Tree,
    ) -> None:
        def save(name: str, figure: Any) -> None:
            figure.savefig(output_dir / f"{name}.png", dpi=130)

        save("rank_heatmap", rank_plots.rank_heatmap(checked))
        save("accuracy_by_head", rank_plots.accuracy_by_head(checked))
        save("accuracy_by_category", rank_plots.accuracy_by_category(checked))
        save("calibration", rank_plots.calibration(checked))
        curves = {s: [(r["nodes"], r["checked"]) for r in rows if r["search"] == s] for s in SEARCHES}
        limits = {f"infinite tree of depth {d}": value for d, value in enumerate(bounds["checked"], 1)}
        save("tokens_against_nodes", rank_plots.tokens_against_nodes(curves, limits))
        speed = [(m["tree_nodes"], m["speedup"]["median"]) for m in measured[1:]]
        save(
            "speedup_against_nodes",
            rank_plots.speedup_against_nodes({"predicted": list(predicted.items()), "measured": speed}),
        )
        simulated = {r["nodes"]: r["checked"] for r in rows if r["search"] == "walk"}
        pairs = {"tokens per round": [(simulated[m["tree_nodes"]], m["tokens_per_round"]) for m in measured[1:]]}
        save("predicted_against_measured", rank_plots.predicted_against_measured(pairs, "Tokens per round"))
        axes = draw_tree(chosen, edge_values=rank_plots.edge_acceptance(checked, chosen).tolist())
        save("tree", axes.figure)


def packaged_trees(heads: str, sizes: Sequence[int]) -> list[tuple[Tree, float]] | None:
    """The best trees with their simulated tokens per round, from the rank table that lies beside shipped heads.

    None where there is no table: `specjax tree measure` makes one for other heads.
    """
    path = packaged_ranks(heads)
    if path is None:
        return None
    table = RankTable.load(path)
    trees = [SEARCHES["walk"](table, size, Limits()) for size in sizes]
    return [(one.tree, one.tokens_per_round) for one in simulate(table, trees)]
