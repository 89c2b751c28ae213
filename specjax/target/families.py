"""Families of decoders: one row each says what their checkpoints are called, hold and mean.

A further family is a row, and an optional leaf of `params` where it computes more. A feature that would change results
is honoured or refused here; nothing is ignored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from specjax.errors import ConfigError
from specjax.target.config import ModelConfig, RopeScaling

_HF_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "out": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}

_GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "out": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}

# Values of config.json that mean what this decoder computes; None: not said.
_FIXED: Mapping[str, Sequence[Any]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
      model_type: in Hugging Face's config.json.
      architecture: in GGUF metadata; None: no such files.
      decoder: what computes it, `ModelConfig.family`.
      causal_lm: the name of transformers' class.
      qkv_bias: whether q, k and v have biases.
      window: which models have a sliding window: none, all that name one, or those that ask for it.
      interleaved_gguf: whether GGUF pairs up neighbouring q and k rows for the rotation, in place of halves.
      defaults: of config.json's entries, as transformers' class has them.
      fixed: values of config.json beside `_FIXED` that mean what the decoder computes.
      hf_names, gguf_names: tensors by role, `{}` standing for the layer.
    """

    model_type: str
    architecture: str | None
    decoder: Literal["llama", "qwen2"]
    causal_lm: str
    qkv_bias: bool = False
    window: Literal["never", "always", "asked"] = "never"
    interleaved_gguf: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    hf_names: Mapping[str, str] = field(default_factory=lambda: _HF_NAMES)
    gguf_names: Mapping[str, str] = field(default_factory=lambda: _GGUF_NAMES)


FAMILIES = (
    Family(
        "llama",
        "llama",
        "llama",
        "LlamaForCausalLM",
        interleaved_gguf=True,
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    Family(
        "mistral",
        None,
        "llama",
        "MistralForCausalLM",
        window="always",
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    Family(
        "qwen2",
        "qwen2",
        "qwen2",
        "Qwen2ForCausalLM",
        qkv_bias=True,
        window="asked",
        defaults={"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096},
        fixed={"attention_bias": (True, False, None)},
    ),
)


def family_of(config: ModelConfig) -> Family:
    """The row that a model's files are written by: the first one of its decoder that has a window if it has one."""
    rows = [family for family in FAMILIES if family.decoder == config.family]
    return next((f for f in rows if (f.window == "never") == (config.sliding_window is None)), rows[0])


def _listed(names: Iterable[str | None]) -> str:
    *others, last = (repr(name) for name in names)
    return f"{', '.join(others)} and {last}" if others else last


def config_from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads a Hugging Face `config.json` (and `generation_config.json`, whose EOS list wins when it is there).

    Raises:
      ConfigError: a missing key, an unsupported `model_type`, or a feature this decoder does not compute.
    """
    kind = config.get("model_type")
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if family is None:
        raise ConfigError(f"model_type is {kind!r}; supported are {_listed(f.model_type for f in FAMILIES)}.")
    config = {**family.defaults, **config}  # what is null stays so: it may say something
    _refuse_unsupported(config, family)
    missing = [key for key in _HF_REQUIRED if config.get(key) is None]
    if missing:
        raise ConfigError(f"config.json lacks {missing}; is this the config of a causal {kind} model?")
    heads = _number(config, "num_attention_heads", int)
    if heads < 1:
        raise ConfigError(f"config.json has num_attention_heads={heads}; expected a positive number.")
    generation = dict(generation_config or {})
    eos = generation.get("eos_token_id")
    theta, scaling = _rope(config, family)
    return ModelConfig(
        family=family.decoder,
        vocab_size=_number(config, "vocab_size", int),
        hidden_size=_number(config, "hidden_size", int),
        intermediate_size=_number(config, "intermediate_size", int),
        num_layers=_number(config, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=_number(config, "num_key_value_heads", int, heads),
        head_dim=_number(config, "head_dim", int, _number(config, "hidden_size", int) // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
        qkv_bias=family.qkv_bias,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=_number(config, "max_position_embeddings", int),
        sliding_window=_sliding_window(config, family),
        bos_token_id=None if config.get("bos_token_id") is None else _number(config, "bos_token_id", int),
        eos_token_ids=_as_ids(config.get("eos_token_id") if eos is None else eos),
        name=str(config.get("_name_or_path") or kind),
    )


def config_from_gguf(
    metadata: Mapping[str, Any], *, tied: bool, rope_divisors: Sequence[float] | None = None
) -> ModelConfig:
    """Reads GGUF key/value metadata.

    Args:
      metadata: decoded values by key (`general.architecture`, `llama.block_count`, ...).
      tied: whether the file lacks `output.weight`, which is how GGUF says that the LM head is the embedding.
      rope_divisors: the tensor `rope_freqs.weight` [H/2] where the file has one (Llama 3.1 and later).

    Raises:
      ConfigError: an architecture other than `llama` or `qwen2`, a missing key, a value that is no number where one
        belongs, or unsupported RoPE scaling.
    """
    arch: Any = metadata.get("general.architecture")
    family = next((family for family in FAMILIES if family.architecture == arch and arch is not None), None)
    if family is None:
        known = _listed(f.architecture for f in FAMILIES if f.architecture)
        raise ConfigError(f"general.architecture is {arch!r}; GGUF files of {known} can be loaded.")

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
    vocab = metadata.get("tokenizer.ggml.tokens")
    return ModelConfig(
        family=family.decoder,
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
        qkv_bias=family.qkv_bias,
        tie_word_embeddings=tied,
        max_positions=number("context_length", int),
        sliding_window=number("attention.sliding_window", int, 0) or None,
        bos_token_id=None if metadata.get(bos) is None else _number(metadata, bos, int),
        eos_token_ids=_gguf_stops(metadata),
        name=str(metadata.get("general.name", arch)),
    )


# What ends a turn, a message or the text, by the names that published models give it.
_STOPS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>")
)
_CONTROL = 3  # gguf.TokenType.CONTROL


def _gguf_stops(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that the metadata name, and in a chat model the control tokens that are known to end something: what the
    Hugging Face files of the same model list. Not the one for unknown words, which some models call so."""
    named = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    tokens, types = (metadata.get(f"tokenizer.ggml.{part}") for part in ("tokens", "token_type"))
    if metadata.get("tokenizer.chat_template") and isinstance(tokens, Sequence) and isinstance(types, Sequence):
        unknown = metadata.get("tokenizer.ggml.unknown_token_id")
        named += [
            i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
            if kind == _CONTROL and token in _STOPS and i != unknown
        ]
    return _as_ids([token for token in named if token is not None])


_HF_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    for key, allowed in {**_FIXED, **family.fixed}.items():
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


def _rope(config: Mapping[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
    """Base and scaling, wherever they stand: as transformers 5 reads them, which takes `rope_scaling` before
    `rope_parameters`, whichever says something, and a `rope_theta` inside it before the one beside it."""
    name = next((name for name in ("rope_scaling", "rope_parameters") if config.get(name)), "rope_parameters")
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{name} is {rope!r}; expected an object with a rope_type.")
    if by_layer := {key: value for key, value in rope.items() if isinstance(value, Mapping)}:
        rope = _of_one_layer_type(by_layer, config, family, name)
    if rope.get("partial_rotary_factor") not in (1, None):
        raise ConfigError(
            f"{name} has partial_rotary_factor={rope['partial_rotary_factor']!r}; this decoder computes only 1.0."
        )
    beside = {} if config.get("rope_theta") is None else {"rope_theta": config["rope_theta"]}
    return _number({**beside, **_said(rope)}, "rope_theta", float, 10_000.0), _rope_scaling(rope, config)


def _of_one_layer_type(
    by_layer: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any], family: Family, name: str
) -> Mapping[str, Any]:
    used = "full_attention" if _sliding_window(config, family) is None else "sliding_attention"
    if family.window != "asked" and not config.get("layer_types"):
        raise ConfigError(
            f"{name} has entries by layer type, {sorted(by_layer)}, but a {family.model_type} model has none unless "
            "config.json lists layer_types; write the entry in place of them, or add layer_types."
        )
    if used not in by_layer:
        raise ConfigError(f"{name} has entries for {sorted(by_layer)}; the layers of this model are of {used!r}.")
    return by_layer[used]


def _said(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}


def _rope_scaling(rope: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _number(rope, "factor", float))
    if kind == "llama3":
        length = "original_max_position_embeddings"  # beside it wins, and the model's own length is the default
        return RopeScaling(
            "llama3",
            _number(rope, "factor", float),
            _number(rope, "low_freq_factor", float),
            _number(rope, "high_freq_factor", float),
            _number(
                {**_said(rope), **_said({length: config.get(length)})},
                length,
                int,
                config.get("max_position_embeddings"),
            ),
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


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    """The window as transformers has it, by the family's rule.

    `layer_types` decides which of Qwen2's layers use it, before `max_window_layers`; the others do not read it.
    """
    kind, layers, types = family.model_type, _number(config, "num_hidden_layers", int), config.get("layer_types")
    asked, window = bool(config.get("use_sliding_window")), config.get("sliding_window")
    says = f"sliding_window={window!r} and use_sliding_window={config.get('use_sliding_window')!r}"
    types = list(types) if isinstance(types, tuple) else types
    if family.window == "never" and asked and window is not None:
        raise ConfigError(f"config.json has {says}; a {kind} model has no windows. Is its model_type 'mistral'?")
    used = window is not None and (family.window == "always" or (family.window == "asked" and asked))
    if types is not None:
        if types not in (["full_attention"] * layers, ["sliding_attention"] * layers):
            raise ConfigError(
                f"layer_types is {types!r}; expected {layers} times 'full_attention' or {layers} times "
                "'sliding_attention'. Sliding windows in only some layers are not supported."
            )
        sliding = "sliding_attention" in types
        if (sliding and not used) or (family.window == "always" and used and not sliding):
            raise ConfigError(
                f"layer_types is {types!r}, which contradicts {says} in a {kind} model; correct the one that is wrong."
            )
        used = sliding
    elif used and family.window == "asked":
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
