"""Hugging Face directories: every tensor in its place, every misfit reported, bf16 exact, memory bounded."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from specjax.errors import CheckpointError, ConfigError
from specjax.loading import safetensors
from specjax.loading.hf import load_hf, save_hf
from specjax.loading.load import load_draft, load_model, save_draft
from specjax.target.config import ModelConfig, RopeScaling
from specjax.target.params import abstract, init

CONFIG = ModelConfig("qwen2", 40, 16, 24, 2, 4, 2, 4, qkv_bias=True, max_positions=64)


@pytest.fixture
def params():
    leaves, treedef = jax.tree.flatten(init(jax.random.key(0), CONFIG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, random)


@pytest.fixture
def directory(params, tmp_path):
    save_hf(tmp_path, params, CONFIG)
    return tmp_path


def _equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_round_trip(params, directory):
    loaded, config = load_hf(directory, jnp.float32)
    assert dataclasses.replace(config, name="") == CONFIG
    _equal(loaded, params)


def test_each_tensor_lands_where_the_layer_says(params, directory):
    stored, layer = load_file(directory / "model.safetensors"), params.layers[1]
    at = "model.layers.1.self_attn."
    group = CONFIG.group_size
    for head in range(CONFIG.num_heads):  # query head n belongs to key/value head n // G
        rows = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
        np.testing.assert_array_equal(stored[f"{at}q_proj.weight"][rows], layer.qkv[head // group, head % group])
        np.testing.assert_array_equal(stored[f"{at}q_proj.bias"][rows], layer.qkv_bias[head // group, head % group])
        np.testing.assert_array_equal(stored[f"{at}o_proj.weight"][:, rows], layer.out[:, head // group, head % group])
    np.testing.assert_array_equal(stored[f"{at}k_proj.weight"][4:8], layer.qkv[1, group])
    np.testing.assert_array_equal(stored[f"{at}v_proj.weight"][4:8], layer.qkv[1, group + 1])
    np.testing.assert_array_equal(stored["model.layers.1.mlp.gate_proj.weight"], layer.gate_up[0])
    np.testing.assert_array_equal(stored["model.layers.1.mlp.up_proj.weight"], layer.gate_up[1])
    np.testing.assert_array_equal(stored["model.layers.1.mlp.down_proj.weight"], layer.down)


def test_bfloat16_round_trips_exactly(params, tmp_path):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    save_hf(tmp_path, params, CONFIG)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == ml_dtypes.bfloat16
    model = load_model(tmp_path, dtype=jnp.bfloat16)
    assert model.params.dtype == jnp.bfloat16
    _equal(model.params, params)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("asked", [jnp.float32, jnp.bfloat16])
def test_any_float_file_loads_into_the_dtype_asked_for(params, directory, stored, asked):
    _rewrite(directory, lambda tensors: tensors.update({k: v.astype(stored) for k, v in tensors.items()}))
    loaded, _ = load_hf(directory, asked)
    _equal(loaded, jax.tree.map(lambda a: np.asarray(a).astype(stored).astype(asked), params))


def _shard(directory, shards):
    """Splits model.safetensors: `shards` maps a tensor's number to the shards that hold it."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files, weight_map = {}, {}
    for number, (name, value) in enumerate(tensors.items()):
        for shard in shards(number):
            files.setdefault(shard, {})[name] = value
            weight_map[name] = f"model-{shard}.safetensors"
    for shard, content in files.items():
        save_file(content, directory / f"model-{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(params, directory):
    _shard(directory, lambda number: [number % 3])  # q, k and v of a layer lie in different files
    _equal(load_hf(directory, jnp.float32)[0], params)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors.*complete the download"):
        load_hf(directory, jnp.float32)


def test_all_misfits_are_reported_together(directory):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 16), np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
        tensors["scalar"] = np.array(1, np.float32)
        tensors["lm_head.weight"] = np.zeros((40, 16), np.int8)

    _rewrite(directory, spoil)
    _shard(directory, lambda number: [0, 1] if number == 0 else [0])
    with pytest.raises(CheckpointError, match="6 tensors") as error:
        load_hf(directory, jnp.float32)
    message = str(error.value)
    assert "missing: model.norm.weight [16]" in message
    assert "shape: model.layers.0.mlp.up_proj.weight is [5, 16], expected [24, 16]" in message
    assert "unknown: model.layers.2.mlp.up_proj.weight" in message
    assert "unknown: scalar []" in message
    assert "dtype: lm_head.weight is I8" in message
    assert "duplicate:" in message


def test_harmless_extras_are_dropped(params, tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    params = dataclasses.replace(params, lm_head=None)
    save_hf(tmp_path, params, config)
    extra = {
        "lm_head.weight": np.asarray(params.embed),  # tied, and stored twice
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
        "medusa_head.0.0.linear.weight": np.zeros((16, 16), np.float32),
    }
    _rewrite(tmp_path, lambda tensors: tensors.update(extra))
    _equal(load_hf(tmp_path, jnp.float32)[0], params)


@pytest.mark.filterwarnings("error")
def test_a_tied_model_may_store_either_name(params, tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    params = dataclasses.replace(params, lm_head=None)
    save_hf(tmp_path, params, config)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    _rewrite(tmp_path, rename)
    loaded, found = load_hf(tmp_path, jnp.float32)
    _equal(loaded, params)
    assert found.tie_word_embeddings
    _rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.embed_tokens\.weight"):
        load_hf(tmp_path, jnp.float32)


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_a_stored_head_that_differs_is_used(params, tmp_path, stored):
    """As transformers 5 does; whatever `tie_word_embeddings` says."""
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    save_hf(tmp_path, dataclasses.replace(params, lm_head=None), tied)
    head = np.asarray(params.embed).copy()
    head[-1, -1] += 0.5  # in the last number alone
    _rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head.astype(stored)}))
    with pytest.warns(UserWarning, match="says tie_word_embeddings, but its lm_head.weight differs"):
        loaded, config = load_hf(tmp_path, jnp.float32)
    assert not config.tie_word_embeddings
    _equal(loaded, dataclasses.replace(params, lm_head=jnp.asarray(head.astype(stored), jnp.float32)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json is not a JSON object"),
        ("model.safetensors", None, "neither model.safetensors nor"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0not json", "not readable as safetensors"),
    ],
)
def test_damaged_directories(directory, name, content, message):
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_hf(directory, jnp.float32)


def test_a_truncated_file_is_refused(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is it complete"):
        load_hf(directory, jnp.float32)


def test_divisors_cannot_be_saved(params, tmp_path):
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("divisors", divisors=(1.0, 2.0)))
    with pytest.raises(CheckpointError, match="divisors"):
        save_hf(tmp_path / "new", params, config)


def test_sources_that_do_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="packaged name"):
        load_model(tmp_path / "nothing" / "here")
    with pytest.raises(CheckpointError, match="there is no model at"):
        load_model("weights/model.gguf")
    code = "from specjax.loading.load import load_model; load_model('no-such-owner/no-such-model')"
    run = subprocess.run([sys.executable, "-c", code], env=_env(HF_HUB_OFFLINE="1"), capture_output=True, text=True)
    assert "CheckpointError: 'no-such-owner/no-such-model' is not a local directory and cannot be" in run.stderr


@pytest.mark.parametrize("dtype", [jnp.float16, "fp16"])
def test_other_dtypes_are_refused(directory, dtype):
    with pytest.raises(ConfigError, match=r"float16|fp16"):
        load_model(directory, dtype=dtype)


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "folder/a.safetensors", "..", "", "a\\b", "a\0b"])
def test_an_index_names_files_beside_it_alone(shard, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match="expected names of files beside it, without folders"):
        safetensors.files(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_damaged_indices_are_refused(directory, content):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json.*download complete"):
        load_hf(directory, jnp.float32)


@pytest.mark.parametrize("content", ["", "[]", "3"])
def test_configs_that_are_no_objects_are_refused(directory, content):
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json.*download complete"):
        load_hf(directory, jnp.float32)


def test_a_repositorys_token_map_comes_along(params, tmp_path, monkeypatch):
    save_draft(tmp_path / "hub", params, CONFIG, np.arange(40)[::-1])

    def download(repo, allow_patterns):  # what the hub would send: the files that match
        names = [file.name for file in (tmp_path / "hub").iterdir()]
        (tmp_path / "cache").mkdir()
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model, token_map = load_draft("someone/draft")
    assert model.config.name == "someone/draft"
    assert hash(model.config) == hash(load_model(tmp_path / "hub").config)  # one compilation for all of a shape
    assert model.config == load_model(tmp_path / "hub").config
    np.testing.assert_array_equal(token_map, np.arange(40)[::-1])


def test_a_directory_without_a_tokenizer_has_none(directory):
    assert load_model(directory).tokenizer is None


def _env(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


# VmHWM, the highest resident size: unlike getrusage's, it is not inherited from the parent process.
MEASURE = """
import sys, jax
from specjax.loading.hf import load_hf

def kilobytes(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0])

jax.block_until_ready(jax.numpy.zeros(3))
before = kilobytes("VmRSS")
params, _ = load_hf(sys.argv[1], sys.argv[2])
jax.block_until_ready(params)
print((kilobytes("VmHWM") - before) * 1024 / sum(a.nbytes for a in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("asked", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_loading_a_sharded_checkpoint_streams(asked, tmp_path):
    config = ModelConfig("llama", 16_000, 768, 2048, 8, 12, 4, 64, max_positions=64)
    rng = np.random.default_rng(0)
    save_hf(tmp_path, jax.tree.map(lambda a: jnp.asarray(rng.random(a.shape, np.float32)), abstract(config)), config)
    _shard(tmp_path, lambda number: [number % 8])
    assert sum(f.stat().st_size for f in tmp_path.glob("*.safetensors")) > 250e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), asked], env=_env(), capture_output=True, text=True, check=True
    )
    assert 0.9 < float(run.stdout) < 1.3
