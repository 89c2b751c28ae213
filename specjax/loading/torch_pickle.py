"""Reads tensors out of a `torch.save` file without torch and without executing the pickle in it.

The file is a zip archive: a pickle that describes tensors, and their raw storages. The unpickler knows the three things
that a state dict needs and refuses every other name.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from specjax.errors import CheckpointError

_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(
            f"the pickle asks for {module}.{name}, which a file of tensors does not need; it is refused."
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype)


def _rebuild(storage: np.ndarray, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    flat = storage[offset:]
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if min(shape, default=1) < 0 or min(stride, default=0) < 0 or (0 not in shape and last >= len(flat)):
        raise CheckpointError(
            f"a tensor of shape {shape} and strides {stride} does not fit its storage of {len(flat)}."
        )
    steps = tuple(s * flat.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).copy()


def load(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name.

    Raises:
      CheckpointError: not a zip archive of `torch.save`, a damaged one, or a pickle with anything but tensors in it.
    """
    remedy = "convert it with `safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)`."
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not in the zip format of torch >= 1.6; {remedy}")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise CheckpointError(f"{path} holds {len(names)} pickles; expected one state dict. Otherwise {remedy}")
        with archive.open(names[0]) as file:
            try:
                state = _Unpickler(file, archive, names[0].removesuffix("/data.pkl")).load()
            except (pickle.UnpicklingError, KeyError, ValueError, EOFError, TypeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                raise CheckpointError(f"{path} cannot be read as a state dict ({error}); {remedy}") from error
    if not isinstance(state, dict) or not all(isinstance(v, np.ndarray) for v in state.values()):
        raise CheckpointError(f"{path} does not hold a plain dict of tensors; {remedy}")
    return dict(state)
