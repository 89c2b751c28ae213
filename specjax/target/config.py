"""Model configuration: one frozen, hashable description of a Qwen2 or Llama decoder.

Read from checkpoints by `families`; the published presets stand below.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from specjax.checks import is_whole
from specjax.errors import ConfigError

MOST_LAYERS = 1000  # ten times as many as any published model has


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling.

    `linear` divides every frequency by `factor`. `llama3` (Llama 3.1) divides the long wavelengths by `factor`, keeps
    the short ones and interpolates between them. `divisors` divides each of the H/2 frequencies by its own number:
    how GGUF files store the `llama3` rule (tensor `rope_freqs.weight`).
    """

    kind: Literal["linear", "llama3", "divisors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "divisors"):
            raise ConfigError(f"the RoPE scaling is {self.kind!r}; expected 'linear', 'llama3' or 'divisors'.")
        if not _is_positive(self.factor):
            raise ConfigError(f"the RoPE scaling factor is {self.factor!r}; expected a finite number above 0.")
        if self.kind == "divisors" and not all(map(_is_positive, self.divisors)):
            wrong = [divisor for divisor in self.divisors if not _is_positive(divisor)]
            raise ConfigError(f"the RoPE divisors contain {wrong[0]!r}; expected finite numbers above 0.")
        if self.kind == "llama3":
            low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_positions
            if not (_is_positive(low) and _is_positive(high) and low < high):
                raise ConfigError(
                    f"low_freq_factor is {low!r} and high_freq_factor {high!r}; llama3 RoPE scaling interpolates "
                    "between them, so they must be finite, above 0, and the low one below the high one."
                )
            if not (is_whole(length) and length >= 1):
                raise ConfigError(f"original_max_positions is {length!r}; expected a positive integer.")


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and bool(0 < value < math.inf)  # NaN is not


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape, each size with its axis letter."""

    family: Literal["llama", "qwen2"]
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    max_positions: int = 2048  # tokens, prompt and continuation together
    sliding_window: int | None = None  # a query sees the last `sliding_window` positions, itself included
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    name: str = field(default="", compare=False)  # another name compiles nothing anew

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected a positive integer.")
        if self.num_layers > MOST_LAYERS:
            raise ConfigError(
                f"num_layers is {self.num_layers}; expected at most {MOST_LAYERS}. Is the config damaged?"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "grouped-query attention needs every key/value head to serve the same number of query heads."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even one.")
        if not _is_positive(self.rope_theta) or not (self.rms_norm_eps == 0 or _is_positive(self.rms_norm_eps)):
            raise ConfigError(
                f"rope_theta is {self.rope_theta!r} and rms_norm_eps {self.rms_norm_eps!r}; expected finite numbers, "
                "> 0 and >= 0."
            )
        for name, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", (self.bos_token_id,))):
            wrong = [token for token in ids if token is not None and not 0 <= token < self.vocab_size]
            if wrong:
                raise ConfigError(
                    f"{name} has {wrong[0]}; expected ids from 0 to {self.vocab_size - 1}. Correct it where the "
                    "files say so (config.json, generation_config.json, GGUF metadata), or remove it there."
                )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"sliding_window is {self.sliding_window}; expected a positive number of tokens, or None."
            )

    @property
    def group_size(self) -> int:
        """G, query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A published model's shape by name, e.g. for a randomly initialised stand-in of that size.

        Raises:
          ConfigError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; known are {sorted(PRESETS)}.")
        return PRESETS[name]


def _llama(name: str, vocab: int, d: int, f: int, layers: int, n: int, k: int, **more: Any) -> ModelConfig:
    return ModelConfig("llama", vocab, d, f, layers, n, k, d // n, name=name, **more)


def _qwen2(name: str, vocab: int, d: int, f: int, layers: int, n: int, k: int, **more: Any) -> ModelConfig:
    return ModelConfig(
        "qwen2", vocab, d, f, layers, n, k, d // n, rope_theta=1e6, rms_norm_eps=1e-6, qkv_bias=True,
        max_positions=32_768, bos_token_id=151_643, eos_token_ids=(151_645, 151_643), name=name, **more,
    )  # fmt: skip


_LLAMA31_ROPE = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)

PRESETS: dict[str, ModelConfig] = {
    c.name: c
    for c in (
        _llama(
            "smollm2-135m", 49_152, 576, 1536, 30, 9, 3, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
            max_positions=8192, bos_token_id=1, eos_token_ids=(2,),
        ),
        _llama(
            "vicuna-7b", 32_000, 4096, 11_008, 32, 32, 32, rms_norm_eps=1e-5, max_positions=4096, bos_token_id=1,
            eos_token_ids=(2,),
        ),
        _llama(
            "llama-3.1-8b", 128_256, 4096, 14_336, 32, 32, 8, rope_theta=5e5, rms_norm_eps=1e-5,
            rope_scaling=_LLAMA31_ROPE, max_positions=131_072, bos_token_id=128_000,
            eos_token_ids=(128_001, 128_008, 128_009),
        ),
        _qwen2("qwen2.5-0.5b", 151_936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        _qwen2("qwen2.5-1.5b", 151_936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
        _qwen2("qwen2.5-7b", 152_064, 3584, 18_944, 28, 28, 4),
    )
}  # fmt: skip
