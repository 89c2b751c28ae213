"""Heads from every layout: files are written here from known weights, and the logits recomputed in NumPy."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from specjax.errors import CheckpointError, ConfigError
from specjax.heads import Heads, MedusaConfig, draft_projection, init_heads, project, top_tokens
from specjax.loading import head_files as heads_module
from specjax.loading.head_files import heads_metadata, load_heads, packaged_heads, save_heads
from specjax.loading.hf import load_hf, save_hf
from specjax.target.config import ModelConfig
from specjax.target.params import init

D, V = 8, 20
TARGET = ModelConfig("llama", V, D, 12, 1, 2, 2, 4)
HEADS, LAYERS = 3, 2
MAP = np.array([17, 2, 3, 11, 5])  # out of order on purpose


def _array(*shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


WEIGHTS = {(i, j): (_array(D, D, seed=10 * i + j), _array(D, seed=100 + 10 * i + j))
           for i in range(HEADS) for j in range(LAYERS)}  # fmt: skip
PROJECTIONS = [_array(V, D, seed=1000 + i) for i in range(HEADS)]
UNEMBEDDING = _array(V, D, seed=2000)
FEATURES = _array(6, D, seed=3000)

RESIDUAL = {
    "medusa": "{i}.{j}.linear",
    "bundled": "medusa_head.{i}.{j}.linear",
    "abyo": "medusa_head.{i}.res.{j}",
    "tensorrt-llm": "medusa_heads.{i}.{j}.linear",
    "vllm": "blocks.{i}.layers.{j}",
}
PROJECTION = {
    "medusa": "{i}.2.weight",
    "bundled": "medusa_head.{i}.2.weight",
    "abyo": "medusa_head.{i}.output.weight",
    "tensorrt-llm": "medusa_heads.{i}.2.weight",
    "vllm": "lm_heads.{i}.weight",
}


def _tensors(layout, projections=True, bias=True):
    out = {}
    for (i, j), (weight, offset) in WEIGHTS.items():
        name = RESIDUAL[layout].format(i=i, j=j)
        out |= {f"{name}.weight": weight} | ({f"{name}.bias": offset} if bias else {})
    if projections:
        out |= {PROJECTION[layout].format(i=i): matrix for i, matrix in enumerate(PROJECTIONS)}
    return out


def _expected(projections=PROJECTIONS, bias=True):
    """Logits [C, T, rows] in float64, torch's way: weights are [out, in]."""
    out = []
    for i, matrix in enumerate(projections):
        x = FEATURES.astype(np.float64)
        for j in range(LAYERS):
            z = x @ WEIGHTS[i, j][0].T + (WEIGHTS[i, j][1] if bias else 0)
            x = x + z / (1 + np.exp(-z))
        out.append(x @ matrix.T)
    return np.stack(out)


SHARED = [UNEMBEDDING] * HEADS


def _agree(heads, expected):
    logits = project(heads, draft_projection(heads, jnp.asarray(UNEMBEDDING)), jnp.asarray(FEATURES))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def _directory(path, tensors, config=None, name="model.safetensors"):
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path / name)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


# Published layouts


@pytest.mark.parametrize("layout", RESIDUAL)
@pytest.mark.parametrize("projections", [True, False])
def test_every_layout(layout, projections, tmp_path):
    _directory(tmp_path, _tensors(layout, projections))
    for source in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        heads = load_heads(source, TARGET)
        assert heads.config == MedusaConfig(HEADS, D, V, LAYERS, "full" if projections else "shared")
        _agree(heads, _expected(PROJECTIONS if projections else SHARED))


@pytest.mark.parametrize("name", ["medusa_lm_head.safetensors", "model.safetensors", "anything.safetensors"])
def test_heads_are_counted_not_believed(name, tmp_path):
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "version": "2", "base_model_name_or_path": "x"}
    heads = load_heads(_directory(tmp_path, _tensors("medusa"), config, name), TARGET)
    assert (heads.config.num_heads, heads.config.num_layers) == (HEADS, LAYERS)


@pytest.mark.parametrize("layout", ["bundled", "abyo", "tensorrt-llm"])
@pytest.mark.parametrize("sharded", [True, False])
def test_heads_next_to_base_weights(layout, sharded, tmp_path):
    save_hf(tmp_path, init(jax.random.key(0), TARGET), TARGET)
    everything = load_file(tmp_path / "model.safetensors") | _tensors(layout)
    if sharded:
        (tmp_path / "model.safetensors").unlink()
        names = sorted(everything)  # heads and base weights in every shard
        parts = {f"model-{k + 1}-of-3.safetensors": names[k::3] for k in range(3)}
        for file, part in parts.items():
            save_file({n: everything[n] for n in part}, tmp_path / file)
        index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(everything, tmp_path / "model.safetensors")
    heads = load_heads(tmp_path, TARGET)
    assert heads.config.num_heads == HEADS
    _agree(heads, _expected())


def test_a_bundled_directory_is_a_model_too(tmp_path):
    params = init(jax.random.key(0), TARGET)
    save_hf(tmp_path, params, TARGET)
    save_file(load_file(tmp_path / "model.safetensors") | _tensors("bundled"), tmp_path / "model.safetensors")
    loaded, _ = load_hf(tmp_path, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# vLLM

VLLM = {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": D, "vocab_size": V, "num_heads": HEADS,
        "num_hidden_layers": LAYERS, "truncated_vocab_size": V, "original_lm_head": False,
        "medusa_fc_bias": True}  # fmt: skip
TRUNCATED = VLLM | {"truncated_vocab_size": len(MAP)}


@pytest.mark.parametrize("stored", ["cut down", "whole"])
@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_vllm_token_map(stored, kind, tmp_path):
    tensors = _tensors("vllm") | {"token_map": MAP.astype(kind)}
    if stored == "cut down":
        tensors |= {f"lm_heads.{i}.weight": PROJECTIONS[i][MAP] for i in range(HEADS)}
    heads = load_heads(_directory(tmp_path, tensors, TRUNCATED), TARGET)
    assert heads.config == MedusaConfig(HEADS, D, V, LAYERS, "full", len(MAP))
    assert heads.token_map.tolist() == sorted(MAP)
    expected = _expected()[:, :, np.sort(MAP)]
    _agree(heads, expected)
    best = top_tokens(heads, None, jnp.asarray(FEATURES[0]), 2)
    np.testing.assert_array_equal(best, np.sort(MAP)[np.argsort(-expected[:, 0], -1)[:, :2]])


@pytest.mark.parametrize("name", ["lm_heads.0.weight", "lm_head.weight", None])
@pytest.mark.parametrize("truncated", [True, False])
def test_vllm_original_lm_head(name, truncated, tmp_path):
    tensors = _tensors("vllm", projections=False) | ({} if name is None else {name: UNEMBEDDING})
    tensors |= {"token_map": MAP} if truncated else {}
    config = (TRUNCATED if truncated else VLLM) | {"original_lm_head": True}
    heads = load_heads(_directory(tmp_path, tensors, config), TARGET)
    assert heads.config == MedusaConfig(HEADS, D, V, LAYERS, "shared", len(MAP) if truncated else None)
    _agree(heads, _expected(SHARED)[:, :, np.sort(MAP) if truncated else np.arange(V)])


def test_vllm_without_biases(tmp_path):
    tensors = _tensors("vllm", bias=False)
    config = {k: v for k, v in VLLM.items() if k != "medusa_fc_bias"}  # vLLM's default is false
    _agree(load_heads(_directory(tmp_path, tensors, config), TARGET), _expected(bias=False))
    with pytest.raises(CheckpointError, match=r"missing: blocks\.0\.layers\.0\.bias"):
        load_heads(_directory(tmp_path, tensors, VLLM), TARGET)


def test_vllm_biases_count_though_the_config_forgets_them(tmp_path):
    config = {k: v for k, v in VLLM.items() if k != "medusa_fc_bias"}
    _agree(load_heads(_directory(tmp_path, _tensors("vllm"), config), TARGET), _expected())


@pytest.mark.parametrize("key", ["truncated_vocab_size", "vocab_size"])
def test_vllm_sizes_may_be_null_but_nothing_else(key, tmp_path):
    _agree(load_heads(_directory(tmp_path, _tensors("vllm"), VLLM | {key: None}), TARGET), _expected())
    for wrong in ("20", [V], 0, 2.5):
        with pytest.raises(CheckpointError, match=f"{key}="):
            load_heads(_directory(tmp_path, _tensors("vllm"), VLLM | {key: wrong}), TARGET)


def test_vllm_map_that_truncates_nothing(tmp_path):
    tensors = _tensors("vllm") | {"token_map": np.arange(V)[::-1].copy()}  # vLLM does not apply it
    heads = load_heads(_directory(tmp_path, tensors, VLLM), TARGET)
    assert heads.token_map is None
    _agree(heads, _expected())


@pytest.mark.parametrize(
    ("token_map", "message"),
    [(None, r"missing: token_map \[5\]"), ([1, 2, 2, 3, 4], "ascend strictly"), ([0, 1, 2, 3, V], "ascend strictly"),
     ([-1, 1, 2, 3, 4], "ascend strictly"), ([0, 1, 2, 3, 2**32 + 4], "ascend strictly"),
     ([0.0, 1.0, 2.0, 3.0, 4.0], "dtype: token_map"), ([[0, 1, 2, 3, 4]], r"shape: token_map is \[1, 5\]")],
)  # fmt: skip
def test_vllm_refused_token_maps(token_map, message, tmp_path):
    tensors = _tensors("vllm") | ({} if token_map is None else {"token_map": np.array(token_map)})
    if token_map is not None and np.array(token_map).dtype == np.float64:
        tensors["token_map"] = tensors["token_map"].astype(np.float32)
    with pytest.raises(CheckpointError, match=message):
        load_heads(_directory(tmp_path, tensors, TRUNCATED), TARGET)


# Numbers


@pytest.mark.parametrize("projections", [True, False])
def test_bfloat16_is_exact(projections, tmp_path):
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in _tensors("medusa", projections).items()}
    heads = load_heads(_directory(tmp_path, tensors), TARGET)
    assert {p.dtype for p in heads.params.values()} == {jnp.dtype(jnp.bfloat16)}
    wide = load_heads(tmp_path, TARGET, dtype=jnp.float32)
    for i in range(HEADS):
        for params in (heads.params, wide.params):
            np.testing.assert_array_equal(np.asarray(params["kernel_1"][i]).T, tensors[f"{i}.1.linear.weight"])
            np.testing.assert_array_equal(np.asarray(params["bias_0"][i]), tensors[f"{i}.0.linear.bias"])
            if projections:
                np.testing.assert_array_equal(np.asarray(params[f"projection_{i}"]), tensors[f"{i}.2.weight"])


def test_other_dtypes_become_float32_unless_asked(tmp_path):
    tensors = {n: t.astype(np.float16) for n, t in _tensors("medusa").items()}
    heads = load_heads(_directory(tmp_path, tensors), TARGET)
    assert {p.dtype for p in heads.params.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(heads.params["projection_2"], tensors["2.2.weight"].astype(np.float32))
    half = load_heads(tmp_path, TARGET, dtype=jnp.bfloat16)
    assert {p.dtype for p in half.params.values()} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ConfigError, match="float16"):
        load_heads(tmp_path, TARGET, dtype=jnp.float16)


# Misfits


def test_all_misfits_at_once(tmp_path):
    tensors = _tensors("medusa")
    del tensors["1.0.linear.bias"], tensors["2.2.weight"]
    tensors["0.1.linear.weight"] = _array(D, D + 1, seed=0)
    tensors |= {"surprise": _array(2, seed=0), "0.0.linear.scale": _array(2, seed=0)}
    tensors["2.1.linear.bias"] = np.zeros(D, np.int32)
    with pytest.raises(CheckpointError) as caught:
        load_heads(_directory(tmp_path, tensors), TARGET)
    for line in ("missing: 1.0.linear.bias [8]", "missing: 2.2.weight [20, 8]", "unknown: surprise [2]",
                 "unknown: 0.0.linear.scale [2]", "shape: 0.1.linear.weight is [8, 9], expected [8, 8]",
                 "dtype: 2.1.linear.bias is int32, expected floats"):  # fmt: skip
        assert line in str(caught.value)
    assert "6 tensors" in str(caught.value)


def test_a_gap_in_the_numbering(tmp_path):
    tensors = {n.replace("2.", "7.", 1) if n.startswith("2.") else n: t for n, t in _tensors("medusa").items()}
    with pytest.raises(CheckpointError, match=r"(?s)missing: 2\.0\.linear\.weight.*unknown: 7\.0\.linear\.weight"):
        load_heads(_directory(tmp_path, tensors), TARGET)


def test_duplicates_and_strange_dtypes(tmp_path):
    tensors = _tensors("medusa")
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(
        {"0.0.linear.bias": _array(D, seed=1), "0.0.linear.scale": np.zeros(2, np.uint8)}, tmp_path / "b.safetensors"
    )
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"0.0.linear.scale": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"(?s)duplicate: 0\.0\.linear\.bias.*dtype: 0\.0\.linear\.scale is U8"):
        load_heads(tmp_path, TARGET)


@pytest.mark.parametrize(
    ("change", "found"),
    [({"vocab_size": 21}, "has 8 and 21"), ({"hidden_size": 12, "num_heads": 3, "num_kv_heads": 3}, "has 12 and 20")],
)  # fmt: skip
@pytest.mark.parametrize("native", [True, False])
def test_heads_of_another_model(change, found, native, tmp_path):
    file = _directory(tmp_path, _tensors("medusa")) / "model.safetensors"
    if native:
        save_heads(file, load_heads(file, TARGET))
    other = ModelConfig(**(TARGET.__dict__ | change))
    with pytest.raises(CheckpointError, match=f"hidden size 8 and vocabulary 20, the target {found}"):
        load_heads(file, other)


def test_the_config_tells_a_vocabulary_that_the_tensors_do_not_show(tmp_path):
    _directory(tmp_path, _tensors("medusa", projections=False), {"vocab_size": V + 5})
    with pytest.raises(CheckpointError, match="vocabulary 25, the target has 8 and 20"):
        load_heads(tmp_path, TARGET)


def test_base_model_without_heads(tmp_path):
    save_hf(tmp_path, init(jax.random.key(0), TARGET), TARGET)
    with pytest.raises(CheckpointError, match="no Medusa heads in a known layout"):
        load_heads(tmp_path, TARGET)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no heads at 'no-such-heads'.*packaged name"):
        load_heads("no-such-heads", TARGET)
    with pytest.raises(CheckpointError, match="no weights"):
        load_heads(tmp_path, TARGET)
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\['a.pt', 'b.safetensors'\]"):
        load_heads(tmp_path, TARGET)


@pytest.mark.parametrize("name", ["heads.safetensors", "medusa_lm_head.pt"])
def test_damaged_files(name, tmp_path):
    (tmp_path / name).write_bytes(b"not what it should be")
    with pytest.raises(CheckpointError, match=name):
        load_heads(tmp_path, TARGET)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_config(text, tmp_path):
    _directory(tmp_path, _tensors("medusa"))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        load_heads(tmp_path, TARGET)


# The native format


def _native(dtype=jnp.float32, projection="shared", ids=MAP):
    ids = None if ids is None else np.sort(ids)
    shape = MedusaConfig(HEADS, D, V, LAYERS, projection, None if ids is None else len(ids))
    heads = init_heads(shape, init(jax.random.key(0), TARGET), ids)
    params = {n: jnp.asarray(_array(*p.shape, seed=k), dtype) for k, (n, p) in enumerate(sorted(heads.params.items()))}
    return Heads(params, heads.token_map, shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("projection", ["full", "shared"])
@pytest.mark.parametrize("ids", [MAP, None])
def test_native_round_trip_is_exact(dtype, projection, ids, tmp_path):
    heads = _native(dtype, projection, ids)
    file = tmp_path / "run" / "heads.safetensors"
    save_heads(file, heads, {"hits": [[1, 2], [3, 4]], "note": "é"})
    for source in (file, file.parent):
        loaded = load_heads(source, TARGET)
        assert loaded.config == heads.config
        assert jax.tree.structure(loaded) == jax.tree.structure(heads)
        jax.tree.map(np.testing.assert_array_equal, loaded, heads)
        assert {p.dtype for p in loaded.params.values()} == {jnp.dtype(dtype)}
        assert heads_metadata(source) == {"hits": [[1, 2], [3, 4]], "note": "é"}
    other = load_heads(file, TARGET, dtype=jnp.float32)
    assert {p.dtype for p in other.params.values()} == {jnp.dtype(jnp.float32)}


def test_metadata_of_other_layouts_is_empty(tmp_path):
    assert heads_metadata(_directory(tmp_path, _tensors("medusa"))) == {}


def test_native_misfits(tmp_path):
    file = tmp_path / "heads.safetensors"
    save_heads(file, _native())
    with safe_open(file, "np") as opened:
        header = opened.metadata()

    def rewrite(tensors=None, **changes):
        save_file(
            load_file(file) if tensors is None else tensors, tmp_path / "w.safetensors", metadata=header | changes
        )
        return tmp_path / "w.safetensors"

    tensors = load_file(file)
    tensors["extra"] = tensors.pop("params.bias_1")
    tensors["token_map"] = tensors["token_map"][:-1]
    with pytest.raises(CheckpointError, match=r"(?s)missing: params\.bias_1.*unknown: extra.*shape: token_map"):
        load_heads(rewrite(tensors), TARGET)
    with pytest.raises(CheckpointError, match="version '2'"):
        load_heads(rewrite(version="2"), TARGET)
    for config in ("{", "[]", "3", '{"num_heads": 3}', '{"num_heads": 0, "hidden_size": 8, "vocab_size": 20}',
                   header["config"].replace("num_layers", "depth")):  # fmt: skip
        with pytest.raises(CheckpointError, match="does not describe heads"):
            load_heads(rewrite(config=config), TARGET)
    unsorted = load_file(file)
    unsorted["token_map"] = unsorted["token_map"][::-1].copy()
    with pytest.raises(CheckpointError, match="ascend"):
        load_heads(rewrite(unsorted), TARGET)


def test_native_files_are_named_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match=r"'heads\.bin'; change the name"):
        save_heads(tmp_path / "heads.bin", _native())


def test_packaged_names(tmp_path, monkeypatch):
    save_heads(tmp_path / "some-model.safetensors", _native())
    monkeypatch.setattr(heads_module, "_PACKAGED", tmp_path)
    assert packaged_heads() == ["some-model"]
    for name in ("some-model", "some-model-medusa"):
        assert load_heads(name, TARGET).config == _native().config
    with pytest.raises(CheckpointError, match=r"\['some-model'\]"):
        load_heads("other-model", TARGET)
