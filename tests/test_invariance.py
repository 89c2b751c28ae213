"""Native products: what a node of a tree gives is bit for bit what the same token gives when it is read alone."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiered, tiny_model

import specjax as sj
from specjax import loop, ops
from specjax.drafters.base import NoDrafter
from specjax.ops import native
from specjax.target import cache as kv
from specjax.target.model import forward, read, unembed

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="there are no native products here")
MODELS = {
    "llama": {},
    "odd widths": {"hidden_size": 37, "intermediate_size": 53, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "hidden_size": 48, "intermediate_size": 80},
    "window": {"sliding_window": 5},
}


def tree_of(nodes, seed):
    """Any tree of so many nodes."""
    rng, paths = np.random.default_rng(seed), [()]
    while len(paths) < nodes:
        path = (*paths[rng.integers(len(paths))], int(rng.integers(9)))
        if path not in paths:
            paths.append(path)
    return sj.Tree.from_paths(paths[1:])


def assert_bitwise(ours, theirs):
    np.testing.assert_array_equal(np.asarray(ours).view(np.uint32), np.asarray(theirs).view(np.uint32))


def hold_together(model, tree, prompt, nodes):
    """Reads a tree at once and the paths to `nodes` token by token, and compares."""
    params, config = model.params, model.config
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, tree.size), jnp.int32)
    capacity = 64 * -(-(len(prompt) + 40) // 64)
    padded = jnp.zeros(capacity, jnp.int32).at[: len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    _, cache = jax.jit(read, static_argnums=1)(params, config, padded, jnp.int32(len(prompt)))
    plan = loop.Plan(params, NoDrafter(), (), config, sj.Greedy())
    features, rows, logits = jax.jit(loop.verify, static_argnums=(1, 4))(plan, tree, cache, tokens, tree.size)

    @jax.jit
    def alone(params, cache, token):
        out = forward(params, config, token[None], cache=cache)
        return out, unembed(params, out.features), kv.write(cache, out.rows, 1)

    for node in nodes:
        mine = cache
        for one in np.flatnonzero(tree.ancestors[node]):
            out, single, mine = alone(params, mine, tokens[one])
        assert_bitwise(features[node], out.features[0])
        assert_bitwise(logits[node], single[0])
        for ours, theirs in zip(rows.k, out.rows.k, strict=True):
            assert_bitwise(ours[:, :, node], theirs[:, :, 0])
        for ours, theirs in zip(rows.v, out.rows.v, strict=True):
            assert_bitwise(ours[:, node], theirs[:, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("nodes", tiered(lambda n: n in (2, 13), [2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32]))
def test_a_node_is_what_its_token_is_alone(nodes, name, dtype):
    model = tiny_model(2, **MODELS[name])
    model = sj.Model(jax.tree.map(lambda x: x.astype(dtype), model.params), model.config, None)
    with ops.cpu_products("native"):
        hold_together(model, tree_of(nodes, nodes), np.arange(21) % 61, [0, nodes // 2, nodes - 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_do_not_depend_on_the_other_rows(dtype, fast):
    rng = np.random.default_rng(0)
    for outputs, inputs in ((1, 1), (49, 1537), (100, 576)):
        x = jnp.asarray(rng.normal(size=(32, inputs)), dtype)
        w = jnp.asarray(rng.normal(size=(outputs, inputs)), dtype)
        product = jax.jit(native.dot)
        alone = np.concatenate([product(x[t : t + 1], w) for t in range(32)])
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
        np.testing.assert_allclose(alone, exact, atol=1e-6 * max(1, np.abs(exact).max()) * 8)
        for rows in range(1, 33) if not fast else (2, 3, 5, 7, 8, 9, 16, 31, 32):
            assert_bitwise(product(x[:rows], w), alone[:rows])


@pytest.mark.full
@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_lesser_instruction_sets(isa):
    """Those that this CPU has beside its best: the same tests, in a process that is told to use them."""
    environment = os.environ | {"SPECJAX_CPU_ISA": isa}
    check = [sys.executable, "-c", "from specjax.ops import native; raise SystemExit(native.missing() is not None)"]
    if subprocess.run(check, env=environment, check=False).returncode:
        pytest.skip(f"this CPU has no {isa}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "--fast", "-k", "not lesser"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_a_cpu_without_any_of_them_has_xlas_products():
    check = "from specjax.ops import native; print(native.missing())"
    environment = os.environ | {"SPECJAX_CPU_ISA": "none"}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True)
    assert "no instruction set of this CPU" in done.stdout
