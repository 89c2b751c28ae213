"""Reads tensors out of a `torch.save` file without torch and without executing the pickle in it, and writes them.

The file is a zip archive: a pickle that describes tensors, and their raw storages beside it. The unpickler knows the
few names that a state dict needs and refuses every other; what it builds are plain tuples of strings and numbers, which
are checked before a byte of a storage is read.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from specjax.errors import CheckpointError

_REMEDY = "convert it where torch is: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)."
_STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in an archive. `offset` and `strides` count elements of the storage `entry`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    entry: str
    offset: int
    strides: tuple[int, ...]


def scan(path: Path) -> dict[str, Stored]:
    """Describes the tensors of a state dict by name, without reading any.

    Raises:
      CheckpointError: not a zip archive of `torch.save`, a damaged one, or a pickle with anything but tensors in it.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not in the zip format of torch >= 1.6; {_REMEDY}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} holds {len(pickles)} pickles, expected one state dict; {_REMEDY}")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise CheckpointError(f"{path} was written in big-endian byte order; {_REMEDY}")
            with archive.open(pickles[0]) as file:
                state = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(f"{path} cannot be read as a state dict ({type(error).__name__}: {error}).") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict; {_REMEDY}")
    return {str(name): _stored(name, described, path, root, entries) for name, described in state.items()}


def read(tensor: Stored) -> np.ndarray:
    """The tensor's values, in the file's dtype.

    Raises:
      CheckpointError: a damaged archive.
    """
    try:
        with zipfile.ZipFile(tensor.file) as archive:
            raw = archive.read(tensor.entry)
    except Exception as error:  # of a damaged archive, in many ways
        raise CheckpointError(f"{tensor.file}: {tensor.entry} cannot be read ({error}); is it whole?") from error
    size = tensor.dtype.itemsize
    strides = tuple(size * step for step in tensor.strides)
    return np.ndarray(tensor.shape, tensor.dtype, raw, size * tensor.offset, strides)


class _Unpickler(pickle._Unpickler):  # the Python version: a number in the file makes the C one allocate as it says
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _describer()
        if module == "torch" and name in _STORAGES:
            return name
        raise CheckpointError(f"its pickle asks for {module}.{name}, which a dict of tensors does not need: refused.")

    def persistent_load(self, pid: Any) -> Any:
        return pid  # ("storage", storage type, key, device, number of elements)


def _describer() -> Callable[..., tuple[Any, ...]]:
    # Made anew each time: a pickle can set attributes on whatever find_class gives it.
    def describe(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> tuple[Any, ...]:
        return storage, offset, shape, strides

    return describe


def _stored(name: str, described: Any, path: Path, root: str, entries: dict[str, zipfile.ZipInfo]) -> Stored:
    match described:
        case (("storage", str(kind), str(key), _, int()), int(offset), tuple(shape), tuple(strides)) if (
            kind in _STORAGES
            and len(shape) == len(strides)
            and all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *strides))
        ):
            tensor = Stored(shape, _STORAGES[kind], path, f"{root}data/{key}", offset, strides)
        case _:
            raise CheckpointError(f"{path}: entry {name!r} is not a tensor; {_REMEDY}")
    info = entries.get(tensor.entry)
    # torch.save never compresses; with that, no entry is larger than the file.
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: the storage of {name!r} is missing or compressed; is the file complete?")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    held = info.file_size // tensor.dtype.itemsize
    if math.prod(shape) > held or (0 not in shape and last >= held):
        raise CheckpointError(
            f"{path}: {name!r} of shape {shape}, strides {strides} and offset {offset} exceeds its storage of {held}."
        )
    return tensor


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as `torch.save` does: `torch.load(path, weights_only=True)` reads it.

    Raises:
      CheckpointError: a dtype that torch files do not have here.
    """
    kinds = {dtype: kind for kind, dtype in _STORAGES.items()}
    strange = {name: str(array.dtype) for name, array in tensors.items() if array.dtype not in kinds}
    if strange:
        raise CheckpointError(f"cannot write {strange} to {path}; expected one of {', '.join(map(str, kinds))}.")
    described = {
        name: _Tensor(_Storage(kinds[array.dtype], str(key), array.size), array.shape)
        for key, (name, array) in enumerate(tensors.items())
    }
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(described)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", b"3\n")


@dataclass(frozen=True)
class _Global:
    """A name in torch, which need not be importable here."""

    module: str
    name: str

    def __call__(self) -> None: ...  # pickle demands that what rebuilds an object is callable


@dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle._Pickler):  # the Python version: the C one looks names up itself
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", _Global("torch", obj.kind), obj.key, "cpu", obj.size) if isinstance(obj, _Storage) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> Any:
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())  # type: ignore[attr-defined]
            return None
        return super().save(obj, save_persistent_id)  # type: ignore[misc]

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        strides = tuple(math.prod(obj.shape[axis + 1 :]) for axis in range(len(obj.shape)))
        arguments: tuple[Any, ...] = (obj.storage, 0, obj.shape, strides, False, collections.OrderedDict())
        return _Global("torch._utils", "_rebuild_tensor_v2"), arguments
