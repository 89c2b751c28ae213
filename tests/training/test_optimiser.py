"""Schedules, clipping, accumulation and averaging, against what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax as sj
from specjax.training.optimiser import OptimiserConfig, build, schedule

START = {"w": jnp.array([1.0, -2.0, 3.0])}


def gradients(n, seed=0):
    """Some gradients."""
    return [{"w": g} for g in jax.random.normal(jax.random.key(seed), (n, 3))]


def run(config, grads):
    """The states after every gradient, and the metrics."""
    optimiser = build(config, len(grads))
    update, state, states, metrics = jax.jit(optimiser.update), optimiser.init(START), [], []
    for gradient in grads:
        state, measured = update(state, gradient)
        states.append(state)
        metrics.append(measured)
    return optimiser, states, metrics


def test_schedules():
    rates = {
        kind: [
            float(schedule(OptimiserConfig(learning_rate=1.0, schedule=kind, warmup=0.1), 100)(i)) for i in range(101)
        ]
        for kind in ("cosine", "linear", "constant")
    }
    for kind, found in rates.items():
        np.testing.assert_allclose(found[:11], np.arange(11) / 10, atol=1e-6)  # ten updates up
        assert found[100] == pytest.approx(1.0 if kind == "constant" else 0.0, abs=1e-6)
    assert rates["linear"][55] == pytest.approx(0.5, abs=1e-6)
    assert rates["cosine"][32] == pytest.approx(0.5 * (1 + np.cos(np.pi * 22 / 90)), abs=1e-6)
    assert float(schedule(OptimiserConfig(learning_rate=1.0, warmup=0.0), 10)(0)) == 1.0
    for kind in ("cosine", "linear"):
        end = schedule(OptimiserConfig(learning_rate=2.0, schedule=kind, final=0.1), 100)(100)
        assert float(end) == pytest.approx(0.2, abs=1e-6)


def test_accumulated_batches_equal_one_of_their_mean():
    config = {"learning_rate": 0.1, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.01}
    grads = gradients(6)
    means = [{"w": (a["w"] + b["w"]) / 2} for a, b in zip(grads[::2], grads[1::2], strict=True)]
    _, two, measured = run(OptimiserConfig(**config, accumulate=2, ema=0.5), grads)
    optimiser, one, _ = run(OptimiserConfig(**config, ema=0.5), means)
    np.testing.assert_array_equal(two[0]["params"]["w"], START["w"])  # half an update is none
    for a, b in zip(two[1::2], one, strict=True):
        np.testing.assert_allclose(a["params"]["w"], b["params"]["w"], rtol=1e-6)
        np.testing.assert_allclose(optimiser.evaluated(a)["w"], optimiser.evaluated(b)["w"], rtol=1e-6)
    assert float(measured[0]["gradient_norm"]) == pytest.approx(float(jnp.linalg.norm(grads[0]["w"])))


def test_averaged_parameters_are_what_is_evaluated():
    optimiser, states, _ = run(
        OptimiserConfig(learning_rate=0.1, schedule="constant", warmup=0.0, ema=0.8), gradients(4)
    )
    weights = 0.2 * 0.8 ** np.arange(3, -1, -1)
    mean = sum(w * s["params"]["w"] for w, s in zip(weights, states, strict=True)) / weights.sum()
    np.testing.assert_allclose(optimiser.evaluated(states[-1])["w"], mean, rtol=1e-5)
    np.testing.assert_array_equal(optimiser.evaluated(optimiser.init(START))["w"], START["w"])


def test_clipping_bounds_the_norm_before_adam():
    large = [{"w": 100 * g["w"]} for g in gradients(3)]
    _, clipped, measured = run(OptimiserConfig(learning_rate=0.1, clip=1.0), large)
    scaled = [{"w": g["w"] / jnp.linalg.norm(g["w"])} for g in large]
    _, unit, _ = run(OptimiserConfig(learning_rate=0.1, clip=None), scaled)
    np.testing.assert_allclose(clipped[-1]["params"]["w"], unit[-1]["params"]["w"], rtol=1e-5)
    assert float(measured[0]["gradient_norm"]) > 10  # as it was


def test_a_factor_slows_one_part_alone():
    """Of the rate, after Adam: a part's own steps are scaled, clipping and the other part stay as they are."""
    start = {"heads": START, "lora": START}
    grads = [{"heads": a, "lora": b} for a, b in zip(gradients(4), gradients(4, seed=1), strict=True)]
    config = OptimiserConfig(learning_rate=0.1, schedule="constant", warmup=0.0, accumulate=2, ema=0.5)
    ends = {}
    for factors in (None, {"lora": 0.25}):
        optimiser = build(config, len(grads), factors)
        state = optimiser.init(start)
        for gradient in grads[:2]:  # one update: Adam's next ones depend on nothing but the gradients, too
            state, _ = optimiser.update(state, gradient)
        ends[factors is None] = state["params"]
    np.testing.assert_array_equal(ends[False]["heads"]["w"], ends[True]["heads"]["w"])
    moved, full = (ends[whole]["lora"]["w"] - START["w"] for whole in (False, True))
    np.testing.assert_allclose(moved, 0.25 * full, rtol=1e-5)
    assert float(jnp.abs(moved).min()) > 0


def test_the_second_moment():
    """After a large gradient a short memory is over it sooner."""
    grads = [{"w": jnp.full(3, g)} for g in (100.0, *[1.0] * 30)]
    steps = {}
    for b2 in (0.9, 0.999):
        _, states, _ = run(OptimiserConfig(learning_rate=0.1, schedule="constant", warmup=0.0, clip=None, b2=b2), grads)
        steps[b2] = float(jnp.abs(states[-1]["params"]["w"] - states[-2]["params"]["w"]).max())
    assert steps[0.9] > 2 * steps[0.999]


def test_refusals():
    for wrong, match in (
        ({"schedule": "step"}, "schedule is 'step'"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"accumulate": 0}, "accumulate of at least 1"),
        ({"final": 2.0}, "final is 2.0"),
        ({"b2": 1.0}, "b2 1.0; expected"),
    ):
        with pytest.raises(sj.ConfigError, match=match):
            OptimiserConfig(**wrong)
