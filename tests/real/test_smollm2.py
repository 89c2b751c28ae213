"""The real model: its heads, both architectures, the README's examples. Losslessness: test_greedy.py."""

import dataclasses
import re
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.loading.head_files import heads_metadata

HEADS = "smollm2-135m-instruct"


def test_shipped_heads_are_small_and_recorded():
    metadata = heads_metadata(HEADS)
    assert np.asarray(metadata["hits"]).shape == (4, 10)
    assert metadata["target"] == HEADS
    assert metadata["accuracy"]["top1"][0] > 0.3
    heads = resources.files("specjax") / "data" / "heads" / f"{HEADS}.safetensors"
    assert len(heads.read_bytes()) < 4e6


@pytest.mark.full
def test_a_qwen2_with_zero_biases_is_the_llama(smollm2):
    config = dataclasses.replace(smollm2.config, family="qwen2", qkv_bias=True)
    shape = (config.num_kv_heads, config.group_size + 2, config.head_dim)
    layers = tuple(dataclasses.replace(layer, qkv_bias=jnp.zeros(shape)) for layer in smollm2.params.layers)
    qwen = sj.Model(dataclasses.replace(smollm2.params, layers=layers), config, smollm2.tokenizer)
    ids = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": "Name three rivers in Europe."}])
    request = {"max_new_tokens": 32, "key": jax.random.key(0), "acceptance": sj.Sample()}
    np.testing.assert_array_equal(sj.generate(qwen, ids, **request).tokens, sj.generate(smollm2, ids, **request).tokens)


def test_the_readmes_examples_run(capsys):
    """All of its Python, in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["out"].tokens_per_round > 1.0
    assert len(scope["outs"]) == 2
    assert "4." not in capsys.readouterr().out.splitlines()[-1]  # the stop string of the last example
