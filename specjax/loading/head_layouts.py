"""The published layouts of Medusa heads, one row each, and how tensors in one of them become `Heads`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from specjax.checks import is_whole
from specjax.errors import CheckpointError, ConfigError
from specjax.heads import Heads, MedusaConfig, check_token_map
from specjax.target.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file that is not read yet."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class HeadLayout:
    """Tensor names as templates: `{i}` the head, `{j}` the residual layer, `{L}` the number of residual layers.

    Weights are [out, in] as in torch. Where no projection is stored, the heads share the target's LM head.
    """

    name: str
    weight: str  # [D D]
    bias: str  # [D]
    projection: str  # [V D]
    beside_base: bool = False  # may lie in the same files as the base model's weights
    is_vllm: bool = False  # with vLLM's token map, shared projection and missing biases

    def indices(self, name: str) -> tuple[int, int] | None:
        """(head, layer) where `name` is a residual layer's weight."""
        number = re.escape(self.weight).replace(r"\{i\}", r"(\d+)").replace(r"\{j\}", r"(\d+)")
        found = re.fullmatch(number, name)
        return None if found is None else (int(found[1]), int(found[2]))


LAYOUTS = (
    # Medusa v0.1; its "v2" has the same names without projections.
    HeadLayout("medusa", "{i}.{j}.linear.weight", "{i}.{j}.linear.bias", "{i}.{L}.weight"),
    # Medusa-2 models, next to the base weights.
    HeadLayout("bundled", "medusa_head.{i}.{j}.linear.weight", "medusa_head.{i}.{j}.linear.bias",
               "medusa_head.{i}.{L}.weight", beside_base=True),
    HeadLayout("abyo", "medusa_head.{i}.res.{j}.weight", "medusa_head.{i}.res.{j}.bias",
               "medusa_head.{i}.output.weight", beside_base=True),
    # TensorRT-LLM and ModelOpt.
    HeadLayout("tensorrt-llm", "medusa_heads.{i}.{j}.linear.weight", "medusa_heads.{i}.{j}.linear.bias",
               "medusa_heads.{i}.{L}.weight", beside_base=True),
    HeadLayout("vllm", "blocks.{i}.layers.{j}.weight", "blocks.{i}.layers.{j}.bias", "lm_heads.{i}.weight",
               is_vllm=True),
)  # fmt: skip


def read_published(
    tensors: Mapping[str, Tensor], extra: Mapping[str, Any], target: ModelConfig, dtype: DTypeLike
) -> Heads:
    """Heads out of `tensors` in any of `LAYOUTS`. Counts come from the names: published configs are sometimes wrong.

    Args:
      tensors: all that the files hold.
      extra: the config.json beside them, where there is one. Only vLLM's flags and `vocab_size` are looked at.
      target: gives the vocabulary where the tensors do not show it.
      dtype: of the parameters.

    Raises:
      CheckpointError: no known layout, or tensors that are unknown, missing or mis-shaped, all listed at once.
    """
    layout, heads, layers = _recognise(tensors)
    if layout.beside_base:
        tensors = {n: t for n, t in tensors.items() if not n.startswith("model.") and n != "lm_head.weight"}
    weights = [[layout.weight.format(i=i, j=j) for i in range(heads)] for j in range(layers)]
    biases = [[layout.bias.format(i=i, j=j) for i in range(heads)] for j in range(layers)]
    projections = [layout.projection.format(i=i, L=layers) for i in range(heads)]

    width = next((tensors[n].shape[0] for n in weights[0] if n in tensors and tensors[n].shape), target.hidden_size)
    vllm = extra if layout.is_vllm else {}
    vocab = _size(extra, "vocab_size", target.vocab_size)
    truncated = _size(vllm, "truncated_vocab_size", vocab)
    token_map = tensors.get("token_map") if layout.is_vllm else None
    ids = token_map.read() if token_map is not None and len(token_map.shape) == 1 else None
    if ids is not None and ids.size >= vocab:
        ids = None  # vLLM ignores a map that truncates nothing
    shares = bool(vllm.get("original_lm_head"))  # a stored projection is then a copy of the target's LM head
    full = not shares and any(name in tensors for name in projections)
    if full and ids is None:
        vocab = next((tensors[n].shape[0] for n in projections if n in tensors and tensors[n].shape), vocab)
    biased = not layout.is_vllm or vllm.get("medusa_fc_bias") or any(n in tensors for row in biases for n in row)

    # vLLM stores a truncated projection either cut down or whole.
    rows: list[Shape] = [(vocab, width)] if ids is None else [(ids.size, width), (vocab, width)]
    expected: dict[str, list[Shape]] = {name: [(width, width)] for row in weights for name in row}
    expected |= {name: [(width,)] for row in biases for name in row} if biased else {}
    expected |= dict.fromkeys(projections, rows) if full else {}
    optional: dict[str, list[Shape]] = dict.fromkeys((projections[0], "lm_head.weight"), rows) if shares else {}
    if token_map is not None or truncated < vocab:
        expected["token_map"] = [(truncated,) if token_map is None else token_map.shape[:1]]
    refuse(differences(expected, tensors, optional))

    order = slice(None) if ids is None else np.argsort(ids)  # ascending: ties go to the lowest id
    reduced = None if ids is None else jnp.asarray(ids[order].clip(-1, vocab), jnp.int32)
    size = None if ids is None else ids.size
    try:
        config = MedusaConfig(heads, width, vocab, layers, "full" if full else "shared", size)
        result = check_token_map(Heads({}, reduced, config))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error

    def stack(names: list[str]) -> Any:
        parts = np.empty((heads, *tensors[names[0]].shape), jnp.dtype(dtype))
        for part, name in zip(parts, names, strict=True):
            part[...] = tensors[name].read().T  # ours are [in, out]
        return jnp.asarray(parts)

    def project(name: str) -> Any:
        matrix = tensors[name].read()
        return jnp.asarray(matrix[order if ids is None or len(matrix) == ids.size else ids[order]], dtype)

    params: dict[str, Any] = {f"kernel_{j}": stack(row) for j, row in enumerate(weights)}
    params |= {f"bias_{j}": stack(row) if biased else jnp.zeros((heads, width), dtype) for j, row in enumerate(biases)}
    params |= {f"projection_{i}": project(name) for i, name in enumerate(projections)} if full else {}
    return replace(result, params=params)


def _size(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if not is_whole(value) or value < 1:
        raise CheckpointError(f"the heads' config.json has {key}={value!r}; expected a positive integer or null.")
    return int(value)


def _recognise(tensors: Mapping[str, Tensor]) -> tuple[HeadLayout, int, int]:
    """The layout with its numbers of heads and layers. They count indices: a gap then shows as unknown and missing."""
    for layout in LAYOUTS:
        found = {indices for name in tensors if (indices := layout.indices(name)) is not None}
        if found:
            return layout, len({i for i, _ in found}), len({j for _, j in found})
    raise CheckpointError(
        f"no Medusa heads in a known layout ({', '.join(one.name for one in LAYOUTS)}); the {len(tensors)} tensors "
        f"begin with {sorted(tensors)[:4]}. Is this a base model without heads?"
    )


def differences(
    expected: Mapping[str, list[Shape]], found: Mapping[str, Tensor], optional: Mapping[str, list[Shape]]
) -> list[str]:
    """What is wrong with the tensors `found`: a line for each problem. Every name lists the shapes it may have."""
    known = {**expected, **optional}
    problems = [f"missing: {name} {list(shapes[0])}" for name, shapes in expected.items() if name not in found]
    for name, tensor in found.items():
        if name not in known:
            problems.append(f"unknown: {name} {list(tensor.shape)}")
        elif tensor.shape not in known[name]:
            allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(known[name]))
            problems.append(f"shape: {name} is {list(tensor.shape)}, expected {allowed}")
        elif (tensor.dtype.kind == "i") != (name == "token_map"):
            problems.append(f"dtype: {name} is {tensor.dtype}, expected {'int' if name == 'token_map' else 'float'}s")
    return problems


def refuse(problems: list[str]) -> None:
    """Raises one `CheckpointError` with all `problems`, if there are any."""
    if problems:
        raise CheckpointError(f"{len(problems)} tensors do not fit:\n  " + "\n  ".join(problems))
