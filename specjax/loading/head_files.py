"""Medusa heads from and to files: the native format here, the published layouts in `head_layouts`."""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save as serialised

from specjax.checks import check_is
from specjax.errors import CheckpointError, ConfigError
from specjax.files import write_atomically
from specjax.fingerprint import fingerprint
from specjax.heads import Heads, MedusaConfig, MedusaHeads, check_token_map
from specjax.loading import safetensors, torch_pickle
from specjax.loading.head_layouts import Tensor, differences, read_published, refuse
from specjax.loading.json_files import json_object
from specjax.loading.load import Model
from specjax.target.config import ModelConfig
from specjax.target.params import Params, check_dtype

BACKBONE = "backbone"  # the folder beside Medusa-2's heads with what they belong to; its fingerprint in their metadata
_FORMAT, _VERSION = "specjax.heads", "1"
_PACKAGED = resources.files("specjax") / "data" / "heads"
_USUAL_NAMES = ("heads.safetensors", "medusa_lm_head.safetensors", "medusa_lm_head.pt")
_DTYPES = {**safetensors.DTYPES, "I32": np.int32, "I64": np.int64}


def packaged_heads() -> list[str]:
    """The names of the heads that ship with specjax."""
    entries = _PACKAGED.iterdir() if _PACKAGED.is_dir() else ()
    return sorted(e.name.removesuffix(".safetensors") for e in entries if e.name.endswith(".safetensors"))


def load_heads(source: str | os.PathLike[str], config: ModelConfig, *, dtype: DTypeLike | None = None) -> Heads:
    """Loads Medusa heads for a target.

    Args:
      source: a packaged name (the target's, "-medusa" may follow), a `.safetensors` file, a `.pt` state dict, whose
        pickle is never executed, or a directory with either, also next to base weights, single or sharded.
        The native format and every published layout are read (`head_layouts.LAYOUTS`). The numbers of heads and of
        residual layers come from the tensors: published configs are sometimes wrong.
      config: the target's.
      dtype: float32 or bfloat16; None keeps bfloat16 files as they are and reads all others as float32.

    Raises:
      CheckpointError: nothing there, damaged files, an unknown layout, tensors that are missing, unknown or mis-shaped
        (all listed at once), or heads of another hidden size or vocabulary.
      ConfigError: another `dtype`, or a `config` that is none.
    """
    if dtype is not None:
        check_dtype(dtype)
    check_is(config, ModelConfig, "the target's config", "pass model.config.")
    files = _files(_resolve(source))
    try:
        tensors, extra = _tensors(files), json_object(files[0].parent / "config.json") or {}
        native = _native_header(files[0])
        if dtype is None:
            floats = {t.dtype for t in tensors.values() if t.dtype.kind != "i"}
            dtype = jnp.bfloat16 if floats == {jnp.dtype(jnp.bfloat16)} else jnp.float32
        if native is None:
            heads = read_published(tensors, extra, config, dtype)
        else:
            heads = _read_native(tensors, native, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"the heads at {str(source)!r} cannot be loaded: {error}") from error
    what = f"the heads at {str(source)!r}"
    heads.config.check_target(config.hidden_size, config.vocab_size, what=what, error=CheckpointError)
    return heads


def save_heads(path: str | os.PathLike[str], heads: Heads, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes the native format: one safetensors file with the config and `metadata` (any JSON) in its header.

    Raises:
      CheckpointError: a `path` that does not end in .safetensors, by which `load_heads` knows the format.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"heads are written as .safetensors files, not as {path.name!r}; change the name.")
    tensors = {f"params.{name}": np.asarray(value) for name, value in heads.params.items()}
    if heads.token_map is not None:
        tensors["token_map"] = np.asarray(heads.token_map)
    header = {"config": json.dumps(dataclasses.asdict(heads.config)), "metadata": json.dumps(dict(metadata or {}))}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = serialised(tensors, metadata={"format": _FORMAT, "version": _VERSION, **header})
    write_atomically(Path(path), whole, error=CheckpointError)


def heads_metadata(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_heads` wrote with the heads; empty for other layouts. Raises as `load_heads`."""
    native = _native_header(_files(_resolve(source))[0])
    try:
        return {} if native is None else dict(json.loads(native.get("metadata", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata in the header of the heads at {str(source)!r} is no JSON object ({error}); was it edited?"
        ) from error


def backbone_of(source: str | os.PathLike[str] | None, target: Params) -> tuple[dict[str, str], str | None]:
    """What heads say of the backbone that they belong to (Medusa-2's), and what is wrong with `target`.

    Gives ({"backbone": its fingerprint}, None) where the target is that backbone, ({}, None) for heads that name none,
    or where there are none, and ({}, what to say) where the target is another one.

    Raises as `load_heads`.
    """
    own = None if source is None else heads_metadata(source).get(BACKBONE)
    if own is None:
        return {}, None
    if own == fingerprint(target):
        return {BACKBONE: own}, None
    return {}, (
        f"the heads at {str(source)!r} belong to a backbone that was fitted with them, or with those that they go on "
        f"from (Medusa-2), and the model is another; name as the model the folder {BACKBONE!r} that was written then."
    )


def heads_for(model: Model, source: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Heads:
    """As `load_heads`; warns where the heads belong to another backbone. Their drafts are verified all the same."""
    heads = load_heads(source, model.config, dtype=dtype)
    if wrong := backbone_of(source, model.params)[1]:
        warnings.warn(f"{wrong} With this one fewer drafts are accepted.", stacklevel=2)
    return heads


def packaged_ranks(source: str | os.PathLike[str]) -> Path | None:
    """The rank table (`specjax.ranks`) that lies beside heads, named like them with .ranks.npz, if any."""
    file = _files(_resolve(source))[0]
    ranks = file.with_name(file.name.removesuffix(file.suffix) + ".ranks.npz")
    return ranks if ranks.is_file() else None


def _resolve(source: str | os.PathLike[str]) -> Path:
    if isinstance(source, str):
        for name in (source, source.removesuffix("-medusa")):
            if name in packaged_heads():
                return Path(str(_PACKAGED / f"{name}.safetensors"))
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(f"the heads' source is {source!r}; expected a packaged name or a path.")
    path = Path(source).expanduser()
    if not os.fspath(source) or not path.exists():
        raise CheckpointError(
            f"there are no heads at {str(source)!r}; expected a .safetensors or .pt file, a directory with one, or a "
            f"packaged name, of which there are {packaged_heads()}."
        )
    return path


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    usual = [path / name for name in _USUAL_NAMES if (path / name).is_file()]
    if usual:
        return usual[:1]
    if (path / safetensors.SINGLE).exists() or (path / safetensors.INDEX).exists():
        return safetensors.files(path)
    others = sorted(file for kind in ("*.safetensors", "*.pt", "*.bin") for file in path.glob(kind))
    if len(others) != 1:
        raise CheckpointError(
            f"{path} has {[file.name for file in others] or 'no weights'}; expected one of {list(_USUAL_NAMES)}, "
            f"{safetensors.SINGLE} or its index, or a single other file. Name the file itself."
        )
    return others


def _tensors(files: list[Path]) -> dict[str, Tensor]:
    if files[0].suffix != ".safetensors":
        pickled = torch_pickle.scan(files[0])
        return {n: Tensor(t.shape, t.dtype, partial(torch_pickle.read, t)) for n, t in pickled.items()}
    found: dict[str, Tensor] = {}
    problems = []
    for stored in safetensors.scan(files):
        if stored.name in found:
            problems.append(f"duplicate: {stored.name} is stored twice")
        elif stored.dtype not in _DTYPES:
            problems.append(f"dtype: {stored.name} is {stored.dtype}, expected one of {', '.join(_DTYPES)}")
        else:
            everything = partial(safetensors.rows, stored, 0, stored.shape[0] if stored.shape else 0)
            found[stored.name] = Tensor(stored.shape, np.dtype(_DTYPES[stored.dtype]), everything)
    refuse(problems)
    return found


def _native_header(path: Path) -> dict[str, str] | None:
    header = safetensors.metadata(path) if path.suffix == ".safetensors" else {}
    return header if header.get("format") == _FORMAT else None


def _read_native(tensors: Mapping[str, Tensor], header: Mapping[str, str], dtype: DTypeLike) -> Heads:
    if header.get("version") != _VERSION:
        raise CheckpointError(f"version {header.get('version')!r} of the format; this specjax reads {_VERSION!r}.")
    try:
        config = MedusaConfig(**json.loads(header["config"]))
        abstract = jax.eval_shape(MedusaHeads(config).init, jax.random.key(0), jnp.zeros((1, config.hidden_size)))
        expected = {f"params.{name}": [leaf.shape] for name, leaf in abstract["params"].items()}
        size = config.reduced_vocab_size
        refuse(differences(expected | ({} if size is None else {"token_map": [(size,)]}), tensors, {}))
        params = {name: jnp.asarray(tensors[f"params.{name}"].read(), dtype) for name in abstract["params"]}
        ids = None if size is None else jnp.asarray(tensors["token_map"].read(), jnp.int32)
        return check_token_map(Heads(params, ids, config))
    except (ConfigError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the config in its header does not describe heads ({error}).") from error
