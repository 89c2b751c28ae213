"""Model configs: what is read, and that nothing which would change results is ignored."""

import dataclasses

import pytest

import specjax as sj
from specjax.target.config import RopeScaling
from specjax.target.families import config_from_gguf, config_from_hf

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2"}
WINDOWED = {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}
FULL, SLIDING = ["full_attention"] * 2, ["sliding_attention"] * 2
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GGUF = {
    "general.architecture": "llama", "llama.vocab_size": 40, "llama.embedding_length": 32,
    "llama.feed_forward_length": 48, "llama.block_count": 2, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 64,
}  # fmt: skip


def test_the_same_model_from_both_formats():
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}  # which transformers' class has
    hf, gguf = config_from_hf(LLAMA), config_from_gguf(GGUF | ids, tied=False)
    assert dataclasses.replace(hf, name="") == dataclasses.replace(gguf, name="")
    assert (hf.head_dim, hf.group_size, hf.qkv_bias) == (8, 2, False)
    assert config_from_hf(QWEN2).qkv_bias


def test_rope_in_old_and_new_keys():
    scaling = LLAMA3 | {"original_max_position_embeddings": 32}
    old = config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = config_from_hf(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    linear = config_from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


def test_the_theta_inside_wins_over_the_one_beside():
    """As transformers 5 has it; also by layer type, and in the old name."""
    default = {"rope_type": "default", "rope_theta": 5e5}
    for rope in (
        {"rope_parameters": default},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": default},
        {"rope_scaling": default, "rope_parameters": {"rope_theta": 9.0}},
        {"rope_scaling": {}, "rope_parameters": default},
    ):
        assert config_from_hf(LLAMA | {"rope_theta": 10_000} | rope).rope_theta == 5e5
    by_layer = {"full_attention": default, "sliding_attention": {"rope_theta": 7.0}}
    assert config_from_hf(QWEN2 | {"rope_theta": 10_000, "rope_parameters": by_layer}).rope_theta == 5e5
    sliding = QWEN2 | WINDOWED | {"max_window_layers": 0, "rope_parameters": by_layer}
    assert config_from_hf(sliding).rope_theta == 7.0
    linear = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
    assert config_from_hf(QWEN2 | {"rope_theta": 3.0, "rope_parameters": linear}) == config_from_hf(
        QWEN2 | {"rope_theta": 3.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    )
    for wrong, message in (
        (LLAMA | {"rope_parameters": {"full_attention": default}}, "has none unless config.json lists layer_types"),
        (QWEN2 | {"rope_parameters": {"sliding_attention": default}}, "are of 'full_attention'"),
        (LLAMA | {"rope_parameters": default | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ):
        with pytest.raises(sj.ConfigError, match=message):
            config_from_hf(wrong)


def test_what_a_config_does_not_say_is_transformers_default():
    """Of the class; null says something."""
    short = {
        key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "max_position_embeddings")
    }
    llama, mistral = (
        config_from_hf(short | {"model_type": kind, "num_attention_heads": 8}) for kind in ("llama", "mistral")
    )
    assert (llama.bos_token_id, llama.eos_token_ids, llama.num_kv_heads, llama.max_positions) == (1, (2,), 8, 2048)
    assert (mistral.bos_token_id, mistral.eos_token_ids, mistral.max_positions) == (1, (2,), 131_072)
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, 4096)
    qwen2 = config_from_hf(short | {"model_type": "qwen2", "num_attention_heads": 32, "hidden_size": 64})
    assert (qwen2.bos_token_id, qwen2.eos_token_ids, qwen2.num_kv_heads, qwen2.max_positions) == (None, (), 32, 32_768)
    unsaid = config_from_hf(LLAMA | {"bos_token_id": None, "eos_token_id": None})
    assert (unsaid.bos_token_id, unsaid.eos_token_ids) == (None, ())
    assert config_from_hf(LLAMA | {"rope_scaling": LLAMA3}).rope_scaling.original_max_positions == 64
    beside = LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}
    assert config_from_hf(beside).rope_scaling.original_max_positions == 16


@pytest.mark.parametrize("wrong", [-1, 40, [2, 40]])
def test_stop_tokens_that_the_model_does_not_have(wrong):
    with pytest.raises(sj.ConfigError, match=r"eos_token_ids has (-1|40); expected ids from 0 to 39"):
        config_from_hf(LLAMA | {"eos_token_id": wrong})
    with pytest.raises(sj.ConfigError, match=r"eos_token_ids has (-1|40)"):
        config_from_hf(LLAMA, {"eos_token_id": wrong})
    with pytest.raises(sj.ConfigError, match="bos_token_id"):
        config_from_hf(LLAMA | {"bos_token_id": wrong})


def test_the_generation_configs_stop_tokens_win():
    both = config_from_hf(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [3, 5, 3]})
    assert both.eos_token_ids == (3, 5)
    assert config_from_hf(LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 9}, 9),
        ({"model_type": "qwen2", "sliding_window": 9}, None),  # off unless use_sliding_window
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, 4096),  # transformers' default
        ({"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        # Qwen2's layer_types win over max_window_layers, in both directions.
        (WINDOWED | {"layer_types": SLIDING}, 9),
        (WINDOWED | {"layer_types": SLIDING, "max_window_layers": 1}, 9),
        (WINDOWED | {"layer_types": FULL, "max_window_layers": 0}, None),
        (WINDOWED | {"layer_types": FULL, "max_window_layers": 1}, None),
        (WINDOWED | {"layer_types": None, "max_window_layers": 0}, 9),
        ({"model_type": "qwen2", "sliding_window": 9, "layer_types": FULL}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 9, "use_sliding_window": False, "max_window_layers": 1}, 9),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": SLIDING}, 9),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": FULL}, None),
        ({"sliding_window": 9}, None),  # a Llama has none
        ({"sliding_window": None, "use_sliding_window": True}, None),
        ({"use_sliding_window": True}, None),
        (WINDOWED | {"layer_types": ("sliding_attention",) * 2}, 9),
        ({"layer_types": FULL}, None),
    ],
)
def test_sliding_windows(changes, window):
    assert config_from_hf(LLAMA | changes).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "low"}}, "low_freq_factor='low'"),
        ({"rope_scaling": "linear"}, "expected an object"),
        ({"hidden_size": "x"}, "hidden_size='x'"),
        ({"hidden_size": 32.5}, "hidden_size=32.5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "'</s>'"),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1, "model_type": "qwen2"}, "1 of 2"),
        ({"model_type": "qwen2", "sliding_window": 9, "layer_types": SLIDING}, "contradicts sliding_window=9 and use_"),
        (WINDOWED | {"sliding_window": None, "layer_types": SLIDING}, "contradicts sliding_window=None"),
        (WINDOWED | {"layer_types": [FULL[0], SLIDING[0]]}, "expected 2 times"),
        (WINDOWED | {"layer_types": SLIDING[:1]}, "expected 2 times"),
        (WINDOWED | {"layer_types": []}, "expected 2 times"),
        (WINDOWED | {"layer_types": FULL * 2}, "expected 2 times"),
        (WINDOWED | {"layer_types": ["chunked_attention"] * 2}, "chunked_attention.*expected 2 times"),
        (WINDOWED | {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        (WINDOWED | {"sliding_window": "wide", "max_window_layers": 0}, "sliding_window='wide'"),
        ({"layer_types": SLIDING}, "contradicts"),
        ({"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        ({"sliding_window": 9, "use_sliding_window": True}, "a llama model has no windows"),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": FULL}, "contradicts sliding_window=9"),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": SLIDING}, "contradicts sliding_window=None"),
        ({"model_type": "mistral", "sliding_window": 9, "layer_types": [FULL[0], SLIDING[0]]}, "expected 2 times"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1"),
        ({"max_position_embeddings": 0}, "max_positions is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"factor is 0\.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(sj.ConfigError, match=message):
        config_from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "phi3"}, "'phi3'"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor"),
        ({"llama.rope.scaling.factor": -2.0}, r"factor is -2\.0"),
        ({"llama.rope.scaling.factor": [2.0]}, r"llama\.rope\.scaling\.factor=\[2\.0\]"),
        ({"llama.rope.scale_linear": "two"}, "llama.rope.scale_linear='two'"),
        ({"llama.block_count": None}, "block_count"),
        ({"llama.block_count": "x"}, "llama.block_count='x'"),
        ({"llama.block_count": 2.5}, "llama.block_count=2.5"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"llama\.attention\.head_count_kv=\[2, 1\]"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count": [4, 4]}, r"llama\.attention\.head_count="),
        ({"llama.attention.key_length": "8"}, "llama.attention.key_length='8'"),
        ({"llama.rope.dimension_count": []}, r"llama\.rope\.dimension_count=\[\]"),
        ({"llama.expert_count": "none"}, "llama.expert_count='none'"),
        ({"llama.embedding_length": float("nan")}, "llama.embedding_length=nan"),
        ({"llama.feed_forward_length": [48, 48]}, "llama.feed_forward_length="),
        ({"llama.context_length": float("inf")}, "llama.context_length=inf"),
        ({"llama.rope.freq_base": "x"}, "llama.rope.freq_base='x'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon=None"),
        ({"llama.attention.sliding_window": "x"}, "llama.attention.sliding_window='x'"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 5}, "llama.vocab_size=None"),
        ({"tokenizer.ggml.bos_token_id": "<s>"}, "tokenizer.ggml.bos_token_id='<s>'"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is"),
    ],
)
def test_gguf_metadata_that_is_refused(changes, message):
    with pytest.raises(sj.ConfigError, match=message):
        config_from_gguf(GGUF | changes, tied=False)


FACTOR, OLD, TYPE = "llama.rope.scaling.factor", "llama.rope.scale_linear", "llama.rope.scaling.type"


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({TYPE: "linear", FACTOR: 4.0}, 4.0),
        ({FACTOR: 4.0}, 4.0),  # llama.cpp's default type is linear
        ({OLD: 4.0}, 4.0),
        ({TYPE: "linear", OLD: 4.0}, 4.0),
        ({FACTOR: 4.0, OLD: 2.0}, 4.0),
        ({FACTOR: 0.5}, 0.5),
        ({FACTOR: 0.0, OLD: 2.0}, None),  # the newer key decides, whatever it says
        ({TYPE: "none", FACTOR: 4.0, OLD: 4.0}, None),
        ({TYPE: "linear", FACTOR: 0.0}, None),
        ({TYPE: "linear", FACTOR: 1.0}, None),
        ({FACTOR: 1.0}, None),
        ({OLD: 0}, None),
        ({TYPE: "none"}, None),
        ({}, None),
    ],
)
def test_linear_rope_scaling_in_gguf(changes, factor):
    expected = None if factor is None else RopeScaling("linear", factor)
    assert config_from_gguf(GGUF | changes, tied=False).rope_scaling == expected
    if factor is None:
        both = config_from_gguf(GGUF | changes, tied=False, rope_divisors=[1.0, 1.0, 2.0, 8.0])
        assert both.rope_scaling == RopeScaling("divisors", divisors=(1.0, 1.0, 2.0, 8.0))
    else:
        with pytest.raises(sj.ConfigError, match=f"4 entries beside linear scaling by {factor}"):
            config_from_gguf(GGUF | changes, tied=False, rope_divisors=[1.0, 1.0, 2.0, 8.0])


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, float("inf"), float("nan"), "2", None, True])
def test_rope_numbers_that_give_no_frequencies(bad):
    llama3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    with pytest.raises(sj.ConfigError, match=f"factor is {bad!r}"):
        RopeScaling("linear", bad)
    with pytest.raises(sj.ConfigError, match=f"contain {bad!r}"):
        RopeScaling("divisors", divisors=(1.0, bad))
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        with pytest.raises(sj.ConfigError, match=f"factor (is )?{bad!r}"):
            dataclasses.replace(llama3, **{name: bad})
    with pytest.raises(sj.ConfigError, match=f"original_max_positions is {bad!r}"):
        dataclasses.replace(llama3, original_max_positions=bad)
    with pytest.raises(sj.ConfigError, match=f"rope_theta is {bad!r}"):
        dataclasses.replace(sj.ModelConfig.preset("vicuna-7b"), rope_theta=bad)


def test_rope_scaling_that_contradicts_itself():
    for low, high in ((4.0, 4.0), (4.0, 1.0)):
        with pytest.raises(sj.ConfigError, match=f"low_freq_factor is {low} and high_freq_factor {high}"):
            RopeScaling("llama3", 8.0, low, high)
    with pytest.raises(sj.ConfigError, match="'yarn'"):
        RopeScaling("yarn", 2.0)


def test_presets():
    assert sj.ModelConfig.preset("qwen2.5-7b").vocab_size == 152_064
    with pytest.raises(sj.ConfigError, match=r"llama-3\.1-8b"):
        sj.ModelConfig.preset("gpt-2")
