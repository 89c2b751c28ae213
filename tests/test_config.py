"""Model configs: what is read, and that nothing which would change results is ignored."""

import dataclasses

import pytest

import specjax as sj
from specjax.config import RopeScaling

LLAMA = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GGUF = {
    "general.architecture": "llama", "llama.vocab_size": 40, "llama.embedding_length": 32,
    "llama.feed_forward_length": 48, "llama.block_count": 2, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 64,
}  # fmt: skip


def test_the_same_model_from_both_formats():
    hf, gguf = sj.ModelConfig.from_hf(LLAMA), sj.ModelConfig.from_gguf(GGUF, tied=False)
    assert dataclasses.replace(hf, name="") == dataclasses.replace(gguf, name="")
    assert (hf.head_dim, hf.group_size, hf.qkv_bias) == (8, 2, False)
    assert sj.ModelConfig.from_hf(QWEN2).qkv_bias


def test_rope_in_old_and_new_keys():
    scaling = LLAMA3 | {"original_max_position_embeddings": 32}
    old = sj.ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    new = sj.ModelConfig.from_hf(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    linear = sj.ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


def test_the_generation_configs_stop_tokens_win():
    both = sj.ModelConfig.from_hf(LLAMA | {"eos_token_id": 2}, {"eos_token_id": [3, 5, 3]})
    assert both.eos_token_ids == (3, 5)
    assert sj.ModelConfig.from_hf(LLAMA | {"eos_token_id": 2}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 9}, 9),
        ({"model_type": "qwen2", "sliding_window": 9}, None),  # off unless use_sliding_window
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, None),
    ],
)
def test_sliding_windows(changes, window):
    assert sj.ModelConfig.from_hf(LLAMA | changes).sliding_window == window


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
        ({"rope_scaling": LLAMA3}, "original_max_position_embeddings=None"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": "low"}}, "low_freq_factor='low'"),
        ({"rope_scaling": "linear"}, "expected an object"),
        ({"hidden_size": "x"}, "hidden_size='x'"),
        ({"hidden_size": 32.5}, "hidden_size=32.5"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "'</s>'"),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1, "model_type": "qwen2"}, "1 of 2"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window is -1"),
        ({"max_position_embeddings": 0}, "max_positions is 0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(sj.ConfigError, match=message):
        sj.ModelConfig.from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "phi3"}, "'phi3'"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.factor"),
        ({"llama.block_count": None}, "block_count"),
    ],
)
def test_gguf_metadata_that_is_refused(changes, message):
    with pytest.raises(sj.ConfigError, match=message):
        sj.ModelConfig.from_gguf(GGUF | changes, tied=False)


def test_presets():
    assert sj.ModelConfig.preset("qwen2.5-7b").vocab_size == 152_064
    with pytest.raises(sj.ConfigError, match=r"llama-3\.1-8b"):
        sj.ModelConfig.preset("gpt-2")
