"""Medusa heads from and to files: the native format, and every published layout (see `LAYOUTS`)."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from specjax.config import ModelConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.heads import Heads, MedusaConfig, check_token_map
from specjax.loading import safetensors, torch_pickle

_FORMAT, _VERSION = "specjax.heads", "1"
_PACKAGED = resources.files("specjax") / "data" / "heads"


@dataclass(frozen=True)
class Layout:
    """How a project names head i's residual layer j (`weight` [D D], `bias` [D]) and its projection [R D].

    The patterns name their groups head, layer and kind. `prefix` says which tensors of a mixed file belong to heads.
    """

    name: str
    residual: re.Pattern[str]
    projection: re.Pattern[str]
    prefix: str = ""


def _layout(name: str, residual: str, projection: str, prefix: str = "") -> Layout:
    return Layout(name, re.compile(prefix + residual), re.compile(prefix + projection), prefix)


# In the order in which they are tried. In Medusa's own layouts the projection follows the residual layers as number L.
_MEDUSA = (r"(?P<head>\d+)\.(?P<layer>\d+)\.linear\.(?P<kind>weight|bias)", r"(?P<head>\d+)\.(?P<layer>\d+)\.weight")
LAYOUTS = (
    _layout("medusa", *_MEDUSA),  # v0.1; without projections: "v2", which shares the LM head
    _layout(
        "abyo",
        r"(?P<head>\d+)\.res\.(?P<layer>\d+)\.(?P<kind>weight|bias)",
        r"(?P<head>\d+)\.output\.weight",
        r"medusa_head\.",
    ),
    _layout("bundled", *_MEDUSA, r"medusa_head\."),  # Medusa-2 models: next to the base weights
    _layout("tensorrt-llm", *_MEDUSA, r"medusa_heads\."),  # and ModelOpt
    _layout(
        "vllm",
        r"blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<kind>weight|bias)",
        r"lm_heads\.(?P<head>\d+)\.weight",
    ),
)


def packaged_heads() -> list[str]:
    """The names of the heads that ship with specjax."""
    return sorted(e.name.removesuffix(".safetensors") for e in _PACKAGED.iterdir() if e.name.endswith(".safetensors"))


def load_heads(source: str | os.PathLike[str], config: ModelConfig, *, dtype: DTypeLike | None = None) -> Heads:
    """Loads Medusa heads for a target.

    Args:
      source: a packaged name, a file (`.safetensors`, or a `.pt` state dict, which is never executed), or a directory
        with heads in any of `LAYOUTS`, also next to base weights. The numbers of heads and residual layers are read
        off the tensors: published configs are sometimes wrong.
      config: the target's.
      dtype: of the parameters; None keeps the file's.

    Raises:
      CheckpointError: nothing there, an unknown layout, tensors that are missing, unknown or mis-shaped (all listed at
        once), or heads of another hidden size or vocabulary.
    """
    path = _resolve(source)
    metadata = _native_metadata(path)
    tensors, extra = _read(path)
    heads = _published(tensors, extra, config, path) if metadata is None else _native(tensors, metadata, path)
    if (heads.config.hidden_size, heads.config.vocab_size) != (config.hidden_size, config.vocab_size):
        raise CheckpointError(
            f"the heads in {path} have hidden size {heads.config.hidden_size} and vocabulary {heads.config.vocab_size}, "
            f"the target has {config.hidden_size} and {config.vocab_size}; they belong to another model."
        )
    if dtype is None:
        return heads
    return Heads({k: v.astype(dtype) for k, v in heads.params.items()}, heads.token_map, heads.config)


def save_heads(path: str | os.PathLike[str], heads: Heads, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes the native format: one safetensors file with the config and `metadata` (any JSON) in its header."""
    tensors = {f"params.{name}": np.asarray(value) for name, value in heads.params.items()}
    if heads.token_map is not None:
        tensors["token_map"] = np.asarray(heads.token_map)
    header = {"config": json.dumps(asdict(heads.config)), "metadata": json.dumps(dict(metadata or {}))}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": _FORMAT, "version": _VERSION, **header})


def heads_metadata(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The free-form metadata of heads in the native format; empty for other layouts."""
    native = _native_metadata(_resolve(source))
    return {} if native is None else json.loads(native["metadata"])


def _resolve(source: str | os.PathLike[str]) -> Path:
    if isinstance(source, str) and source in packaged_heads():
        return Path(str(_PACKAGED / f"{source}.safetensors"))
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"there are no heads at {str(source)!r}; expected a file, a directory, or one of {packaged_heads()}."
        )
    return path


def _native_metadata(path: Path) -> dict[str, str] | None:
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    metadata = safetensors.metadata(path)
    return metadata if metadata.get("format") == _FORMAT else None


def _native(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], path: Path) -> Heads:
    if metadata.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} is version {metadata.get('version')!r} of the format; this specjax reads {_VERSION!r}."
        )
    config = MedusaConfig(**json.loads(metadata["config"]))
    expected = _expected(config)
    problems = _differences(expected, {k.removeprefix("params."): v for k, v in tensors.items() if k != "token_map"})
    _refuse(problems, path)
    ids = jnp.asarray(tensors["token_map"], jnp.int32) if "token_map" in tensors else None
    return check_token_map(Heads({n: jnp.asarray(tensors[f"params.{n}"]) for n in expected}, ids, config))


def _expected(config: MedusaConfig) -> dict[str, tuple[int, ...]]:
    c, d = config.num_heads, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for j in range(config.num_layers):
        shapes |= {f"kernel_{j}": (c, d, d), f"bias_{j}": (c, d)}
    return shapes | ({"projection": (c, config.output_size, d)} if config.projection == "full" else {})


def _differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]) -> list[str]:
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unknown: {name}" for name in found if name not in expected]
    problems += [
        f"shape: {name} is {found[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    return problems


def _refuse(problems: list[str], path: Path) -> None:
    if problems:
        raise CheckpointError(f"the heads in {path} do not fit:\n  " + "\n  ".join(problems))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All tensors that may belong to heads, and the config.json beside them."""
    directory = path if path.is_dir() else path.parent
    settings = directory / "config.json"
    extra = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    if path.is_file():
        files = [path]
    else:
        names = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "medusa_heads.safetensors")
        files = [path / name for name in names if (path / name).is_file()][:1] or safetensors.files(path)
    if files[0].suffix == ".pt":
        return torch_pickle.load(files[0]), extra
    # Next to base weights only what is prefixed as heads is read.
    stored = list(safetensors.scan(files))
    mixed = any(t.name.startswith("model.") for t in stored)
    wanted = [t for t in stored if not mixed or t.name.startswith(("medusa_head.", "medusa_heads."))]
    return {t.name: safetensors.rows(t, 0, t.shape[0]) for t in wanted}, extra


def _published(tensors: dict[str, np.ndarray], extra: Mapping[str, Any], target: ModelConfig, path: Path) -> Heads:
    layout = next((one for one in LAYOUTS if any(one.residual.fullmatch(name) for name in tensors)), None)
    if layout is None:
        raise CheckpointError(
            f"{path} holds no Medusa heads in a known layout ({', '.join(one.name for one in LAYOUTS)}); its tensors "
            f"begin with {sorted(tensors)[:4]}."
        )
    token_map = tensors.pop("token_map", None)
    if extra.get("original_lm_head"):  # vLLM: its one projection is the target's LM head
        tensors = {name: t for name, t in tensors.items() if not layout.projection.fullmatch(name)}
    residual: dict[tuple[int, int, str], np.ndarray] = {}
    projection: dict[int, np.ndarray] = {}
    problems = []
    for name, tensor in tensors.items():
        if match := layout.residual.fullmatch(name):
            residual[int(match["head"]), int(match["layer"]), match["kind"]] = tensor
        elif match := layout.projection.fullmatch(name):
            projection[int(match["head"])] = tensor
        else:
            problems.append(f"unknown: {name}")
    heads = 1 + max(head for head, _, _ in residual)
    layers = 1 + max(layer for _, layer, _ in residual)
    width = next(iter(residual.values())).shape[-1]
    reduced = None if token_map is None else len(token_map)
    config = MedusaConfig(heads, width, target.vocab_size, layers, "full" if projection else "shared", reduced)
    rows = config.output_size
    for i in range(heads):
        for j in range(layers):
            for kind, shape in (("weight", (width, width)), ("bias", (width,))):
                found = residual.get((i, j, kind))
                if found is None and not (kind == "bias" and layout.name == "vllm" and not extra.get("medusa_fc_bias")):
                    problems.append(f"missing: head {i}, residual layer {j}, {kind}")
                elif found is not None and found.shape != shape:
                    problems.append(f"shape: head {i}, residual layer {j}, {kind} is {found.shape}, expected {shape}")
        if projection and i not in projection:
            problems.append(f"missing: head {i}, projection")
        elif projection and projection[i].shape != (rows, width):
            problems.append(f"shape: head {i}, projection is {projection[i].shape}, expected {(rows, width)}")
    problems += [f"unknown: head {i}, projection" for i in projection if i >= heads]
    _refuse(problems, path)
    params: dict[str, Any] = {}
    for j in range(layers):
        kernels = [residual[i, j, "weight"].T for i in range(heads)]  # torch keeps [out, in]
        params[f"kernel_{j}"] = jnp.asarray(np.stack(kernels))
        biases = [residual.get((i, j, "bias"), np.zeros(width, kernels[0].dtype)) for i in range(heads)]
        params[f"bias_{j}"] = jnp.asarray(np.stack(biases))
    order = None if token_map is None else np.argsort(token_map, kind="stable")  # ties go to the lowest id
    if projection:
        full = np.stack([projection[i] for i in range(heads)])
        params["projection"] = jnp.asarray(full if order is None else full[:, order])
    ids = None if token_map is None or order is None else jnp.asarray(token_map[order], jnp.int32)
    try:
        return check_token_map(Heads(params, ids, config))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
