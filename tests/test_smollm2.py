"""The real model: Medusa output equals autoregressive output, and the heads that ship earn their keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import specjax as sj
from specjax.loading.heads import heads_metadata
from specjax.prompts import load_prompts

HEADS = "smollm2-135m-instruct"
TREE = sj.Tree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def test_medusa_output_is_autoregressive_on_40_prompts_of_128_tokens(smollm2):
    drafter = sj.MedusaDrafter(sj.load_heads(HEADS, smollm2.config, dtype=jnp.float32), TREE)
    prompts = [p for p in load_prompts() if p.question_id <= 40]
    assert len(prompts) == 40
    committed = rounds = 0
    for prompt in prompts:
        ids = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": prompt.turns[0]}])
        request = {"max_new_tokens": 128, "capacity": 512}
        base = sj.generate(smollm2, ids, **request)
        out = sj.generate(smollm2, ids, drafter=drafter, **request)
        np.testing.assert_array_equal(out.tokens, base.tokens, err_msg=prompt.turns[0])
        committed += int((out.accepted_lengths + 1).sum())
        rounds += out.rounds
    assert committed / rounds > 1.4  # a guard against worse heads: 1.46 when written, 1.7 is the aim


def test_shipped_heads_are_small_and_recorded():
    metadata = heads_metadata(HEADS)
    assert np.asarray(metadata["hits"]).shape == (4, 10)
    assert metadata["target"] == HEADS
    assert metadata["accuracy"]["top1"][0] > 0.3


def test_a_qwen2_with_zero_biases_is_the_llama(smollm2):
    config = dataclasses.replace(smollm2.config, family="qwen2", qkv_bias=True)
    shape = (config.num_kv_heads, config.group_size + 2, config.head_dim)
    layers = tuple(dataclasses.replace(layer, qkv_bias=jnp.zeros(shape)) for layer in smollm2.params.layers)
    qwen = sj.Model(dataclasses.replace(smollm2.params, layers=layers), config, smollm2.tokenizer)
    ids = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": "Name three rivers in Europe."}])
    request = {"max_new_tokens": 32, "key": jax.random.key(0), "acceptance": sj.Sample()}
    np.testing.assert_array_equal(sj.generate(qwen, ids, **request).tokens, sj.generate(smollm2, ids, **request).tokens)
