"""The optimiser from a config, all of it Optax: AdamW, a schedule, clipping, accumulation, averaged parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from specjax.errors import ConfigError

Schedule = Literal["cosine", "linear", "constant"]
State = dict[str, Any]  # a pytree: `params`, `opt`, `step` and, with averaging, `ema`


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW's settings; a step is one batch, an update `accumulate` of them."""

    learning_rate: float = 2e-3  # peak
    schedule: Schedule = "cosine"  # after the warm-up: down by a cosine or a line, or constant
    warmup: float = 0.05  # share of the updates, rising linearly from zero
    final: float = 0.0  # share of the peak that cosine and line end at
    b2: float = 0.999  # decay of the second moment
    weight_decay: float = 0.0
    clip: float | None = 1.0  # largest global norm of the gradient; None: no limit
    accumulate: int = 1  # batches whose mean gradient makes one update
    ema: float | None = None  # decay of the averaged parameters, which then are what is evaluated and exported

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not 0 <= self.warmup < 1 or self.weight_decay < 0 or self.accumulate < 1:
            raise ConfigError(
                f"{self}: expected learning_rate > 0, 0 <= warmup < 1, weight_decay >= 0 and accumulate of at least 1."
            )
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ConfigError(f"schedule is {self.schedule!r}; expected 'cosine', 'linear' or 'constant'.")
        if not 0 <= self.final <= 1 or not 0 < self.b2 < 1:
            raise ConfigError(f"final is {self.final}, b2 {self.b2}; expected 0 <= final <= 1 and 0 < b2 < 1.")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"clip is {self.clip}; expected a norm > 0, or None for no clipping.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; expected a decay in [0, 1), or None for no averaging.")


class Optimiser(NamedTuple):
    """Three pure functions over a state.

    Attributes:
      init: parameters -> state; its arrays lie where the parameters do.
      update: (state, gradients of one batch) -> state, metrics (`gradient_norm` before clipping, `learning_rate`).
      evaluated: state -> the parameters to evaluate and export: the averaged ones where there are any.
    """

    init: Callable[[Any], State]
    update: Callable[[State, Any], tuple[State, dict[str, jax.Array]]]
    evaluated: Callable[[State], Any]


def schedule(config: OptimiserConfig, updates: int) -> optax.Schedule:
    """The learning rate by update, for a run of `updates`."""
    rising = max(1, int(config.warmup * updates)) if config.warmup else 0
    falling = max(1, updates - rising)
    peak = config.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, falling, config.final),
        "linear": optax.linear_schedule(peak, peak * config.final, falling),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rising), after], [rising]) if rising else after


def whole_updates(steps: int, config: OptimiserConfig) -> int:
    """The most batches, up to `steps`, that make a whole number of updates."""
    return steps // config.accumulate * config.accumulate


def build(config: OptimiserConfig, steps: int, factors: Mapping[str, float] | None = None) -> Optimiser:
    """The optimiser for a run of `steps` batches: clipping, then AdamW on the schedule, of every `accumulate` batches.

    Args:
      factors: of the learning rate, for some of the parameters' top-level names; those that are not named have 1.
    """
    updates = max(1, steps // config.accumulate)
    rate, parts = schedule(config, updates), list[optax.GradientTransformation]()
    if config.clip is not None:
        parts.append(optax.clip_by_global_norm(config.clip))
    parts.append(optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay))
    if factors is not None:
        parts.append(_scaled(factors))
    inner = optax.chain(*parts)
    optimiser = optax.MultiSteps(inner, config.accumulate) if config.accumulate > 1 else inner
    average = None if config.ema is None else optax.ema(config.ema, debias=True)

    def init(params: Any) -> State:
        state = {"params": params, "opt": optimiser.init(params), "step": jnp.int32(0)}
        return state if average is None else state | {"ema": average.init(params)}

    def update(state: State, gradients: Any) -> tuple[State, dict[str, jax.Array]]:
        params, step = state["params"], state["step"]
        changes, opt = optimiser.update(gradients, state["opt"], params)
        new = state | {"params": optax.apply_updates(params, changes), "opt": opt, "step": step + 1}
        if average is not None:
            _, moved = average.update(new["params"], state["ema"])
            # Between two updates the parameters stand still, and so does their average.
            done = (step + 1) % config.accumulate == 0
            new["ema"] = jax.tree.map(lambda a, b: jnp.where(done, a, b), moved, state["ema"])
        metrics = {"gradient_norm": optax.global_norm(gradients), "learning_rate": rate(step // config.accumulate)}
        return new, jax.tree.map(jnp.asarray, metrics)

    def evaluated(state: State) -> Any:
        if config.ema is None:
            return state["params"]
        ema = state["ema"]
        started = optax.tree.bias_correction(ema.ema, config.ema, jnp.maximum(ema.count, 1))
        return jax.tree.map(lambda a, p: jnp.where(ema.count > 0, a, p), started, state["params"])

    return Optimiser(init, update, evaluated)


def _scaled(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def scale(updates: Any, _: Any) -> Any:
        return {name: optax.tree.scale(factors.get(name, 1.0), part) for name, part in updates.items()}

    return optax.stateless(scale)
