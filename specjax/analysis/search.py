"""Choosing a draft tree: from the heads' measured accuracies and the measured cost of a round on this machine."""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from specjax.decode import decode, prefill
from specjax.drafters.medusa import MedusaDrafter
from specjax.errors import TreeError
from specjax.heads import Heads
from specjax.loading.load import Model
from specjax.tree import Tree


def expected_tokens(tree: Tree, hits: Float[np.ndarray, "C R"]) -> float:
    """Expected tokens per round, the bonus included, if the heads were right independently of each other.

    Args:
      hits: hits[i, r]: the probability that the true token has rank r for head i.
    """
    return 1.0 + sum(_path_probability(path, hits) for path in tree.rank_paths)


def _path_probability(path: Sequence[int], hits: Float[np.ndarray, "C R"]) -> float:
    return float(np.prod([hits[depth, rank] for depth, rank in enumerate(path)]))


def greedy_tree(hits: Float[np.ndarray, "C R"], size: int) -> Tree:
    """The tree of `size` nodes with the most `expected_tokens`: Medusa's search (section 2.3.3).

    It adds the child or next sibling of largest path probability until `size` nodes stand. Optimal under independence,
    because a child is never likelier than its parent, nor a rank than the one before it.

    Raises:
      TreeError: a size below 1 or beyond what heads and ranks allow.
    """
    heads, ranks = hits.shape
    if not 1 <= size <= sum(ranks**depth for depth in range(heads + 1)):
        raise TreeError(
            f"size is {size}; {heads} heads with {ranks} ranks allow 1 to {sum(ranks**d for d in range(heads + 1))}."
        )
    hits = -np.sort(-hits, axis=1)  # a sampled table may be out of order by chance
    frontier: list[tuple[float, tuple[int, ...]]] = [(-hits[0, 0], (0,))]
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < size - 1:
        _, path = heapq.heappop(frontier)
        chosen.append(path)
        near = [(*path[:-1], path[-1] + 1)] if path[-1] + 1 < ranks else []
        near += [(*path, 0)] if len(path) < heads else []
        for other in near:
            heapq.heappush(frontier, (-_path_probability(other, hits), other))
    return Tree.from_paths(chosen, name=f"greedy_{size}", provenance={"search": "greedy, independent heads"})


@dataclass(frozen=True)
class Choice:
    """A chosen tree and the evidence: one row per candidate size."""

    tree: Tree
    rows: tuple[dict[str, Any], ...]


def choose_tree(
    model: Model,
    heads: Heads,
    hits: Float[np.ndarray, "C R"],
    prompt_ids: Sequence[int],
    *,
    sizes: Sequence[int] = (2, 4, 6, 8, 12, 16, 24, 32),
    rounds: int = 12,
    repeats: int = 3,
) -> Choice:
    """The tree with the most expected tokens per second on this machine, for this model, dtype and heads.

    For every size the greedy tree is timed in the real decoding loop: `repeats` runs, alternating over the sizes, of
    about `rounds` rounds each; the median of the time per round counts. A row holds nodes, expected_tokens, the
    milliseconds per round {median, min, max}, and expected_tokens_per_second.
    """
    candidates = [MedusaDrafter(heads, greedy_tree(hits, size)) for size in sizes]
    runs = [
        (
            drafter,
            prefill(model, prompt_ids, drafter=drafter, max_new_tokens=rounds * 2, eos_token_ids=(), capacity=512),
        )
        for drafter in candidates
    ]
    for drafter, state in runs:
        jax.block_until_ready(decode(model, state, drafter=drafter, eos_token_ids=()))  # compile, warm up
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for taken, (drafter, state) in zip(seconds, runs, strict=True):
            begin = time.perf_counter()
            done = jax.block_until_ready(decode(model, state, drafter=drafter, eos_token_ids=()))
            taken.append((time.perf_counter() - begin) / int(done.rounds))
    rows: list[dict[str, Any]] = []
    for drafter, taken in zip(candidates, seconds, strict=True):
        tokens, middle = expected_tokens(drafter.tree, hits), float(np.median(taken))
        rows.append(
            {
                "nodes": drafter.tree.size,
                "expected_tokens": tokens,
                "milliseconds": {"median": 1e3 * middle, "min": 1e3 * min(taken), "max": 1e3 * max(taken)},
                "expected_tokens_per_second": tokens / middle,
            }
        )
    best = int(np.argmax([row["expected_tokens_per_second"] for row in rows]))
    provenance = {"search": "greedy, independent heads, fastest measured size", "device": jax.devices()[0].device_kind}
    return Choice(replace(candidates[best].tree, provenance=provenance), tuple(rows))
