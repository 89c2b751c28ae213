"""Tensors by name out of one or several safetensors files."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from specjax.errors import CheckpointError

_COMPARED = 4_000_000  # numbers at a time
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}  # the last also teaches NumPy its name


@dataclass(frozen=True)
class Stored:
    """A tensor's description in a file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path


def files(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face directory: one, or the shards that its index names.

    Raises:
      CheckpointError: no weights, or shards missing.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}; pickled weights are not loaded.")
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}); is the download complete?") from error
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise CheckpointError(f"{index} names no shards; is the download complete?")
    if outside := [shard for shard in shards if shard in ("", ".", "..") or set(shard) & set("/\\\0")]:
        raise CheckpointError(f"{index} names {outside[0]!r}; expected names of files beside it, without folders.")
    there = {path.name for path in directory.iterdir()}  # asked for one by one, too long a name is an error
    missing = [shard for shard in shards if shard not in there]
    if missing:
        raise CheckpointError(f"{INDEX} names {missing}, which {directory} lacks; complete the download.")
    return [directory / shard for shard in shards]


def scan(paths: Sequence[Path]) -> Iterator[Stored]:
    """Describes every tensor in every file, without reading any.

    Raises:
      CheckpointError: a file that is damaged or not safetensors.
    """
    for path in paths:
        try:
            with safe_open(path, "np") as file:
                names = file.keys()
                for name in names:
                    piece = file.get_slice(name)
                    yield Stored(name, tuple(piece.get_shape()), piece.get_dtype(), path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not readable as safetensors ({error}); is it complete?") from error


def rows(tensor: Stored, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the first axis, in the file's dtype."""
    # Opened anew each time: a mapping that stays open keeps every page it touched resident.
    with safe_open(tensor.file, "np") as file:
        return file.get_slice(tensor.name)[start:stop]


def equal(a: Stored, b: Stored) -> bool:
    """Whether two matrices of one shape hold the same numbers, whatever their dtypes."""
    step = max(1, _COMPARED // max(1, math.prod(a.shape[1:])))
    parts = ((at, min(at + step, a.shape[0])) for at in range(0, a.shape[0], step))
    return all(np.array_equal(rows(a, *part).astype(np.float32), rows(b, *part).astype(np.float32)) for part in parts)


def metadata(path: Path) -> dict[str, str]:
    """The free-form part of a file's header.

    Raises:
      CheckpointError: a file that is damaged or not safetensors.
    """
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not readable as safetensors ({error}); is it complete?") from error
