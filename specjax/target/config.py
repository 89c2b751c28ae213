"""Model configuration: one frozen, hashable description of a Qwen2 or Llama decoder.

Sources: Hugging Face `config.json` (`from_hf`), GGUF metadata (`from_gguf`), and the published presets below.
A feature that would change results is honoured or refused here; nothing is ignored.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from specjax.checks import is_whole
from specjax.errors import ConfigError


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
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"sliding_window is {self.sliding_window}; expected a positive number of tokens, or None."
            )

    @property
    def group_size(self) -> int:
        """G, query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> "ModelConfig":
        """Reads a Hugging Face `config.json` (and `generation_config.json`, whose EOS list wins when it is there).

        Raises:
          ConfigError: a missing key, an unsupported `model_type`, or a feature this decoder does not compute.
        """
        kind = config.get("model_type")
        if kind not in ("llama", "mistral", "qwen2"):
            raise ConfigError(f"model_type is {kind!r}; supported are 'llama', 'mistral' and 'qwen2'.")
        _refuse_unsupported(config)
        missing = [key for key in _HF_REQUIRED if config.get(key) is None]
        if missing:
            raise ConfigError(f"config.json lacks {missing}; is this the config of a causal {kind} model?")
        heads = _number(config, "num_attention_heads", int)
        if heads < 1:
            raise ConfigError(f"config.json has num_attention_heads={heads}; expected a positive number.")
        generation = dict(generation_config or {})
        eos = generation.get("eos_token_id")
        return cls(
            family="qwen2" if kind == "qwen2" else "llama",
            vocab_size=_number(config, "vocab_size", int),
            hidden_size=_number(config, "hidden_size", int),
            intermediate_size=_number(config, "intermediate_size", int),
            num_layers=_number(config, "num_hidden_layers", int),
            num_heads=heads,
            num_kv_heads=_number(config, "num_key_value_heads", int, heads),
            head_dim=_number(config, "head_dim", int, _number(config, "hidden_size", int) // heads),
            rope_theta=_rope_theta(config),
            rope_scaling=_rope_scaling(config),
            rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
            qkv_bias=kind == "qwen2",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_positions=_number(config, "max_position_embeddings", int, 2048),
            sliding_window=_sliding_window(config),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_as_ids(config.get("eos_token_id") if eos is None else eos),
            name=str(config.get("_name_or_path") or kind),
        )

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], *, tied: bool, rope_divisors: Sequence[float] | None = None
    ) -> "ModelConfig":
        """Reads GGUF key/value metadata.

        Args:
          metadata: decoded values by key (`general.architecture`, `llama.block_count`, ...).
          tied: whether the file lacks `output.weight`, which is how GGUF says that the LM head is the embedding.
          rope_divisors: the tensor `rope_freqs.weight` [H/2] where the file has one (Llama 3.1 and later).

        Raises:
          ConfigError: an architecture other than `llama` or `qwen2`, a missing key, a value that is no number where one
            belongs, or unsupported RoPE scaling.
        """
        arch = metadata.get("general.architecture")
        if arch not in ("llama", "qwen2"):
            raise ConfigError(f"general.architecture is {arch!r}; GGUF files of 'llama' and 'qwen2' can be loaded.")

        def number(key: str, kind: type[_N], default: _N | None = None) -> _N:
            return _number(metadata, f"{arch}.{key}", kind, default)

        if experts := number("expert_count", int, 0):
            raise ConfigError(f"{arch}.expert_count is {experts}; mixture-of-experts layers are not supported.")
        heads, width = number("attention.head_count", int), number("embedding_length", int)
        if heads < 1:
            raise ConfigError(f"{arch}.attention.head_count is {heads}; expected a positive number.")
        head_dim = number("attention.key_length", int, width // heads)
        rotated = number("rope.dimension_count", int, head_dim)
        if rotated != head_dim:
            raise ConfigError(
                f"{arch}.rope.dimension_count is {rotated}, head_dim {head_dim}; partial rotary embeddings are not "
                "supported."
            )
        scaling = _gguf_scaling(metadata, arch)
        if rope_divisors is not None:
            if len(rope_divisors) != head_dim // 2 or scaling is not None:
                beside = "no linear scaling" if scaling is None else f"linear scaling by {scaling.factor}"
                raise ConfigError(
                    f"rope_freqs.weight has {len(rope_divisors)} entries beside {beside}; expected {head_dim // 2} "
                    "and no linear scaling."
                )
            scaling = RopeScaling("divisors", divisors=tuple(float(d) for d in rope_divisors))
        bos = "tokenizer.ggml.bos_token_id"
        eos = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        vocab = metadata.get("tokenizer.ggml.tokens")
        return cls(
            family="qwen2" if arch == "qwen2" else "llama",
            vocab_size=number("vocab_size", int, len(vocab) if isinstance(vocab, Sequence) else None),
            hidden_size=width,
            intermediate_size=number("feed_forward_length", int),
            num_layers=number("block_count", int),
            num_heads=heads,
            num_kv_heads=number("attention.head_count_kv", int, heads),
            head_dim=head_dim,
            rope_theta=number("rope.freq_base", float, 10_000.0),
            rope_scaling=scaling,
            rms_norm_eps=number("attention.layer_norm_rms_epsilon", float),
            qkv_bias=arch == "qwen2",
            tie_word_embeddings=tied,
            max_positions=number("context_length", int),
            sliding_window=number("attention.sliding_window", int, 0) or None,
            bos_token_id=None if metadata.get(bos) is None else _number(metadata, bos, int),
            eos_token_ids=_as_ids([token for token in eos if token is not None]),
            name=str(metadata.get("general.name", arch)),
        )

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A published model's shape by name, e.g. for a randomly initialised stand-in of that size.

        Raises:
          ConfigError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; known are {sorted(PRESETS)}.")
        return PRESETS[name]


_HF_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    kind = config["model_type"]
    expected: dict[str, Sequence[Any]] = {
        "hidden_act": ("silu", "swish", None),
        "attention_bias": (False, None) if kind != "qwen2" else (True, False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1.0, None),
        "quantization_config": (None,),
    }
    for key, allowed in expected.items():
        value = config.get(key)
        if value not in allowed:
            raise ConfigError(f"config.json has {key}={value!r}; this decoder computes only {allowed[0]!r}.")


_N = TypeVar("_N", int, float)


def _number(config: Mapping[str, Any], key: str, kind: type[_N], default: _N | None = None) -> _N:
    """A number out of a config; null and missing entries take the default, if there is one."""
    value = config.get(key)
    value = default if value is None else value
    try:
        number = kind(value)  # type: ignore[arg-type]
        if isinstance(value, str | bool) or number != value:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"the config has {key}={value!r}; expected {what}. Is the file complete?") from None
    return number


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers >= 5 writes rope_parameters (theta inside), earlier versions rope_scaling beside rope_theta.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_scaling is {rope!r}; expected an object with a rope_type.")
    return dict(rope)


def _rope_theta(config: Mapping[str, Any]) -> float:
    return _number({**_rope_parameters(config), **_given(config, "rope_theta")}, "rope_theta", float, 10_000.0)


def _given(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {} if config.get(key) is None else {key: config[key]}


def _rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    rope = _rope_parameters(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor", float))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            _number(rope, "factor", float),
            _number(rope, "low_freq_factor", float),
            _number(rope, "high_freq_factor", float),
            _number(rope, "original_max_position_embeddings", int),
        )
    raise ConfigError(f"rope_type is {kind!r}; supported are 'default', 'linear' and 'llama3'.")


def _gguf_scaling(metadata: Mapping[str, Any], arch: str) -> RopeScaling | None:
    """Linear scaling as llama.cpp reads it: the type when none is given, an older key for the factor, 0 for none."""
    kind = metadata.get(f"{arch}.rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise ConfigError(f"{arch}.rope.scaling.type is {kind!r}; GGUF files with 'none' or 'linear' can be loaded.")
    if kind == "none":
        return None
    keys = (f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear")
    key = next((key for key in keys if metadata.get(key) is not None), keys[0])
    factor = _number(metadata, key, float, 1.0 if kind is None else None)
    return None if factor in (0, 1) else RopeScaling("linear", factor)


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window as transformers has it: Llama never has one, Mistral always, Qwen2 where `use_sliding_window` says so.

    `layer_types` decides which of Qwen2's layers use it, before `max_window_layers`; the others do not read it.
    """
    kind, layers, types = config["model_type"], _number(config, "num_hidden_layers", int), config.get("layer_types")
    asked, window = bool(config.get("use_sliding_window")), config.get("sliding_window")
    given = window if kind == "llama" else config.get("sliding_window", 4096)  # transformers' default
    says = f"sliding_window={window!r} and use_sliding_window={config.get('use_sliding_window')!r}"
    types = list(types) if isinstance(types, tuple) else types
    if kind == "llama" and asked and given is not None:
        raise ConfigError(f"config.json has {says}; a llama model has no windows. Is its model_type 'mistral'?")
    used = given is not None and (kind == "mistral" or (kind == "qwen2" and asked))
    if types is not None:
        if types not in (["full_attention"] * layers, ["sliding_attention"] * layers):
            raise ConfigError(
                f"layer_types is {types!r}; expected {layers} times 'full_attention' or {layers} times "
                "'sliding_attention'. Sliding windows in only some layers are not supported."
            )
        sliding = "sliding_attention" in types
        if (sliding and not used) or (kind == "mistral" and used and not sliding):
            raise ConfigError(
                f"layer_types is {types!r}, which contradicts {says} in a {kind} model; correct the one that is wrong."
            )
        used = sliding
    elif used and kind == "qwen2":
        full = _number(config, "max_window_layers", int, 28)  # 28: transformers' default
        if 0 < full < layers:
            raise ConfigError(
                f"max_window_layers is {full} of {layers}; sliding windows in only some layers are not supported."
            )
        used = full <= 0  # the first `max_window_layers` layers attend to everything
    return _number(config, "sliding_window", int, 4096) if used else None


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = [value] if isinstance(value, int) else value
    if not isinstance(ids, Sequence) or not all(isinstance(token, int | np.integer) for token in ids):
        raise ConfigError(f"eos_token_id is {value!r}; expected a token id or a list of them.")
    return tuple(dict.fromkeys(int(token) for token in ids))


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
