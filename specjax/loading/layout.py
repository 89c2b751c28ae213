"""How stored tensors lie in `specjax.target.params.Params`: one table, read forwards to load and backwards to save.

The tree of `params.abstract(config)` says which leaves there are; the table says which stored tensors make up each leaf
and in which order of axes. Hugging Face and GGUF files differ only in names, and in how Llama's q/k rows are ordered.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from specjax.errors import CheckpointError
from specjax.target.config import ModelConfig
from specjax.target.params import Params, ParamSpec, abstract

CHUNK_BYTES = 16 << 20  # a stored tensor passes through memory in pieces of about this size

Part = tuple[EllipsisType | slice | int, ...]
ReadRows = Callable[[str, int, int], np.ndarray]  # (tensor, first row, last row + 1) -> [rows, ...]


@dataclass(frozen=True)
class Piece:
    """One stored tensor and the part of a leaf that it fills.

    Attributes:
      role: what it is; the names tables turn it into the tensor's name.
      stored: its axes in the file; a space parts the file's dimensions, so "KGH D" is a matrix [K*G*H, D].
      leaf: the same axes in the leaf's order. Letters as in DESIGN; h is H/2, for interleaved rotary pairs.
      part: where it lies in the leaf.
    """

    role: str
    stored: str
    leaf: str
    part: Part = (...,)


_QUERY: Part = (slice(None), slice(None, -2))  # axis Q, the second, holds G query heads, a key and a value
_KEY: Part = (slice(None), -2)
_VALUE: Part = (slice(None), -1)

_PIECES: Mapping[str, tuple[Piece, ...]] = {
    "embed": (Piece("embed", "V D", "VD"),),
    "attn_norm": (Piece("attn_norm", "D", "D"),),
    "qkv": (
        Piece("q", "KGH D", "KGHD", _QUERY),
        Piece("k", "KH D", "KHD", _KEY),
        Piece("v", "KH D", "KHD", _VALUE),
    ),
    "qkv_bias": (
        Piece("q_bias", "KGH", "KGH", _QUERY),
        Piece("k_bias", "KH", "KH", _KEY),
        Piece("v_bias", "KH", "KH", _VALUE),
    ),
    "out": (Piece("out", "D KGH", "DKGH"),),
    "mlp_norm": (Piece("mlp_norm", "D", "D"),),
    "gate_up": (
        Piece("gate", "F D", "FD", (0,)),
        Piece("up", "F D", "FD", (1,)),
    ),
    "down": (Piece("down", "D F", "DF"),),
    "final_norm": (Piece("final_norm", "D", "D"),),
    "lm_head": (Piece("lm_head", "V D", "VD"),),
}


@dataclass(frozen=True)
class Layout:
    """Where the stored tensors of one model go. Made by `layout`; leaves are in `jax.tree.leaves` order."""

    sizes: Mapping[str, int]  # of each axis letter
    specs: tuple[ParamSpec, ...]
    pieces: tuple[tuple[tuple[str, Piece], ...], ...]  # (tensor name, piece) for each leaf
    treedef: Any

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the file should hold."""
        return {name: self.shape(piece) for leaf in self.pieces for name, piece in leaf}

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """The stored tensor's shape."""
        return tuple(math.prod(self.sizes[a] for a in group) for group in piece.stored.split())

    def view(self, piece: Piece, leaf: np.ndarray) -> np.ndarray:
        """The part of `leaf` that `piece` fills, as a view with one axis for each stored letter."""
        stored = piece.stored.replace(" ", "")
        part = leaf[piece.part].reshape(tuple(self.sizes[a] for a in piece.leaf), copy=False)
        return part.transpose([piece.leaf.index(a) for a in stored])


def layout(config: ModelConfig, names: Mapping[str, str], *, interleaved_rope: bool = False) -> Layout:
    """The layout of `config`'s tensors in files that use `names`.

    Args:
      config: the model.
      names: role -> tensor name, `{}` standing for the layer: of the model's family.
      interleaved_rope: whether q/k rows pair up neighbours (2i, 2i + 1) instead of halves (i, i + H/2), which is how
        GGUF stores the `llama` architecture.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(abstract(config))
    sizes = {"2": 2, "h": config.head_dim // 2}
    for _, spec in paths:
        sizes |= dict(zip(spec.axes, spec.shape, strict=True))

    def pieces(path: tuple[Any, ...]) -> tuple[tuple[str, Piece], ...]:
        layer = next((key.idx for key in path if hasattr(key, "idx")), None)
        found = _PIECES[path[-1].name]
        if interleaved_rope:
            found = tuple(_interleaved(p) if p.role in ("q", "k", "q_bias", "k_bias") else p for p in found)
        return tuple((names[p.role].format(layer), p) for p in found)

    return Layout(sizes, tuple(spec for _, spec in paths), tuple(pieces(path) for path, _ in paths), treedef)


def _interleaved(piece: Piece) -> Piece:
    return dataclasses.replace(piece, stored=piece.stored.replace("H", "h2"), leaf=piece.leaf.replace("H", "2h"))


def check(plan: Layout, found: Iterable[tuple[str, tuple[int, ...]]], ignored: Callable[[str], bool]) -> list[str]:
    """What is wrong with the tensors `found` (names and shapes, over all files): a line for each problem."""
    expected, problems = plan.shapes, []
    seen: set[str] = set()
    for name, shape in found:
        if name in seen:
            problems.append(f"duplicate: {name} is stored twice")
        elif name in expected and shape != expected[name]:
            problems.append(f"shape: {name} is {list(shape)}, expected {list(expected[name])}")
        elif name not in expected and not ignored(name):
            problems.append(f"unknown: {name} {list(shape)} has no place in this model")
        seen.add(name)
    problems += [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in seen]
    return problems


def refuse(problems: list[str], where: str) -> None:
    """Raises one `CheckpointError` with all `problems`, if there are any."""
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensors in {where} do not fit the model that its configuration describes; "
            "check that they belong together and were downloaded completely:\n  " + "\n  ".join(problems)
        )


def finite(read: ReadRows) -> ReadRows:
    """`read`, which raises a `CheckpointError` for the first tensor that holds NaN or infinity."""

    def checked(name: str, start: int, stop: int) -> np.ndarray:
        rows = read(name, start, stop)
        bad = int((~np.isfinite(rows.astype(np.float32))).sum())
        if bad:
            raise CheckpointError(
                f"{name} holds {bad} numbers that are not finite in its rows {start} to {stop - 1}; download it again, "
                "or take the checkpoint before it."
            )
        return rows

    return checked


def fill(plan: Layout, read: ReadRows, dtype: DTypeLike) -> Params:
    """Reads every tensor into its place, one leaf after the other: nothing beyond one leaf exists twice."""
    leaves = []
    for spec, pieces in zip(plan.specs, plan.pieces, strict=True):
        leaf = _aligned(spec.shape, np.dtype(dtype))
        for name, piece in pieces:
            view = plan.view(piece, leaf)
            per_entry = plan.shape(piece)[0] // len(view)  # stored rows per entry of the view's first axis
            step = max(1, CHUNK_BYTES * len(view) // (4 * view.size))
            for a in range(0, len(view), step):
                target = view[a : a + step]
                target[...] = read(name, a * per_entry, (a + len(target)) * per_entry).reshape(target.shape)
        leaves.append(jax.device_put(leaf))
    return jax.tree.unflatten(plan.treedef, leaves)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # On a 64-byte boundary, where XLA:CPU takes the array over instead of copying it.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
