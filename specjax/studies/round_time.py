"""What a round costs on this machine against the number of tree nodes, and the choice of a tree by it."""

import itertools
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from specjax.checks import is_whole
from specjax.decode import State, capacity_for, decode, prefill
from specjax.drafters.medusa import MedusaDrafter
from specjax.environment import environment
from specjax.errors import ConfigError, DataError, TreeError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads
from specjax.journal import NOWHERE, Journal
from specjax.loading.head_files import heads_for, heads_metadata
from specjax.loading.load import Model, load_model
from specjax.ranks.search import expected_tokens, greedy_tree
from specjax.ranks.simulation import Simulation
from specjax.stopping import Stopped
from specjax.tree import Tree

_ROUNDS = 12  # of a timed run
_GENERIC_RANKS = 32
SIZES = (1, 2, 3, 4, 5, 8, 9, 16, 24, 32, 48, 64)  # both sides of the steps in what float32 rounds cost on a CPU


class _Timed(NamedTuple):
    milliseconds: list[dict[str, float]]
    partial: str | None


def time_rounds(
    model: Model,
    heads: Heads,
    trees: Sequence[Tree],
    prompt_ids: Sequence[int],
    *,
    rounds: int = _ROUNDS,
    repeats: int = 3,
    capacity: int | None = None,
    journal: Journal = NOWHERE,
) -> list[dict[str, float]]:
    """Milliseconds per round {median, min, max} for each tree, in the real decoding loop.

    `repeats` runs, alternating over the trees, of about `rounds` rounds each, after a round to compile and warm up.

    Args:
      capacity: cache slots, `decode.capacity_for` of what is to be decoded: a round's cost depends on them. By default,
        and at the least, as many as these runs need; the same for all trees.
      journal: keeps the repeats that are done.

    Raises:
      PromptError: a prompt that `generate` refuses, or a capacity that is not a whole number of prefill chunks.
      TreeError: no trees, or one that the heads cannot fill.
      ConfigError: heads of another width or vocabulary than the model's, or rounds or repeats below 1.
      Stopped: that was asked for before all repeats were done.
    """
    found = _timed(model, heads, trees, prompt_ids, rounds, repeats, capacity, journal)
    if found.partial is not None:
        raise Stopped(found.partial)
    return found.milliseconds


def _timed(
    model: Model,
    heads: Heads,
    trees: Sequence[Tree],
    prompt_ids: Sequence[int],
    rounds: int,
    repeats: int,
    capacity: int | None,
    journal: Journal,
) -> _Timed:
    if not trees:
        raise TreeError("there are no trees to time; pass at least one.")
    if not is_whole(rounds) or not is_whole(repeats) or min(rounds, repeats) < 1:
        raise ConfigError(f"rounds is {rounds}, repeats {repeats}; expected whole numbers of at least 1.")
    for tree in trees:
        MedusaDrafter(heads, tree).check(model)
    first = MedusaDrafter(heads, trees[0]).prepare(model.params)  # before decoding: it is no part of a round
    drafters = [replace(first, heads=heads, tree=tree).prepare(model.params) for tree in trees]
    tokens = rounds * 2
    least = capacity_for(len(prompt_ids), tokens, max(tree.max_depth for tree in trees))
    new = {"max_new_tokens": tokens, "eos_token_ids": (), "capacity": max(least, capacity or 0)}
    # One for all: between rounds Medusa keeps nothing of its own.
    state = prefill(model, prompt_ids, drafter=drafters[0], **new)  # type: ignore[arg-type]

    one_round = replace(state, limit=state.length + 1)

    def run(drafter: MedusaDrafter, state: State = one_round) -> State:
        return jax.block_until_ready(decode(model, state, drafter=drafter, eos_token_ids=()))

    if jax.default_backend() == "cpu":  # the compiler mostly uses one core; a GPU's times kernels, so one by one
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:  # each holds a program and a cache
            list(pool.map(run, drafters))
    for drafter in drafters:  # where this thread has settings of its own, such as a precision, it compiles here
        run(drafter)

    def once(number: int) -> dict[str, np.ndarray]:
        taken = []
        for drafter in drafters:
            begin = time.perf_counter()
            done = run(drafter, state)
            taken.append(1e3 * (time.perf_counter() - begin) / int(done.rounds))
        return {"milliseconds": np.array(taken)}

    pieces, partial = journal.pieces("repeats", repeats, once)
    taken = np.stack([piece["milliseconds"] for piece in pieces], axis=1)
    return _Timed(
        [{"median": float(np.median(t)), "min": float(t.min()), "max": float(t.max())} for t in taken], partial
    )


@dataclass(frozen=True)
class RoundTimes:
    """Measured milliseconds per round for trees of some sizes, autoregressive decoding (1 node) among them."""

    nodes: tuple[int, ...]
    milliseconds: tuple[float, ...]
    device: str = ""

    def __post_init__(self) -> None:
        if len(self.nodes) != len(self.milliseconds) or not self.nodes or self.nodes[0] != 1:
            raise DataError(
                f"round times for {self.nodes} nodes: {self.milliseconds}; expected one per size, the first size 1."
            )
        rising = all(a < b for a, b in itertools.pairwise(self.nodes))
        if not rising or not all(0 < ms < math.inf for ms in self.milliseconds):
            raise DataError(
                f"round times for {self.nodes} nodes: {self.milliseconds}; expected rising sizes, times > 0."
            )

    @classmethod
    def from_result(cls, result: dict[str, Any]) -> "RoundTimes":
        """Reads the result.json of `specjax bench`.

        Raises:
          DataError: another experiment's result.
        """
        try:
            rows = sorted((int(r["nodes"]), float(r["milliseconds"]["median"])) for r in result["rows"])
            device = str((result.get("environment") or {}).get("device", ""))
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"this result holds no round times ({error!r}); make one with `specjax bench`.") from error
        return cls(tuple(n for n, _ in rows), tuple(ms for _, ms in rows), device)

    def __call__(self, nodes: int) -> float:
        """Milliseconds for a tree of `nodes`, linear between the measured sizes: measure both sides of a step.

        A float32 round of 5 nodes takes as long as one of 8 on a CPU, one of 9 as one of 16 (`ops.padded_rows`).

        Raises:
          DataError: more nodes than were measured.
        """
        if nodes > self.nodes[-1]:
            raise DataError(f"no round of {nodes} nodes was measured, the largest has {self.nodes[-1]}; measure it.")
        return float(np.interp(nodes, self.nodes, self.milliseconds))

    def speedup(self, nodes: int, tokens_per_round: float) -> float:
        """Predicted ratio to autoregressive decoding."""
        return tokens_per_round * self(1) / self(nodes)

    def tokens_per_second(self, nodes: int, tokens_per_round: float) -> float:
        """Predicted speed of the decoding loop."""
        return 1e3 * tokens_per_round / self(nodes)

    def fastest(self, trees: Sequence[Simulation]) -> Simulation:
        """The tree with the highest predicted speed, the first of equals; autoregressive decoding may still be faster.

        Raises:
          TreeError: no trees.
          DataError: a tree of more nodes than were measured.
        """
        if not trees:
            raise TreeError("there are no trees to choose from; pass at least one.")
        return max(trees, key=lambda one: self.tokens_per_second(one.tree.size, one.tokens_per_round))


@dataclass(frozen=True)
class Choice:
    """A chosen tree and the evidence: one row per candidate."""

    tree: Tree
    rows: tuple[dict[str, Any], ...]


def choose_tree(
    model: Model,
    heads: Heads,
    candidates: Sequence[tuple[Tree, float]],
    prompt_ids: Sequence[int],
    *,
    rounds: int = _ROUNDS,
    repeats: int = 3,
    capacity: int | None = None,
) -> Choice:
    """The candidate with the most predicted tokens per second on this machine, for this model, dtype and heads.

    Args:
      candidates: trees, each with its tokens per round as simulated or expected.
      capacity: as in `time_rounds`.

    A row holds nodes, expected_tokens, the milliseconds per round {median, min, max}, and expected_tokens_per_second.
    """
    trees = [tree for tree, _ in candidates]
    times = time_rounds(model, heads, trees, prompt_ids, rounds=rounds, repeats=repeats, capacity=capacity)
    rows: tuple[dict[str, Any], ...] = tuple(
        {
            "nodes": tree.size,
            "expected_tokens": tokens,
            "milliseconds": taken,
            "expected_tokens_per_second": 1e3 * tokens / taken["median"],
        }
        for (tree, tokens), taken in zip(candidates, times, strict=True)
    )
    best = candidates[int(np.argmax([row["expected_tokens_per_second"] for row in rows]))][0]
    chosen = {**best.provenance, "chosen": "the fastest measured size", "device": jax.devices()[0].device_kind}
    return Choice(replace(best, provenance=chosen), rows)


@dataclass(frozen=True)
class RoundTime:
    """Times rounds of trees of several sizes; size 1 is autoregressive decoding.

    The cost depends on the number of nodes, not on which they are: heads without recorded accuracies get generic trees.
    """

    name: str
    model: str
    heads: str
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    sizes: tuple[int, ...] = SIZES
    prompt_tokens: int = 64
    max_new_tokens: int = 128  # the cache has room for so many more: a round's cost depends on its slots
    repeats: int = 5

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints the table and gives the result."""
        if self.sizes[:1] != (1,):
            raise ConfigError(f"sizes is {self.sizes}; it must begin with 1, autoregressive decoding, the baseline.")
        if any(a >= b for a, b in itertools.pairwise(self.sizes)):
            raise ConfigError(f"sizes is {self.sizes}; each must be above the one before.")
        if min(self.repeats, self.prompt_tokens, self.max_new_tokens) < 1:
            raise ConfigError(
                f"repeats is {self.repeats}, prompt_tokens {self.prompt_tokens}, max_new_tokens {self.max_new_tokens}; "
                "expected at least 1 of each."
            )
        model = load_model(self.model, dtype=self.dtype)
        heads = heads_for(model, self.heads, dtype=self.dtype)
        recorded = np.asarray(heads_metadata(self.heads).get("hits", ()))
        hits = recorded if recorded.size else generic_hits(heads)
        prompt = (np.arange(self.prompt_tokens) + 1) % model.config.vocab_size
        trees = [greedy_tree(hits, size) for size in self.sizes]
        capacity = capacity_for(self.prompt_tokens, self.max_new_tokens, heads.config.num_heads)
        weights = {"model": fingerprint(model.params), "heads": fingerprint((heads.params, heads.token_map))}
        journal = Journal.of(self, output_dir, **weights)
        taken, partial = _timed(model, heads, trees, prompt.tolist(), _ROUNDS, self.repeats, capacity, journal)
        times = RoundTimes(self.sizes, tuple(ms["median"] for ms in taken))
        rows: list[dict[str, Any]] = []
        table = Table(title=f"{self.name}, {self.dtype}: time of a round")
        for column in ("nodes", "ms per round (min-max)", "cost against one step", "expected tokens per round", "gain"):
            table.add_column(column, justify="right")
        for tree, ms in zip(trees, taken, strict=True):
            row: dict[str, Any] = {"nodes": tree.size, "milliseconds": ms, "cost": times(tree.size) / times(1)}
            cells = [f"{ms['median']:.1f} ({ms['min']:.1f}-{ms['max']:.1f})", f"{row['cost']:.2f}"]
            if recorded.size:
                tokens = expected_tokens(tree, hits)
                row |= {
                    "expected_tokens": tokens,
                    "expected_tokens_per_second": times.tokens_per_second(tree.size, tokens),
                }
                cells += [f"{tokens:.2f}", f"{tokens / row['cost']:.2f}"]
            rows.append(row)
            table.add_row(str(tree.size), *cells)
        console.print(table)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            **weights,
            "rows": rows,
            "partial": partial,
        }


def generic_hits(heads: Heads) -> Float[np.ndarray, "C R"]:
    """Accuracies that fall with head and rank, for trees of heads about which nothing is known."""
    ranks = min(_GENERIC_RANKS, heads.config.output_size)
    return np.outer(0.7 ** np.arange(heads.config.num_heads), 0.5 ** (1.0 + np.arange(ranks)))
