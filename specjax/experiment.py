"""Experiments: a Python file with `get_config()` is the config, its docstring the record, `specjax run` the runner.

A config is any frozen dataclass with `run(output_dir, console) -> dict`; the command line overrides its fields.
"""

import importlib.util
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from specjax.acceptance import Acceptance, Greedy, Sample, Typical
from specjax.analysis.plots import save_decode_figures
from specjax.analysis.round_time import choose_tree
from specjax.analysis.search import expected_tokens, greedy_tree
from specjax.analysis.tree_search import packaged_trees
from specjax.bench import Contender, Request, compare, environment
from specjax.decode import capacity_for
from specjax.drafters.base import NoDrafter
from specjax.drafters.build import build_drafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.errors import ConfigError, PromptError
from specjax.heads import Heads
from specjax.loading.heads import heads_for, heads_metadata
from specjax.loading.load import Model, load_model
from specjax.prompts import load_prompts
from specjax.tree import Tree


class Experiment(Protocol):
    """What `get_config()` gives: a frozen dataclass that runs itself and returns the content of result.json."""

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Runs the experiment; figures and other files go into `output_dir`."""
        ...


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
    max_n: int | None = None  # these three are the n-gram drafter's, with its defaults
    min_n: int | None = None
    reach: tuple[int, ...] | None = None
    temperature: float = 0.0  # 0: greedy; above: lossless sampling
    top_p: float = 1.0
    top_k: int | None = None
    typical: bool = False  # typical acceptance at that temperature: NOT lossless

    @property
    def ngram(self) -> dict[str, Any]:
        """What is set of the n-gram drafter's settings.

        Raises:
          ConfigError: something is, and no n-grams draft.
        """
        given = {"max_n": self.max_n, "min_n": self.min_n, "reach": self.reach}
        found = {name: value for name, value in given.items() if value is not None}
        if found and "ngram" not in (self.drafter or "").split("+"):
            raise ConfigError(f"{self.name}: {found} is for the drafter ngram, and this one is {self.drafter!r}.")
        return found

    @property
    def acceptance(self) -> Acceptance:
        """Greedy, sampling or typical.

        Raises:
          ConfigError: a parameter outside its range, or one that the rule does not have.
        """
        if (self.top_p != 1.0 or self.top_k is not None) and (self.typical or not self.temperature):
            raise ConfigError(
                f"{self.name}: top_p {self.top_p} and top_k {self.top_k} shape sampling; "
                "set a temperature, and not typical."
            )
        if self.typical:
            return Typical(self.temperature)
        return Sample(self.temperature, self.top_k, self.top_p) if self.temperature else Greedy()


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
        contenders = [self._contender(m, models[m.dtype], requests, chosen, output_dir, console) for m in self.methods]
        with _progress(console) as progress:
            total = len(contenders) * (1 + len(requests) * self.decoding.repeats)
            task = progress.add_task("decoding", total=total)
            methods = compare(
                contenders,
                requests,
                max_new_tokens=self.decoding.max_new_tokens,
                repeats=self.decoding.repeats,
                seed=self.decoding.seed,
                progress=lambda: progress.advance(task),
            )
        result = {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "prompts": len(requests),
            "methods": methods,
            "tree_choice": list(chosen.values()),
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
    ) -> Contender:
        ngram = method.ngram
        named = method.drafter or ("none" if method.heads is None else "medusa")
        if named != "medusa" or method.tree != "auto":
            drafter = build_drafter(
                named,
                model,
                tree=None if method.tree == "auto" else method.tree,
                heads=method.heads,
                draft_model=method.draft_model,
                acceptance=method.acceptance,
                ngram=ngram,
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
            begin = time.perf_counter()
            choice = choose_tree(model, heads, candidates, requests[0].ids, capacity=capacity)
        chosen[method.name, method.dtype] = {
            "method": method.name,
            "nodes": choice.tree.size,
            "candidates": choice.rows,
            "seconds": time.perf_counter() - begin,  # compiles what decoding then uses
        }
        console.print(
            f"{method.name}: a tree of {choice.tree.size} nodes is the fastest of {list(self.tree_sizes)} here"
        )
        choice.tree.save(output_dir / f"tree_{method.name}.json")
        return Contender(method.name, model, MedusaDrafter(heads, choice.tree), method.acceptance)

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


def load_config(path: Path) -> Any:
    """Executes an experiment file and gives what its `get_config()` returns.

    Raises:
      ConfigError: no such file, or none that defines `get_config`.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; name an experiment, e.g. experiments/smollm2_medusa.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(); an experiment file must.")
    return module.get_config()


def configured(path: Path, arguments: list[str]) -> Any:
    """The config of an experiment file with `--section.field VALUE` overrides.

    `--prompts FILE` is short for `--prompts.file FILE`. `--help` lists the options and exits, as a wrong one does.

    Raises:
      ConfigError: a file that is no experiment, or a value that its config refuses.
    """
    config = load_config(path)
    if isinstance(getattr(config, "prompts", None), Prompts):
        arguments = ["--prompts.file" if a == "--prompts" else a for a in arguments]
    # A field that may be None stays a group of options, not a subcommand.
    how = (tyro.conf.AvoidSubcommands,)
    return tyro.cli(type(config), default=config, args=arguments, prog=f"specjax run {path}", config=how)


def run_file(path: Path, arguments: list[str], output_dir: Path | None = None) -> int:
    """`specjax run`: loads the config, applies the overrides (`configured`), runs, and writes result.json.

    The default for `output_dir` is results/NAME/TIME.

    Raises:
      ConfigError: as `configured`; an output directory that already holds a result; or none named where several hosts
        run together: each would take its own.
    """
    config = configured(path, arguments)
    hosts = getattr(config, "hosts", None)
    if output_dir is None and hosts is not None and hosts.coordinator is not None:
        raise ConfigError(
            f"the hosts that {hosts.coordinator!r} coordinates share one output directory, and none is named; give all "
            "of them the same --output-dir, on a disk that they all see."
        )
    return run_config(config, output_dir or Path("results") / path.stem / time.strftime("%Y%m%d-%H%M%S"), Console())


def run_config(config: Experiment, directory: Path, console: Console) -> int:
    """Runs an experiment and writes its result.json (of several hosts, the first one does); gives the exit code.

    Raises:
      ConfigError: `directory` already holds a result.
    """
    target = directory / "result.json"
    if target.exists():
        raise ConfigError(f"{target} exists; choose another --output-dir, or remove it first.")
    directory.mkdir(parents=True, exist_ok=True)
    result = config.run(directory, console)
    if jax.process_index() == 0:
        target.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"wrote {target}")
    return 0
