"""Exported heads: names, shapes and configs against the published table, and bit-exact round trips."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TEMPLATE, byte_tokenizer, tiny_model
from safetensors.numpy import load_file

import specjax as sj
from specjax.cli.main import main
from specjax.fingerprint import fingerprint
from specjax.heads import init_heads
from specjax.loading import torch_pickle
from specjax.loading.export import TARGETS, export_heads
from specjax.loading.head_files import heads_metadata
from specjax.loading.hf import load_hf, save_hf

D, V, C, L = 16, 61, 3, 2
KEEP = np.array([0, 3, 9, 20, 60])

# target -> (residual layer, projection), config with full projections
TABLE = {
    "medusa": (
        "{i}.{j}.linear.", "{i}.2.weight",
        {"medusa_num_heads": C, "medusa_num_layers": L, "base_model_name_or_path": "base"},
    ),
    "medusa-v2": (
        "{i}.{j}.linear.", None,
        {"medusa_num_heads": C, "medusa_num_layers": L, "base_model_name_or_path": "base", "version": "2"},
    ),
    "bundled": (
        "medusa_head.{i}.{j}.linear.", "medusa_head.{i}.2.weight",
        {"medusa_num_heads": C, "medusa_num_layers": L, "base_model_name_or_path": "base"},
    ),
    "abyo": ("medusa_head.{i}.res.{j}.", "medusa_head.{i}.output.weight", None),
    "vllm": (
        "blocks.{i}.layers.{j}.", "lm_heads.{i}.weight",
        {
            "model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": D, "vocab_size": V, "num_heads": C,
            "num_hidden_layers": L, "truncated_vocab_size": V, "original_lm_head": False, "medusa_fc_bias": True,
        },
    ),
    "tensorrt-llm": (
        "medusa_heads.{i}.{j}.linear.", "medusa_heads.{i}.2.weight", {"num_medusa_heads": C, "num_medusa_layers": L},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return tiny_model()


def made(model, projection, keep=None, dtype=jnp.float32):
    """Random heads."""
    shape = sj.MedusaConfig(C, D, V, L, projection, None if keep is None else len(keep))
    heads = init_heads(shape, model.params, keep)
    keys = jax.random.split(jax.random.key(0), len(heads.params))
    noisy = {
        n: jax.random.normal(k, v.shape).astype(dtype) for k, (n, v) in zip(keys, heads.params.items(), strict=True)
    }
    return dataclasses.replace(heads, params=noisy)


def same(a, b):
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert jax.tree.map(lambda x: x.dtype, a.params) == jax.tree.map(lambda x: x.dtype, b.params)
    np.testing.assert_array_equal(a.token_map, b.token_map)


@pytest.mark.parametrize("name", TABLE)
def test_names_shapes_and_configs_are_the_published_ones(target, name, tmp_path):
    block, projection, config = TABLE[name]
    heads = made(target, "full" if projection else "shared")
    file = export_heads(tmp_path, heads, target, name, base_model="base")
    if file.suffix == ".pt":
        stored = {n: torch_pickle.read(t) for n, t in torch_pickle.scan(file).items()}
    else:
        stored = load_file(file)
    expected = {}
    for i in range(C):
        for j in range(L):
            expected[block.format(i=i, j=j) + "weight"] = np.asarray(heads.params[f"kernel_{j}"])[i].T
            expected[block.format(i=i, j=j) + "bias"] = np.asarray(heads.params[f"bias_{j}"])[i]
        if projection:
            expected[projection.format(i=i)] = np.asarray(heads.params[f"projection_{i}"])
    ours = {n: t for n, t in stored.items() if not n.startswith("model.") and n != "lm_head.weight"}
    assert set(ours) == set(expected)
    for tensor, value in expected.items():
        np.testing.assert_array_equal(ours[tensor], value)
    if config is None:
        assert [f.name for f in tmp_path.iterdir()] == [file.name]
        return
    written = json.loads((tmp_path / "config.json").read_text())
    if name == "bundled":
        assert config.items() <= written.items()
        params, base = load_hf(tmp_path, jnp.float32)  # still the base model
        jax.tree.map(np.testing.assert_array_equal, params, target.params)
        assert base.vocab_size == V
    else:
        assert written == config


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("projection", ["full", "shared"])
@pytest.mark.parametrize("name", TARGETS)
def test_round_trips_are_exact(target, name, projection, dtype, tmp_path):
    heads = made(target, projection, dtype=dtype)
    if TARGETS[name].projection not in ("any", projection):
        with pytest.raises(sj.ConfigError, match="take medusa"):
            export_heads(tmp_path, heads, target, name, base_model="base")
        return
    model = dataclasses.replace(target, params=jax.tree.map(lambda p: p.astype(dtype), target.params))
    file = export_heads(tmp_path / "out", heads, model, name, base_model="base")
    same(sj.load_heads(tmp_path / "out", target.config, dtype=dtype), heads)
    if name != "bundled":
        same(sj.load_heads(file, target.config), heads)  # the dtype is the file's


@pytest.mark.parametrize("name", ["medusa", "medusa-v2", "tensorrt-llm"])
def test_reduced_vocabularies_can_be_widened(target, name, tmp_path):
    """The residual blocks stay bit for bit, and the heads propose what the whole LM head gives."""
    heads, copy = made(target, "shared", KEEP), name != "medusa-v2"
    with pytest.raises(sj.ConfigError, match="or let them propose any token"):
        export_heads(tmp_path, heads, target, name, base_model="base", copy_lm_head=copy)
    export_heads(tmp_path, heads, target, name, base_model="base", copy_lm_head=copy, whole_vocabulary=True)
    wide = sj.load_heads(tmp_path, target.config)
    assert wide.token_map is None
    for part in heads.params:
        np.testing.assert_array_equal(wide.params[part], heads.params[part])
    assert (wide.config.projection, wide.config.reduced_vocab_size) == ("full" if copy else "shared", None)
    for i in range(C if copy else 0):
        np.testing.assert_array_equal(wide.params[f"projection_{i}"], target.params.unembedding)
    with pytest.raises(sj.ConfigError, match="cannot be widened"):
        export_heads(tmp_path / "f", made(target, "full", KEEP), target, name, base_model="base", whole_vocabulary=True)


def test_widened_heads_forget_how_good_they_were(target, tmp_path):
    heads, known = made(target, "shared", KEEP), {"hits": [[0.5]], "accuracy": {"top1": [0.5]}, "target": "t"}
    request = {"base_model": "base", "metadata": known, "whole_vocabulary": True}
    assert heads_metadata(export_heads(tmp_path / "a", heads, target, "native", **request)) == {"target": "t"}
    whole = made(target, "full")  # nothing to widen
    assert heads_metadata(export_heads(tmp_path / "b", whole, target, "native", **request)) == known


@pytest.mark.parametrize("projection", ["full", "shared"])
@pytest.mark.parametrize("name", ["vllm", "native"])
def test_reduced_vocabularies_survive(target, name, projection, tmp_path):
    heads = made(target, projection, KEEP)
    export_heads(tmp_path, heads, target, name, base_model="base")
    same(sj.load_heads(tmp_path, target.config), heads)
    if name == "vllm":
        config, stored = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
        assert config["truncated_vocab_size"] == len(KEEP)
        assert config["original_lm_head"] == (projection == "shared")
        assert stored["token_map"].dtype == np.int64
        assert stored["lm_heads.0.weight"].shape == (len(KEEP), D)
        assert [n for n in stored if n.startswith("lm_heads")] == [
            f"lm_heads.{i}.weight" for i in range(C if projection == "full" else 1)
        ]


@pytest.mark.parametrize("name", ["medusa", "abyo", "tensorrt-llm", "bundled"])
def test_the_lm_head_can_be_copied(target, name, tmp_path):
    heads = made(target, "shared")
    export_heads(tmp_path, heads, target, name, base_model="base", copy_lm_head=True)
    loaded = sj.load_heads(tmp_path, target.config)
    assert loaded.config.projection == "full"
    for i in range(C):
        np.testing.assert_array_equal(loaded.params[f"projection_{i}"], target.params.unembedding)
    tree = sj.Tree.cartesian((2, 2))
    mine, theirs = (
        sj.generate(target, [1, 2, 3], drafter=sj.MedusaDrafter(h, tree), max_new_tokens=30) for h in (heads, loaded)
    )
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
    np.testing.assert_array_equal(mine.accepted_lengths, theirs.accepted_lengths)


def test_refusals(target, tmp_path):
    heads = made(target, "shared", KEEP)
    with pytest.raises(sj.ConfigError, match="no layout 'onnx'"):
        export_heads(tmp_path, heads, target, "onnx", base_model="base")
    with pytest.raises(sj.ConfigError, match="propose 5 of 61 tokens"):
        export_heads(tmp_path, heads, target, "medusa-v2", base_model="base")
    with pytest.raises(sj.CheckpointError, match="vocabulary 61"):
        export_heads(tmp_path, heads, tiny_model(vocab=50), "native", base_model="base")
    (tmp_path / "something").write_text("here")
    with pytest.raises(sj.CheckpointError, match="not empty"):
        export_heads(tmp_path, heads, target, "native", base_model="base")


def rounded(model):
    """With weights that bfloat16 holds."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), model.params)
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("exact", [True, False])
def test_the_bundled_base_keeps_its_values_and_tokenizer(exact, tmp_path):
    model = dataclasses.replace(tiny_model(vocab=256), tokenizer=byte_tokenizer(TEMPLATE, eos=None))
    model = rounded(model) if exact else model
    heads = init_heads(sj.MedusaConfig(C, D, 256, L, "shared"), model.params)
    half = dataclasses.replace(heads, params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), heads.params))
    stored = load_file(export_heads(tmp_path, half, model, "bundled", base_model="base"))
    kinds = {("head" if name.startswith("medusa") else "base", str(t.dtype)) for name, t in stored.items()}
    assert kinds == {("head", "bfloat16"), ("base", "bfloat16" if exact else "float32")}
    again = sj.load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    messages = [{"role": "user", "content": "hello"}]
    assert again.tokenizer.apply_chat_template(messages) == model.tokenizer.apply_chat_template(messages)


def test_copies_of_the_lm_head_have_the_heads_dtype(target, tmp_path):
    heads = made(target, "shared", dtype=jnp.bfloat16)
    stored = load_file(export_heads(tmp_path, heads, target, "abyo", base_model="base", copy_lm_head=True))
    assert {str(t.dtype) for t in stored.values()} == {"bfloat16"}


def test_heads_that_were_fitted_with_a_backbone_are_converted_with_it_alone(target, tmp_path, capsys):
    moved = rounded(tiny_model(seed=1))
    for name, model in (("target", target), ("backbone", moved)):
        save_hf(tmp_path / name, model.params, model.config)
    file = tmp_path / "heads.safetensors"
    sj.save_heads(file, made(target, "shared"), {"backbone": fingerprint(moved.params)})

    def convert(model, out):
        return main(["convert", "--model", str(tmp_path / model), "--heads", str(file), "--to", "medusa-v2",
                     "--output-dir", str(tmp_path / out)])  # fmt: skip

    assert convert("target", "a") == 2
    assert "'backbone'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert convert("backbone", "b") == 0


def test_damaged_metadata_is_named(target, tmp_path):
    file = tmp_path / "heads.safetensors"
    sj.save_heads(file, made(target, "shared"), {"hits": 1})
    raw = file.read_bytes()
    at = raw.index(b'{\\"hits')
    file.write_bytes(raw[:at] + b"[" + raw[at + 1 :])
    with pytest.raises(sj.CheckpointError, match="no JSON object"):
        heads_metadata(file)


def test_the_command(target, tmp_path, capsys):
    save_hf(tmp_path / "model", target.params, target.config)
    heads = made(target, "full", dtype=jnp.bfloat16)
    sj.save_heads(tmp_path / "heads.safetensors", heads, {"hits": [[1.0]]})
    command = ["convert", "--model", str(tmp_path / "model"), "--heads"]
    first, last = tmp_path / "vllm", tmp_path / "native"
    assert main([*command, str(tmp_path / "heads.safetensors"), "--to", "vllm", "--output-dir", str(first)]) == 0
    assert main([*command, str(first), "--to", "native", "--output-dir", str(last)]) == 0
    same(sj.load_heads(last, target.config), heads)
    assert main([*command, str(first), "--to", "medusa-v2", "--output-dir", str(tmp_path / "x")]) == 2
    assert "projections of their own" in capsys.readouterr().err
