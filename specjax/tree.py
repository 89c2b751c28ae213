"""Draft trees: static, hashable topologies that say which continuations a drafter proposes at once.

Node 0 is the root, the newest committed token; every other node is a draft. A node's *rank* says which of the drafter's
candidates for that depth it takes (0 is the best), and its *rank path* is the ranks from the root down, which is how
trees are published. Nodes stand in breadth-first order, sorted by (depth, rank path), so that one topology has one
representation. Everything derived is NumPy, computed once and read-only, to be folded into the compiled round.

Axis letters: M nodes (root included), P root-to-leaf paths, E depth (root excluded), W largest number of children.
"""

import functools
import itertools
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from specjax.errors import TreeError
from specjax.files import write_atomically

_FORMAT, _VERSION = "specjax.tree", 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
MOST_NODES = 4096  # which the target reads at once
_WORDS = ("chain", "cartesian", "paths", "auto")


@dataclass(frozen=True)
class Tree:
    """A draft tree. Equality and hash are those of the topology alone, so equal trees share one compiled round.

    Raises:
      TreeError: no nodes, a parent that is not before its child, siblings of equal rank, a negative rank, or nodes that
        are not in breadth-first order; or more than `MOST_NODES`.
    """

    parents: tuple[int, ...]  # [M]; -1 for the root, otherwise a smaller node number
    ranks: tuple[int, ...]  # [M]; 0 for the root
    name: str = field(default="", compare=False)
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)  # where it comes from, free-form

    def __post_init__(self) -> None:
        object.__setattr__(self, "parents", _ints(self.parents, "parents"))
        object.__setattr__(self, "ranks", _ints(self.ranks, "ranks"))
        if not self.parents:
            raise TreeError("the tree has no nodes; node 0, the root, is always there: parents=(-1,), ranks=(0,).")
        if len(self.parents) != len(self.ranks):
            raise TreeError(
                f"there are {len(self.parents)} parents and {len(self.ranks)} ranks; expected one of each per node."
            )
        _check_size(len(self.parents))
        if self.parents[0] != -1 or self.ranks[0] != 0:
            raise TreeError(
                f"node 0 has parent {self.parents[0]} and rank {self.ranks[0]}; the root has parent -1 and rank 0."
            )
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(self.parents)):
            parent, rank = self.parents[node], self.ranks[node]
            if not 0 <= parent < node:
                raise TreeError(
                    f"node {node} has parent {parent}; expected one of the nodes before it, 0 to {node - 1}."
                )
            if rank < 0:
                raise TreeError(f"node {node} has rank {rank}; ranks count the drafter's candidates from 0.")
            path = (*paths[parent], rank)
            before = paths[-1]
            if path == before:
                raise TreeError(
                    f"nodes {node - 1} and {node} are both rank {rank} below node {parent}; siblings must differ."
                )
            if (len(path), path) < (len(before), before):
                raise TreeError(
                    f"node {node} (rank path {path}) comes after node {node - 1} ({before}); nodes must be in "
                    "breadth-first order, sorted by (depth, rank path). Tree.from_paths takes them in any order."
                )
            paths.append(path)

    # --- derived, computed once -------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """M, the number of nodes, root included."""
        return len(self.parents)

    @functools.cached_property
    def depths(self) -> Int[np.ndarray, "M"]:
        """Edges from the root, int32; a node's position is that of the root plus its depth."""
        return _frozen(np.array([0, *(len(path) for path in self.rank_paths)], np.int32))

    @property
    def max_depth(self) -> int:
        """E, the most drafts one round can accept."""
        return int(self.depths[-1])

    @functools.cached_property
    def ancestors(self) -> Bool[np.ndarray, "M M"]:
        """ancestors[i, j]: node i sees node j, that is, j lies on the path from the root to i (i itself included)."""
        seen = np.eye(self.size, dtype=bool)
        for node in range(1, self.size):
            seen[node] |= seen[self.parents[node]]
        return _frozen(seen)

    @functools.cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """For every node its children, best rank first."""
        below: list[list[int]] = [[] for _ in self.parents]
        for node in range(1, self.size):
            below[self.parents[node]].append(node)
        return tuple(map(tuple, below))

    @functools.cached_property
    def child_table(self) -> Int[np.ndarray, "M W"]:
        """`children` as an int32 table padded with -1; W is 0 for the root alone."""
        return _frozen(_table(self.children, [-1] * self.size))

    @functools.cached_property
    def leaves(self) -> tuple[int, ...]:
        """The P nodes without children, in node order."""
        return tuple(node for node, below in enumerate(self.children) if not below)

    @functools.cached_property
    def paths(self) -> Int[np.ndarray, "P E+1"]:
        """For every leaf the nodes from the root to it, int32, padded with -1."""
        return _frozen(_table([self._path(leaf) for leaf in self.leaves], [-1] * len(self.leaves)))

    @functools.cached_property
    def node_paths(self) -> Int[np.ndarray, "M E+1"]:
        """For every node the nodes from the root to it, int32, padded by repeating the node itself.

        Gathers the accepted rows at the commit: the padding lands in slots past the length, garbage by definition.
        """
        return _frozen(_table([self._path(node) for node in range(self.size)], range(self.size)))

    @functools.cached_property
    def rank_paths(self) -> tuple[tuple[int, ...], ...]:
        """The rank paths of nodes 1 to M-1: the tree as it is published."""
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, self.size):
            paths.append((*paths[self.parents[node]], self.ranks[node]))
        return tuple(paths[1:])

    @functools.cached_property
    def max_rank_by_depth(self) -> tuple[int, ...]:
        """For depths 1 to E, how many candidates the drafter must offer there: 1 + the largest rank."""
        most = [0] * self.max_depth
        for path in self.rank_paths:
            most[len(path) - 1] = max(most[len(path) - 1], path[-1] + 1)
        return tuple(most)

    def subtree(self, nodes: Sequence[int]) -> "Tree":
        """These nodes alone, in their order, with their ranks.

        Raises:
          TreeError: the root or a node's parent is missing, or the nodes are not in order.
        """
        nodes = _ints(nodes, "nodes")
        if nodes[:1] != (0,) or list(nodes) != sorted({*nodes}) or nodes[-1] >= self.size:
            raise TreeError(
                f"the nodes {nodes} are no subtree; expected ascending numbers from 0, the root, to {self.size - 1} at "
                "most, each once."
            )
        place = {node: i for i, node in enumerate(nodes)}
        orphans = [node for node in nodes[1:] if self.parents[node] not in place]
        if orphans:
            raise TreeError(f"node {orphans[0]} is there without its parent, node {self.parents[orphans[0]]}.")
        parents = [-1, *(place[self.parents[node]] for node in nodes[1:])]
        return Tree(tuple(parents), tuple(self.ranks[node] for node in nodes))

    def _path(self, node: int) -> list[int]:
        return np.flatnonzero(self.ancestors[node]).tolist()  # ancestors come before their descendants

    # --- constructors -----------------------------------------------------------------------------------------------

    @classmethod
    def chain(cls, length: int) -> "Tree":
        """`length` drafts one below the other, each the best candidate; 0: the root alone, autoregressive decoding."""
        (length,) = _ints([length], "the chain's length")
        if length < 0:
            raise TreeError(f"the chain's length is {length}; expected the number of drafts, 0 or more.")
        _check_size(length + 1)
        return cls(tuple(range(-1, length)), (0,) * (length + 1), f"chain:{length}")

    @classmethod
    def cartesian(cls, widths: Sequence[int]) -> "Tree":
        """Every combination of the best `widths[i]` candidates at depth i + 1: 1 + w0 + w0 w1 + ... nodes."""
        widths = _ints(widths, "widths")
        if any(width < 1 for width in widths):
            raise TreeError(f"the widths are {widths}; expected at least one candidate at every depth.")
        _check_size(1 + sum(itertools.accumulate(widths, operator.mul)))
        levels = (itertools.product(*map(range, widths[:depth])) for depth in range(1, len(widths) + 1))
        return cls.from_paths(itertools.chain(*levels), "cartesian:" + ",".join(map(str, widths)))

    @classmethod
    def from_paths(
        cls, paths: Iterable[Sequence[int]], name: str = "", provenance: Mapping[str, Any] | None = None
    ) -> "Tree":
        """The tree of these rank paths, in any order: (0, 2) is the best candidate, then below it the third.

        Raises:
          TreeError: an empty path, a duplicate, a negative rank, or a path whose parent is missing.
        """
        given = [_ints(path, "a rank path") for path in itertools.islice(paths, MOST_NODES)]
        _check_size(1 + len(given))
        nodes: dict[tuple[int, ...], int] = {(): 0}
        parents, ranks = [-1], [0]
        for path in sorted(given, key=lambda path: (len(path), path)):
            if not path:
                raise TreeError("one of the rank paths is empty; the root is always there and is not listed.")
            if path in nodes:
                raise TreeError(f"rank path {path} is given twice; list every node once.")
            if path[:-1] not in nodes:
                raise TreeError(f"rank path {path} has no parent: {path[:-1]} is missing; list it too.")
            nodes[path] = len(nodes)
            parents.append(nodes[path[:-1]])
            ranks.append(path[-1])
        return cls(tuple(parents), tuple(ranks), name, provenance or {})

    @classmethod
    def from_parents(cls, parents: Sequence[int], ranks: Sequence[int] | None = None, name: str = "") -> "Tree":
        """The tree of a parent table in breadth-first order; without `ranks`, siblings rank in the order given."""
        parents = _ints(parents, "parents")
        if ranks is None:
            ranks = [parents[:node].count(parent) for node, parent in enumerate(parents)]
        return cls(parents, tuple(ranks), name)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names of the published trees, 63 drafts each."""
        return tuple(_published()["presets"])

    @classmethod
    def preset(cls, name: str) -> "Tree":
        """A published tree by name.

        Raises:
          TreeError: an unknown name; the message lists the known ones.
        """
        published = _published()
        if name not in published["presets"]:
            raise TreeError(f"no preset tree {name!r}; known are {', '.join(cls.presets())}.")
        return cls.from_paths(published["presets"][name], name, {"source": published["source"]})

    @classmethod
    def parse(cls, text: str) -> "Tree":
        """What `--tree` takes: `chain:4`, `cartesian:3,2,1`, `paths:0,1,0.0` (rank paths), a preset or a saved tree.

        Raises:
          TreeError: none of these, or a file that `load` refuses.
        """
        kind, _, sizes = text.partition(":")
        if kind == "paths":
            try:
                paths = [[int(rank) for rank in path.split(".")] for path in sizes.split(",")]
            except ValueError:
                raise TreeError(f"the tree is {text!r}; expected for example paths:0,1,0.0.") from None
            return cls.from_paths(paths, text)
        if kind in ("chain", "cartesian"):
            try:
                numbers = [int(size) for size in sizes.split(",")]
            except ValueError:
                numbers = []
            if kind == "chain" and len(numbers) == 1:
                return cls.chain(numbers[0])
            if kind == "cartesian" and numbers:
                return cls.cartesian(numbers)
            raise TreeError(f"the tree is {text!r}; expected for example chain:4 or cartesian:3,2,1.")
        if text in cls.presets():
            return cls.preset(text)
        if text.endswith(".json") or (_NAME.fullmatch(text) and saved_path(text).exists()):
            return cls.load(text)
        raise TreeError(
            f"no tree {text!r}; expected chain:4, cartesian:3,2,1, paths:0,1,0.0, the path of a .json file, the name "
            f"of a tree in {_folder()}, or a preset: {', '.join(cls.presets())}."
        )

    # --- in and out -------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The tree as JSON: format, version, name, rank paths, provenance."""
        content = {"name": self.name, "paths": self.rank_paths, "provenance": dict(self.provenance)}
        return json.dumps({"format": _FORMAT, "version": _VERSION, **content})

    @classmethod
    def from_json(cls, text: str) -> "Tree":
        """Reads what `to_json` writes.

        Raises:
          TreeError: not JSON, another format or version, or paths that are not a tree.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TreeError(f"the tree is not JSON ({error}); expected what Tree.to_json writes.") from error
        found = (data.get("format"), data.get("version")) if isinstance(data, dict) else (None, None)
        if found != (_FORMAT, _VERSION):
            raise TreeError(
                f"the JSON has format and version {found}; expected {(_FORMAT, _VERSION)}, as Tree.to_json writes."
            )
        name, paths, provenance = data.get("name", ""), data.get("paths"), data.get("provenance", {})
        if not (isinstance(name, str) and isinstance(paths, list) and isinstance(provenance, dict)):
            raise TreeError(
                "the tree's JSON needs a string `name`, a list of rank paths `paths` and an object `provenance`."
            )
        return cls.from_paths(paths, name, provenance)

    def save(self, where: str | Path) -> Path:
        """Writes `to_json` to `saved_path(where)`, and gives that path. Under a name, that is the tree's name there.

        Raises:
          TreeError: a name that `saved_path` refuses, or one that means something else where a tree is asked for.
        """
        path, name = writable(where), str(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        named = self if name.endswith(".json") else replace(self, name=name)
        write_atomically(path, named.to_json() + "\n", error=TreeError, remedy="name another place for the tree.")
        return path

    @classmethod
    def load(cls, where: str | Path) -> "Tree":
        """Reads a tree that `save` wrote.

        Raises:
          TreeError: no such file, or one that `from_json` refuses.
        """
        path = saved_path(where)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TreeError(f"cannot read the tree file {path}: {error}.") from error
        return cls.from_json(text)

    def ascii(self) -> str:
        """A drawing: node numbers in parentheses, ranks on the edges, best rank first."""
        width = len(str(max(self.ranks)))
        lines = ["(0)"]
        stack = [(child, "") for child in reversed(self.children[0])]
        while stack:
            node, indent = stack.pop()
            last = node == self.children[self.parents[node]][-1]
            lines.append(f"{indent}{'└' if last else '├'}─{self.ranks[node]:─>{width}}─({node})")
            indent += (" " if last else "│") + " " * (width + 2)
            stack += [(child, indent) for child in reversed(self.children[node])]
        return "\n".join(lines)


def saved_path(where: str | Path) -> Path:
    """Where a saved tree lies: a .json file itself; a name, `chat_8`, in the folder trees/, or that of SPECJAX_TREES.

    Raises:
      TreeError: neither a .json file nor a name.
    """
    if Path(where).suffix == ".json":
        return Path(where)
    if not _NAME.fullmatch(str(where)):
        raise TreeError(
            f"{str(where)!r} is no place for a tree; expected a .json file, or a name: letters, digits, - and _."
        )
    return _folder() / f"{where}.json"


def writable(where: str | Path) -> Path:
    """`saved_path`, for saving: raises a `TreeError` for a name that means something else where a tree is asked for."""
    if str(where) in (*Tree.presets(), *_WORDS):
        raise TreeError(f"{str(where)!r} means something else where a tree is named; take another name.")
    return saved_path(where)


def _folder() -> Path:
    return Path(os.environ.get("SPECJAX_TREES", "trees"))


def _ints(values: Iterable[Any], what: str) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in values)
    except TypeError as error:
        raise TreeError(f"{what}: {values!r}; expected a sequence of integers.") from error


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _table(rows: Sequence[Sequence[int]], padding: Sequence[int]) -> np.ndarray:
    """Ragged rows as one int32 table; row i is padded with padding[i]."""
    width = max(map(len, rows))
    return np.array([[*row, *[pad] * (width - len(row))] for row, pad in zip(rows, padding, strict=True)], np.int32)


@functools.cache
def _published() -> dict[str, Any]:
    return json.loads((resources.files("specjax") / "data" / "trees.json").read_text())


def _check_size(nodes: int) -> None:
    if nodes > MOST_NODES:
        raise TreeError(f"the tree has {nodes} nodes; a round reads at most {MOST_NODES} at once. Take a smaller one.")
