"""Experiments: a Python file with `get_config()` is the config, its docstring the record, `specjax run` the runner.

A config is any frozen dataclass with `run(output_dir, console) -> dict`; the command line overrides its fields.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specjax.acceptance import Acceptance, acceptance_for
from specjax.corpus.prompts import load_prompts
from specjax.decode import capacity_for
from specjax.drafters.base import NoDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.registry import build_drafter, default_drafter, entries_of, refuse_idle
from specjax.environment import environment
from specjax.errors import ConfigError, PromptError
from specjax.heads import Heads
from specjax.journal import Journal
from specjax.loading.head_files import heads_for, heads_metadata
from specjax.loading.load import Model, load_model
from specjax.ranks.search import expected_tokens, greedy_tree
from specjax.report.decode_figures import save_decode_figures
from specjax.studies.compare import Contender, Request, compare
from specjax.studies.round_time import choose_tree
from specjax.studies.tree_search import packaged_trees
from specjax.tree import Tree


@dataclass(frozen=True)
class Prompts:
    """Which prompts to decode."""

    file: str | None = None  # Spec-Bench JSONL; None: the ones that ship with specjax
    per_category: int | None = None  # the first so many of each category; None: all
    skip: int = 0  # leaves out so many of each category before that: others than those something was chosen on

    def __post_init__(self) -> None:
        if self.skip < 0 or (self.per_category is not None and self.per_category < 1):
            raise ConfigError(
                f"skip is {self.skip} and per_category {self.per_category}; expected at least 0 and 1, or None for all."
            )


@dataclass(frozen=True)
class Decoding:
    """How far to decode, and how often to time it."""

    max_new_tokens: int = 128
    repeats: int = 1
    seed: int = 0  # where tokens are sampled

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2 or self.repeats < 1:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens} and repeats {self.repeats}; timing needs at least 2 (the "
                "first token comes from the prefill) and 1."
            )


@dataclass(frozen=True)
class Method:
    """One way to decode."""

    name: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    heads: str | None = None  # a path or a packaged name
    # What Tree.parse takes (for a hybrid one per part, joined by "+"), or, for Medusa heads, "auto": the fastest
    # measured on this machine for this dtype.
    tree: str = "auto"
    drafter: str | None = None  # as `specjax generate --drafter`; None: medusa if there are heads, otherwise none
    draft_model: str | None = None
    files: dict[str, str] = field(default_factory=dict)  # what else a drafter of one's own needs, by name
    options: dict[str, Any] = field(default_factory=dict)  # the drafter's own, such as {"max_n": 4} of n-grams
    temperature: float | None = None  # None or 0: greedy; above: lossless sampling
    top_p: float = 1.0
    top_k: int | None = None
    typical: bool = False  # typical acceptance at that temperature, 0.7 for None: NOT lossless

    @property
    def all_files(self) -> dict[str, str | None]:
        """By name, as `build_drafter` takes them."""
        return {"heads": self.heads, "draft_model": self.draft_model, **self.files}

    @property
    def drafts_with(self) -> str:
        """The drafter's name: the one that the files are for where none is named.

        Raises:
          ConfigError: an unknown drafter, or files or options that it does not use.
        """
        named = self.drafter or default_drafter(self.all_files)
        try:
            refuse_idle(named, self.all_files, self.options)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error
        return named

    @property
    def acceptance(self) -> Acceptance:
        """Greedy, sampling or typical.

        Raises:
          ConfigError: a parameter outside its range, or one that the rule does not have.
        """
        return acceptance_for(self.temperature, self.top_k, self.top_p, typical=self.typical)


@dataclass(frozen=True)
class DecodeExperiment:
    """Compares methods on prompts: identity of outputs, tokens per round, speed."""

    name: str
    model: str
    methods: tuple[Method, ...]
    prompts: Prompts = field(default_factory=Prompts)
    decoding: Decoding = field(default_factory=Decoding)
    tree_sizes: tuple[int, ...] = (4, 8, 12, 16, 24)  # candidates for "auto"

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Writes the figures and the chosen trees to `output_dir`, prints a table, and gives the result."""
        models: dict[str, Model] = {}
        for dtype in dict.fromkeys(method.dtype for method in self.methods):
            with console.status(f"loading {self.model} in {dtype}"):
                models[dtype] = load_model(self.model, dtype=dtype)
        requests = self._requests(models[self.methods[0].dtype])
        chosen: dict[tuple[str, str], dict[str, Any]] = {}
        journal = Journal.of(self, output_dir)
        contenders = [
            self._contender(m, models[m.dtype], requests, chosen, output_dir, console, journal) for m in self.methods
        ]
        with _progress(console) as progress:
            total = len(contenders) * (1 + len(requests) * self.decoding.repeats)
            task = progress.add_task("decoding", total=total)
            methods, prompts, partial = compare(
                contenders,
                requests,
                max_new_tokens=self.decoding.max_new_tokens,
                repeats=self.decoding.repeats,
                seed=self.decoding.seed,
                progress=lambda: progress.advance(task),
                journal=journal,
            )
        result = {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "prompts": prompts,
            "methods": methods,
            "tree_choice": list(chosen.values()),
            "partial": partial,
        }
        console.print(decode_table(result))
        save_decode_figures(result, output_dir)
        return result

    def _requests(self, model: Model) -> list[Request]:
        if model.tokenizer is None:
            raise PromptError(f"{self.model} has no tokenizer; an experiment over text prompts needs one.")
        seen: dict[str, int] = {}
        wanted = self.prompts.per_category
        requests = []
        for prompt in load_prompts(self.prompts.file):
            number = seen[prompt.category] = seen.get(prompt.category, -1) + 1
            if self.prompts.skip <= number and (wanted is None or number < self.prompts.skip + wanted):
                ids = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt.turns[0]}])
                requests.append(Request(tuple(ids), prompt.category))
        if not requests:
            raise PromptError(
                f"skip={self.prompts.skip} leaves none of the prompts, per_category={wanted}; the largest category has "
                f"{max(seen.values(), default=-1) + 1}."
            )
        return requests

    def _contender(
        self,
        method: Method,
        model: Model,
        requests: list[Request],
        chosen: dict[tuple[str, str], dict[str, Any]],
        output_dir: Path,
        console: Console,
        journal: Journal,
    ) -> Contender:
        named = method.drafts_with
        if method.tree != "auto" or not all(entry.auto for _, entry in entries_of(named)) or named == "none":
            drafter = build_drafter(
                named,
                model,
                tree=None if method.tree == "auto" else method.tree,
                files=method.all_files,
                acceptance=method.acceptance,
                options=method.options,
            )
            return Contender(method.name, model, drafter or NoDrafter(), method.acceptance)
        if method.heads is None:
            raise ConfigError(f"the method {method.name!r} drafts with Medusa heads, but names none; set heads.")
        heads = heads_for(model, method.heads, dtype=model.params.dtype)
        with console.status(f"choosing the tree for {method.name} on this machine"):
            # The cost of a round depends on the cache: timed with the slots that decoding will have.
            longest = max(len(request.ids) for request in requests)
            capacity = capacity_for(longest, self.decoding.max_new_tokens, heads.config.num_heads)
            candidates = self._candidates(method, model, heads)

            def choose() -> dict[str, Any]:
                begin = time.perf_counter()
                found = choose_tree(model, heads, candidates, requests[0].ids, capacity=capacity)
                seconds = time.perf_counter() - begin  # compiles what decoding then uses
                return {"tree": found.tree.to_json(), "candidates": found.rows, "seconds": seconds}

            # Kept: measured once more, another tree may be the fastest.
            choice = journal.once(f"tree of {method.name}", choose)
        tree = Tree.from_json(choice["tree"])
        chosen[method.name, method.dtype] = {
            "method": method.name,
            "nodes": tree.size,
            "candidates": choice["candidates"],
            "seconds": choice["seconds"],
        }
        console.print(f"{method.name}: a tree of {tree.size} nodes is the fastest of {list(self.tree_sizes)} here")
        tree.save(output_dir / f"tree_{method.name}.json")
        return Contender(method.name, model, MedusaDrafter(heads, tree), method.acceptance)

    def _candidates(self, method: Method, model: Model, heads: Heads) -> list[tuple[Tree, float]]:
        assert method.heads is not None
        found = packaged_trees(method.heads, self.tree_sizes, model, heads)
        if found is not None:
            return found
        hits = heads_metadata(method.heads).get("hits")
        if hits is None:
            raise ConfigError(
                f"{method.heads} has neither a rank table beside it nor recorded accuracies, which tree='auto' needs; "
                f"name a tree for {method.name!r}."
            )
        trees = [greedy_tree(np.asarray(hits), size) for size in self.tree_sizes]
        return [(tree, expected_tokens(tree, np.asarray(hits))) for tree in trees]


def decode_table(result: dict[str, Any]) -> Table:
    """The terminal table of a decode result."""
    table = Table(title=f"{result['experiment']}: {result['prompts']} prompts, {result['environment']['device']}")
    for column in ("method", "nodes", "tokens/round\n(accepted)", "tokens/s", "speed-up", "same\noutput"):
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for m in result["methods"]:
        speed, same = m.get("speedup"), m.get("identical_to_autoregressive")
        table.add_row(
            f"{m['name']}\n{m['dtype']}" + (f", T={m['temperature']:g}" if m["temperature"] else ""),
            str(m["tree_nodes"]),
            f"{m['tokens_per_round']:.2f}\n({m['accepted_per_round']:.2f})",
            _cell(m["tokens_per_second"], ".1f"),
            _speedup(m) if speed else "",
            f"{same['same']}/{same['of']}" if same else "",
        )
    table.caption = (
        "median (min-max over prompts); decoding loop alone; speed-up against autoregressive in the same dtype"
    )
    return table


def _speedup(method: dict[str, Any]) -> str:
    # Where another dtype decodes faster autoregressively, the ratio to that one stands beside it.
    fastest, own = method.get("speedup_over_fastest_autoregressive"), _cell(method["speedup"], ".2f")
    return own if fastest is None else f"{own}\n{fastest['median']:.2f} over {fastest['name']}"


def _cell(spread: dict[str, float], form: str) -> str:
    return f"{spread['median']:{form}}\n({spread['min']:{form}}-{spread['max']:{form}})"


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
