"""Every operation's XLA:CPU form gives what its plain form gives, and other platforms run the plain forms alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import noisy_heads, tiered, tiny_model

import specjax as sj
from specjax import loop, ops
from specjax.ops import cpu, native, plain
from specjax.target.cache import zeros

PRODUCTS = ("xla", "native") if native.missing() is None else ("xla",)
SPECS = {
    "TD,KQHD->TKQH": ((6,), (2, 3, 4, 6)),
    "TKGH,DKGH->TD": ((2, 3, 4), (7, 2, 3, 4)),
    "TF,DF->TD": ((13,), (7, 13)),
    "TD,DE->TE": ((6,), (6, 6)),
}


def drawn(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


ESSENTIAL = ("xla", 1), ("xla", 65), ("native", 5), ("native", 32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kind", "rows"), tiered(lambda *case: case in ESSENTIAL, PRODUCTS, [1, 2, 5, 8, 17, 32, 64, 65])
)
@pytest.mark.parametrize("spec", SPECS)
def test_products(spec, rows, dtype, kind):
    with ops.cpu_products(kind):
        _products(spec, rows, dtype)


def _products(spec, rows, dtype):
    inner, shape = SPECS[spec]
    x, w = drawn(rows, *inner, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)
    assert cpu.rearranges(spec, x) == (rows <= 64 and spec != "TD,DE->TE")
    expected, near = plain.dot(spec, x, w), {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(ops.dot(spec, x, w), expected, **near)
    batched = jax.vmap(functools.partial(ops.dot, spec), (0, None))(jnp.stack([x, 2 * x]), w)
    np.testing.assert_allclose(batched, jnp.stack([expected, 2 * expected]), **near)
    gradient = jax.grad(lambda x, w: ops.dot(spec, x, w).sum(), argnums=(0, 1))(x, w)
    expected = jax.grad(lambda x, w: plain.dot(spec, x, w).sum(), argnums=(0, 1))(x, w)
    for ours, theirs in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_nucleus_and_top_token(top_p):
    logits = jnp.round(drawn(40, 97) * 4) / 4  # with ties
    np.testing.assert_array_equal(cpu.top_token(logits), plain.top_token(logits))
    ours, theirs = (np.isfinite(form.nucleus(top_p, logits)) for form in (cpu, plain))
    assert (ours == theirs).mean() > 0.999  # sums in another order may end on either side of top_p
    assert ours.any(-1).all()
    np.testing.assert_array_equal(ops.nucleus(logits, top_p), cpu.nucleus(top_p, logits))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding(dtype):
    table, tokens = drawn(9, 4, dtype=dtype), jnp.array([3, 0, 8])
    np.testing.assert_array_equal(cpu.embedding(table, tokens), plain.embedding(table, tokens))


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("slots", [64, 4 * cpu.BLOCK])
@pytest.mark.parametrize(("first", "end"), [(0, 0), (0, 1), (0, 200), (130, 300), (0, 512)])
def test_attention(kind, slots, first, end):
    """Through the public function, whose forms are those of a CPU."""
    t = 3
    q, k, v = drawn(2, 2 * t, 9), drawn(2, 9, t, seed=3), drawn(2, t, 9, seed=4)
    cached = drawn(2, 9, slots, seed=1), drawn(2, slots, 9, seed=2)
    seen = (jnp.arange(slots) >= first) & (jnp.arange(slots) < end)
    prefix = plain.Prefix(*cached, jnp.broadcast_to(seen, (t, slots)), jnp.int32(first), jnp.int32(min(end, slots)))
    mask = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    expected = plain.attention(q, k, v, mask, prefix)
    with ops.cpu_products(kind):
        np.testing.assert_allclose(ops.attention(q, k, v, mask, prefix), expected, rtol=1e-5, atol=1e-5)
        batched = jax.vmap(ops.attention, (0, 0, 0, None, None))(
            *(jnp.stack([x, 2 * x]) for x in (q, k, v)), mask, prefix
        )
    np.testing.assert_allclose(batched[0], expected, rtol=1e-5, atol=1e-5)
    twice = plain.attention(2 * q, 2 * k, 2 * v, mask, prefix)
    np.testing.assert_allclose(batched[1], twice, rtol=1e-5, atol=1e-5)


def lowered(platform, dtype, kind="xla"):
    """StableHLO of a loop of rounds, for a platform that need not be here."""
    model = tiny_model(num_layers=1)
    model = sj.Model(jax.tree.map(lambda x: x.astype(dtype), model.params), model.config, None)
    drafter = sj.MedusaDrafter(noisy_heads(model, 2), sj.Tree.from_paths([(0,), (1,), (2,), (0, 0), (1, 0)]))
    plan = loop.Plan(model.params, drafter, (2,), model.config, sj.Sample(0.8, top_p=0.9)).ready()

    def decode(plan, tokens):
        return loop.run_rounds(plan, loop.start(plan, tokens, jnp.int32(9), jnp.int32(40), jax.random.key(0)))

    with ops.tracing_for(platform), ops.cpu_products(kind):
        return jax.jit(decode).trace(plan, jnp.zeros(512, jnp.int32)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_have_the_plain_forms_alone(platform, dtype):
    text, here = lowered(platform, dtype), lowered("cpu", dtype)
    marks = {"optimization_barrier": "columns for rows and the tied embedding", "x8x": "rows padded to eight"}
    assert "optimization_barrier" in here
    assert "optimization_barrier" not in text, marks
    assert text.count("stablehlo.while") < here.count("stablehlo.while")  # blocks of the cache, halving for top-p
    assert "chlo.top_k" not in text or text.count("chlo.top_k") < here.count("chlo.top_k")
    if dtype == jnp.float32:  # a tree of six nodes: eight rows on a CPU alone
        assert "tensor<8x61xf32>" in here
        assert "tensor<8x61xf32>" not in text
        assert "tensor<6x61xf32>" in text


@pytest.mark.skipif(PRODUCTS == ("xla",), reason="there are no native products here")
@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_native_operations_are_a_cpus(platform):
    text = lowered(platform, jnp.bfloat16, "native")
    assert all((f"specjax_{name}" in text) == (platform == "cpu") for name in ("dot", "attend", "norm"))


def test_products_are_chosen(monkeypatch):
    with ops.cpu_products("fast"), pytest.raises(sj.ConfigError, match="'fast'; expected 'native' or 'xla'"):
        ops.padded_rows(5, jnp.float32)
    with ops.cpu_products("xla"):
        assert "as was asked" in ops.cpu_products_here()
    monkeypatch.setenv("SPECJAX_CPU_PRODUCTS", "xla")
    assert not cpu.native_serves()
    with ops.cpu_products(PRODUCTS[-1]):  # what is said in the program wins
        assert cpu.native_serves() == (PRODUCTS[-1] == "native")
    monkeypatch.setattr(native, "missing", lambda: "they are not built")
    assert ops.cpu_products_here() == "XLA's, as was asked"
    monkeypatch.delenv("SPECJAX_CPU_PRODUCTS")
    assert ops.cpu_products_here() == "XLA's: they are not built"
    with ops.cpu_products("native"), pytest.raises(sj.ConfigError, match="asked for, but they are not built"):
        cpu.native_serves()


@pytest.mark.skipif(PRODUCTS == ("xla",), reason="there are no native products here")
def test_wrong_operands_are_refused_not_read():
    x, w = jnp.zeros((2, 8)), jnp.zeros((4, 8))
    for wrong in ((x, jnp.zeros((4, 7))), (x, w.astype(jnp.bfloat16)), (x.astype(int), w.astype(int)), (x[0], w)):
        shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            jax.ffi.ffi_call("specjax_dot", shape)(*wrong).block_until_ready()


@pytest.mark.usefixtures("xla_products")
def test_rows_are_padded_on_a_cpu_alone():
    assert [ops.padded_rows(rows, jnp.float32) for rows in (1, 4, 5, 8, 9, 16, 17)] == [1, 4, 8, 8, 16, 16, 17]
    assert ops.padded_rows(5, jnp.bfloat16) == 5
    with ops.tracing_for("tpu"):
        assert ops.padded_rows(5, jnp.float32) == 5
    assert ops.padded_rows(5, jnp.float32) == 8


@pytest.mark.usefixtures("xla_products")
def test_what_was_traced_for_a_cpu_is_traced_anew_for_another_platform():
    """One function, as `decode` is, whose trace `jit` keeps."""
    rows = jax.jit(lambda x: jnp.zeros(ops.padded_rows(len(x), x.dtype)))
    x = jnp.zeros(6)
    assert rows(x).shape == (8,)
    with ops.tracing_for("tpu"):
        assert rows.trace(x).jaxpr.out_avals[0].shape == (6,)
        assert rows(x).shape == (6,)
        with ops.tracing_for("cpu"):
            assert rows(x).shape == (8,)
    assert rows(x).shape == (8,)


def test_a_round_slices_no_stacked_kernels():
    """The loop's body has one array a head: a slice of a stacked one would be copied in every round."""
    model, stacked = tiny_model(num_layers=1), ("[3,16,16]", "f32[2,16,16]")

    def body(heads, split):
        drafter = sj.MedusaDrafter(heads, sj.Tree.chain(2))
        plan = loop.Plan(
            model.params, drafter.prepare(model.params) if split else drafter, (), model.config, sj.Greedy()
        )
        tokens, cache = jnp.zeros(64, jnp.int32), zeros(model.config, 64)
        state = jax.eval_shape(
            lambda plan: loop.first_token(
                plan, tokens, jnp.int32(4), jnp.int32(20), jax.random.key(0), jnp.zeros(16), cache
            ),
            plan,
        )
        return str(jax.make_jaxpr(loop.run_rounds)(plan, state))

    heads = noisy_heads(model, 3)
    assert any(mark in body(heads, False) for mark in stacked)
    assert not any(mark in body(heads, True) for mark in stacked)
