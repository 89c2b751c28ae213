"""GGUF files of the `llama` and `qwen2` architectures: metadata, and tensors dequantised as they stream in.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read with the `gguf` package.
"""

import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from jax.typing import DTypeLike

from specjax.errors import CheckpointError
from specjax.loading import layout
from specjax.target.config import ModelConfig
from specjax.target.families import config_from_gguf, family_of
from specjax.target.params import Params

_ROPE_DIVISORS = "rope_freqs.weight"


def load_gguf(
    path: str | os.PathLike[str], dtype: DTypeLike, *, check_finite: bool = False
) -> tuple[Params, ModelConfig, dict[str, Any]]:
    """Reads a `.gguf` file, with the others where it is one of several (`NAME-00001-of-00003.gguf`).

    Args:
      path: the file, any of them.
      dtype: of the parameters; quantised tensors are dequantised through float32.
      check_finite: whether to look for numbers that are none.

    Returns:
      The parameters, the configuration, and the metadata (from which `Tokenizer.from_gguf` is made).

    Raises:
      CheckpointError: not a GGUF file, parts that are missing, a quantisation that the gguf package cannot read, or
        tensors that do not fit.
      ConfigError: an architecture or feature that the decoder does not compute.
    """
    readers = [_opened(part) for part in _parts(Path(path))]
    try:
        metadata = {key: field.contents() for key, field in readers[0].fields.items()}
    except Exception as error:  # of a damaged file, in many ways
        raise CheckpointError(
            f"the metadata of {path} cannot be read ({error!r}); is the download complete?"
        ) from error
    _check_parts(metadata, len(readers), path)
    for reader in readers:
        reader.fields.clear()  # one array header per token and merge: as large as a small model
    stored = [tensor for reader in readers for tensor in reader.tensors]
    tensors = {tensor.name: tensor for tensor in stored}

    def rows(name: str, start: int, stop: int) -> np.ndarray:
        tensor = tensors[name]
        return dequantize(tensor.data[start:stop], tensor.tensor_type)

    def shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest axis first

    divisors = tensors.get(_ROPE_DIVISORS)
    config = config_from_gguf(
        metadata,
        tied="output.weight" not in tensors,
        rope_divisors=None if divisors is None else rows(_ROPE_DIVISORS, 0, int(divisors.shape[0])).tolist(),
    )
    family = family_of(config)
    plan = layout.layout(config, family.gguf_names, interleaved_rope=family.interleaved_gguf)
    wanted = plan.shapes
    problems = layout.check(plan, ((t.name, shape(t)) for t in stored), lambda name: name == _ROPE_DIVISORS)
    problems += [
        f"type: {t.name} is quantised as {t.tensor_type.name}, which the gguf package cannot dequantise"
        for t in stored
        if t.name in wanted and not _readable(t.tensor_type)
    ]
    layout.refuse(problems, str(path))
    return layout.fill(plan, layout.finite(rows) if check_finite else rows, dtype), config, metadata


_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def _parts(path: Path) -> list[Path]:
    """All files of a model that is split over several, the one with the metadata first; otherwise the one."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part["count"])
    paths = [path.with_name(f"{part['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing or not paths:
        raise CheckpointError(
            f"{path} is one of {count} files of a model, and {', '.join(missing[:3])}{' ...' if missing[3:] else ''} "
            f"{'are' if len(missing) > 1 else 'is'} not beside it; download all of them."
        )
    return paths


def _check_parts(metadata: dict[str, Any], found: int, path: str | os.PathLike[str]) -> None:
    count = metadata.get("split.count")
    if found == 1 and isinstance(count, int) and count > 1:
        raise CheckpointError(
            f"{path} is one of {count} files of a model; give them back their names, such as "
            f"NAME-00001-of-{count:05}.gguf, and name one of them."
        )


def _opened(path: Path) -> "_Reader":
    try:
        return _Reader(path)
    except Exception as error:  # of a damaged file, in many ways
        raise CheckpointError(f"{path} cannot be read as a GGUF file ({error}); is the download complete?") from error


class _Reader(gguf.GGUFReader):
    """Slices plain arrays: of the package's own `np.memmap` each slice is dear, and it takes several for every token.

    A third of the time for a vocabulary of 49,152 tokens (3.3 s to 1.1 s). The file stays mapped.
    """

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        # The package takes what is left where less is left: a length that lies would be a loop without an end.
        if not 0 <= int(offset) <= int(offset) + np.dtype(dtype).itemsize * int(count) <= len(self._data):
            raise ValueError(f"{count} values at {offset} are beyond its {len(self._data)} bytes")
        return super()._get(offset, dtype, count, override_order)


def _readable(kind: gguf.GGMLQuantizationType) -> bool:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
