"""The tree-search experiment: from rank tables to a tree, checked by decoding with it on this machine."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from specjax.corpus.prompts import load_prompts
from specjax.corpus.texts import greedy_answers, per_category
from specjax.decode import capacity_for
from specjax.drafters.base import NoDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint, text_fingerprint
from specjax.heads import Heads
from specjax.journal import Journal
from specjax.loading.head_files import heads_for, packaged_ranks
from specjax.loading.load import Model, load_model
from specjax.ranks.measuring import measure
from specjax.ranks.simulation import Simulation, simulate, upper_bound
from specjax.ranks.table import RankTable
from specjax.ranks.validate import SEARCHES, search_trees
from specjax.report import rank_figures as rank_plots
from specjax.report.tree_figure import draw_tree
from specjax.stopping import Stopped
from specjax.studies.compare import Contender, Request, compare
from specjax.studies.round_time import RoundTimes, time_rounds
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
    timed_per_category: int = 2  # prompts of each category to decode
    repeats: int = 2

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Writes the rank tables, the chosen tree and the figures to `output_dir`, and gives the result."""
        self._check()
        model = load_model(self.model, dtype=self.dtype)
        heads = heads_for(model, self.heads, dtype=self.dtype)
        path = self.ranks or packaged_ranks(self.heads)
        if path is None:
            raise ConfigError(f"no rank table lies beside {self.heads}; make one with `specjax tree measure`.")
        searched = RankTable.load(path).check(model, heads, any_dtype=True)  # its ranks are nearly these
        prompts = load_prompts(self.prompts)
        weights = {"model": fingerprint(model.params), "heads": fingerprint((heads.params, heads.token_map))}
        told = text_fingerprint(repr(prompts))
        journal = Journal.of(self, output_dir, **weights, searched=dict(searched.manifest), prompts=told)
        with console.status("measuring ranks"):
            texts = greedy_answers(model, prompts, max_new_tokens=self.max_new_tokens, journal=journal)
            texts = [text for text in texts if len(text.answer) > 1]
            checked = measure(model, heads, texts, cap=searched.cap, journal=journal)
        if "partial" in checked.manifest:  # what follows needs all of it
            raise Stopped(checked.manifest["partial"])
        checked.save(output_dir / "check.ranks.npz")

        trees = {name: search_trees(searched, self.sizes, search=name) for name in SEARCHES}
        rows = [row for name, found in trees.items() for row in _rows(name, found, checked)]
        bounds = {
            "searched": [upper_bound(searched, d) for d in range(1, searched.num_heads + 1)],
            "checked": [upper_bound(checked, d) for d in range(1, checked.num_heads + 1)],
        }
        family = [one.tree for one in trees["walk"]]
        sampled = per_category(checked.categories, self.timed_per_category)
        requests = [Request(tuple(int(t) for t in texts[i].prompt), texts[i].category) for i in sampled]
        with console.status("timing rounds"):
            longest = max(len(request.ids) for request in requests)
            capacity = capacity_for(longest, self.max_new_tokens, searched.num_heads)
            prompt = np.concatenate([texts[0].prompt, texts[0].answer]).tolist()[:128]
            rounds = [Tree.chain(0), *family]
            taken = time_rounds(model, heads, rounds, prompt, repeats=5, capacity=capacity, journal=journal)
        place = environment()
        times = RoundTimes((1, *self.sizes), tuple(row["median"] for row in taken), place["device"])
        best = times.fastest(trees["walk"]).tree
        best = replace(best, provenance={**best.provenance, "round_times": asdict(times)})
        best.save(output_dir / "tree.json")

        timed = [tree for tree in family if tree.size in self.timed_sizes or tree.size == best.size]
        contenders = [Contender("autoregressive", model, NoDrafter())]
        contenders += [Contender(f"walk_{tree.size}", model, MedusaDrafter(heads, tree)) for tree in timed]
        with console.status("decoding, to check the prediction"):
            asked: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "repeats": self.repeats}
            measured, decoded, partial = compare(contenders, requests, **asked, journal=journal)
        # Of every tree: predicted from the text that it was searched on, and from the very texts that are decoded.
        same = simulate(checked.select(lambda i: i in set(sampled)), family)
        predictions = [
            {
                "nodes": n,
                "milliseconds": ms,
                "searched_text": _prediction(times, n, found.tokens_per_round),
                "same_text": _prediction(times, n, here.tokens_per_round),
            }
            for n, ms, found, here in zip(self.sizes, taken[1:], trees["walk"], same, strict=True)
        ]
        verdict = _verdict(best.size, measured)
        halves = len(searched.lengths) > 1
        same_kind = {name: _errors(_across(name, self.sizes, searched)) for name in SEARCHES} if halves else {}
        self._show(console, rows, same_kind.get("walk"), predictions, measured, verdict)
        self._figures(output_dir, searched, checked, rows, bounds, predictions, measured, best)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": place,
            "prompts": decoded,
            "partial": partial,
            "text": {"searched": dict(searched.manifest), "checked": dict(checked.manifest)},
            "rows": rows,
            "error_on_same_kind": same_kind,
            "error_on_other_text": {name: _errors([r for r in rows if r["search"] == name]) for name in SEARCHES},
            "upper_bounds_by_depth": bounds,
            "autoregressive_milliseconds": taken[0],
            "predictions": predictions,
            "measured": measured,
            **verdict,
        }

    def _check(self) -> None:
        # Before prompts are answered and rounds timed, which takes minutes.
        if not self.sizes or self.sizes[0] < 2 or any(a >= b for a, b in itertools.pairwise(self.sizes)):
            raise ConfigError(f"sizes is {self.sizes}; expected rising numbers of nodes, the first at least 2.")
        if unknown := sorted(set(self.timed_sizes) - set(self.sizes)):
            raise ConfigError(f"timed_sizes has {unknown}, which sizes {self.sizes} lacks; add them there.")
        if min(self.max_new_tokens - 1, self.timed_per_category, self.repeats) < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}, timed_per_category {self.timed_per_category}, repeats "
                f"{self.repeats}; expected at least 2, 1 and 1."
            )

    def _show(
        self,
        console: Console,
        rows: Sequence[dict[str, Any]],
        same_kind: dict[str, float] | None,
        predictions: Sequence[dict[str, Any]],
        measured: Sequence[dict[str, Any]],
        verdict: dict[str, Any],
    ) -> None:
        table = Table(title=f"{self.name}: tokens per round on other text, simulated; tokens/s of the walk trees")
        for column in ("nodes", *SEARCHES, "predicted", "on the same text", "measured"):
            table.add_column(column, justify="right")
        speed = {m["tree_nodes"]: m["tokens_per_second"]["median"] for m in measured}
        table.add_row("1", *["1.000"] * len(SEARCHES), "", "", f"{speed[1]:.1f}")
        for one in predictions:
            n = one["nodes"]
            cells = [f"{next(r['checked'] for r in rows if (r['search'], r['nodes']) == (s, n)):.3f}" for s in SEARCHES]
            cells += [f"{one[text]['tokens_per_second']:.1f}" for text in ("searched_text", "same_text")]
            table.add_row(str(n), *cells, f"{speed[n]:.1f}" if n in speed else "")
        console.print(table)
        error = _errors([row for row in rows if row["search"] == "walk"])
        if same_kind is not None:
            console.print(
                f"tokens per round on the half of the text that was not searched: {100 * same_kind['mean']:+.1f}% of "
                f"the prediction on average, at most {100 * same_kind['largest']:.1f}% off"
            )
        console.print(
            f"tokens per round on other text than searched: {100 * error['mean']:+.1f}% of the prediction on average, "
            f"at most {100 * error['largest']:.1f}% off"
        )
        gain = verdict["chosen_speed_against_autoregressive"]
        console.print(
            f"chosen: {verdict['chosen_nodes']} nodes, measured at "
            f"{verdict['chosen_speed_against_the_measured_best']:.2f} of the fastest, autoregressive decoding among "
            f"them, and at {gain:.2f} of autoregressive decoding" + ("" if gain > 1 else ": no tree pays here")
        )

    def _figures(
        self,
        output_dir: Path,
        searched: RankTable,
        checked: RankTable,
        rows: Sequence[dict[str, Any]],
        bounds: dict[str, list[float]],
        predictions: Sequence[dict[str, Any]],
        measured: Sequence[dict[str, Any]],
        chosen: Tree,
    ) -> None:
        def save(name: str, figure: Any) -> None:
            figure.savefig(output_dir / f"{name}.png", dpi=130)

        save("rank_heatmap", rank_plots.rank_heatmap(checked))
        save("accuracy_by_head", rank_plots.accuracy_by_head(checked))
        save("accuracy_by_category", rank_plots.accuracy_by_category(checked))
        save("accuracy_by_entropy", rank_plots.accuracy_by_entropy(checked))
        save("calibration", rank_plots.calibration(checked))
        curves = {s: [(r["nodes"], r["checked"]) for r in rows if r["search"] == s] for s in SEARCHES}
        limits = {
            f"any tree of depth {d}, ranks below {checked.cap}": value for d, value in enumerate(bounds["checked"], 1)
        }
        save("tokens_against_nodes", rank_plots.tokens_against_nodes(curves, limits))

        def lines(key: str) -> dict[str, list[tuple[int, float]]]:
            return {
                "predicted, searched text": [(p["nodes"], p["searched_text"][key]) for p in predictions],
                "predicted, same text": [(p["nodes"], p["same_text"][key]) for p in predictions],
                "measured": [(m["tree_nodes"], m[key]["median"]) for m in measured[1:]],
            }

        save("speedup_against_nodes", rank_plots.speedup_against_nodes(lines("speedup")))
        base = measured[0]["tokens_per_second"]["median"]
        save("speed_against_nodes", rank_plots.speed_against_nodes(lines("tokens_per_second"), base))
        for name, key, what in (
            ("predicted_against_measured", "tokens_per_round", "Tokens per round"),
            ("predicted_against_measured_speed", "tokens_per_second", "Tokens per second"),
        ):
            found = {m["tree_nodes"]: m[key] if key == "tokens_per_round" else m[key]["median"] for m in measured[1:]}
            points = {
                label: [(p[text][key], found[p["nodes"]]) for p in predictions if p["nodes"] in found]
                for label, text in (("from the searched text", "searched_text"), ("from the same text", "same_text"))
            }
            save(name, rank_plots.predicted_against_measured(points, what))
        axes = draw_tree(chosen, edge_values=rank_plots.edge_acceptance(checked, chosen).tolist())
        save("tree", axes.figure)


def _verdict(chosen: int, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    # `measured` begins with autoregressive decoding, which may be the fastest.
    speed = {m["tree_nodes"]: m["tokens_per_second"]["median"] for m in measured}
    (method,) = [m for m in measured if m["tree_nodes"] == chosen]
    return {
        "chosen_nodes": chosen,
        "chosen_speed_against_the_measured_best": speed[chosen] / max(speed.values()),
        "chosen_speed_against_autoregressive": method["speedup"]["median"],
    }


def _rows(search: str, found: Sequence[Simulation], checked: RankTable) -> list[dict[str, Any]]:
    other = simulate(checked, [one.tree for one in found])
    return [
        {
            "search": search,
            "nodes": one.tree.size,
            "searched": one.tokens_per_round,
            "checked": there.tokens_per_round,
            "error": there.tokens_per_round / one.tokens_per_round - 1,
        }
        for one, there in zip(found, other, strict=True)
    ]


def _across(search: str, sizes: Sequence[int], table: RankTable) -> list[dict[str, Any]]:
    # Searched on one half of the table's texts, simulated on the other, both ways.
    halves = [table.select(lambda i, side=side: i % 2 == side) for side in (0, 1)]  # type: ignore[misc]
    return [
        row
        for here, there in (halves, halves[::-1])
        for row in _rows(search, search_trees(here, sizes, search=search), there)
    ]


def _errors(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far the checked text is from what the searched one promised: the signed mean, and the largest either way."""
    errors = [row["error"] for row in rows]
    return {"mean": float(np.mean(errors)), "largest": float(np.max(np.abs(errors)))}


def _prediction(times: RoundTimes, nodes: int, tokens_per_round: float) -> dict[str, float]:
    return {
        "tokens_per_round": tokens_per_round,
        "speedup": times.speedup(nodes, tokens_per_round),
        "tokens_per_second": times.tokens_per_second(nodes, tokens_per_round),
    }


def packaged_trees(heads: str, sizes: Sequence[int], model: Model, loaded: Heads) -> list[tuple[Tree, float]] | None:
    """The best trees with their simulated tokens per round, from the rank table that lies beside shipped heads.

    None where there is no table: `specjax tree measure` makes one for other heads.

    Args:
      heads: where they were loaded from.
      sizes: nodes, root included.
      model: the target and
      loaded: the heads that the table must have been measured with; in another dtype, its ranks are nearly theirs.

    Raises:
      DataError: another model's table, or other heads'.
    """
    path = packaged_ranks(heads)
    if path is None:
        return None
    found = search_trees(RankTable.load(path).check(model, loaded, any_dtype=True), sizes)
    return [(one.tree, one.tokens_per_round) for one in found]
