"""The trainer of `joint`: Medusa-1 on the fly and Medusa-2, on one device or a mesh over several hosts."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from specjax import params as parameters
from specjax.config import ModelConfig
from specjax.errors import ConfigError, DataError
from specjax.heads import Heads, draft_projection
from specjax.params import Params, ParamSpec, named_sharding
from specjax.training import loop, mesh
from specjax.training.data import Conversation, packed
from specjax.training.joint import JointConfig, accuracies, held_out_sums, joint_loss
from specjax.training.lora import Lora, init_lora, lora_shardings
from specjax.training.trainer import TOP


class Fitted(NamedTuple):
    """What `fit_joint` gives: float32 parameters, whole in every process, and the log of `loop.fit`."""

    heads: Heads
    lora: Lora | None  # None for Medusa-1
    log: list[dict[str, Any]]


def optimiser(settings: JointConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up and cosine; of `{"heads": ..., "lora": ...}`, `lora` at its own rate."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, int(settings.warmup * steps)), steps, 0.0
    )
    slower = settings.lora_learning_rate / settings.learning_rate

    def apart(updates: Any, params: Any) -> Any:
        return {n: u if n == "heads" else jax.tree.map(lambda x: x * slower, u) for n, u in updates.items()}

    adam = optax.adamw(schedule, weight_decay=0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), adam, optax.stateless(apart))


def start(config: ModelConfig, heads: Heads, settings: JointConfig, steps: int, on: Mesh) -> tuple[Any, Any]:
    """The state before the first step, placed on the mesh, and its shardings: `trained`, `opt` and `step`.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide.
    """
    trained: dict[str, Any] = {"heads": heads.params}
    where: dict[str, Any] = {"heads": mesh.head_shardings(heads, on)}
    if settings.lora is not None:
        trained["lora"] = init_lora(jax.random.key(settings.seed), config, settings.lora)
        where["lora"] = lora_shardings(config, settings.lora, on)
    optim, everywhere = optimiser(settings, steps), mesh.replicated(on)
    shardings = {
        "trained": where,
        "opt": mesh.optimiser_shardings(optim, trained, where, on),
        "step": everywhere,
    }
    state = {"trained": trained, "opt": optim.init(trained), "step": jnp.int32(0)}
    return mesh.put(state, shardings), shardings


def fit_joint(
    config: ModelConfig,
    target: Params,
    heads: Heads,
    data: list[Conversation],
    held_out: list[Conversation],
    settings: JointConfig,
    directory: Path,
    *,
    on: Mesh,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Fitted:
    """Fits `heads` (float32), and with `settings.lora` the target's LoRA changes, to conversations.

    A step's record has the loss, every head's (`losses`, nats), Medusa-2's `backbone` loss and the gradient's norm; an
    evaluation's `eval` is that of `joint.accuracies` on `held_out`. A later call resumes from `directory`. Several
    processes call it with the same arguments and one directory that all of them see.

    Args:
      target: stays as it is; products run in its dtype.
      on: the mesh.

    Raises:
      ConfigError: heads of another shape than the target, or rows or a dimension that the mesh does not divide.
      DataError: too little data, data of another vocabulary, or a loss that is not finite (the last checkpoint stays as
        it was).
    """
    mesh.check_rows(settings.batch_size, on)
    _check(config, heads, [*data, *held_out])
    tokens = sum(min(len(item), settings.length) for item in data)
    steps = settings.epochs * tokens // (settings.batch_size * settings.length)
    if steps < 2:
        raise DataError(
            f"{len(data)} conversations of {tokens} tokens do not fill two batches of {settings.batch_size} x "
            f"{settings.length} in {settings.epochs} epochs; lower batch_size."
        )
    state, shardings = start(config, heads, settings, steps, on)
    optim, everywhere, shards = optimiser(settings, steps), mesh.replicated(on), on.shape[mesh.DATA]
    frozen = mesh.put(target, parameters.shardings(config, on))
    projection = draft_projection(heads, target.unembedding)
    if projection is not None:
        projection = mesh.put(projection, named_sharding(ParamSpec(projection.shape, ("V", "D"), "zeros"), on))
    dropout = jax.random.key(settings.seed + 1)

    # The target is an argument: an array over several processes cannot be a constant of a compiled function.
    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, everywhere))
    def step(state: Any, batch: dict[str, Array], frozen: Params, projection: Any) -> tuple[Any, dict[str, Array]]:
        def loss(trained: Any) -> tuple[Array, dict[str, Array]]:
            key, done = jax.random.fold_in(dropout, state["step"]), state["step"] / steps
            return joint_loss(
                trained, heads, frozen, projection, config, batch, settings, done=done, key=key, shards=shards
            )

        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state["trained"])
        updates, opt = optim.update(grads, state["opt"], state["trained"])
        metrics = {"loss": value, **parts, "gradient_norm": optax.global_norm(grads)}
        trained = optax.apply_updates(state["trained"], updates)
        return {"trained": trained, "opt": opt, "step": state["step"] + 1}, metrics

    @functools.partial(jax.jit, out_shardings=everywhere)
    def sums(trained: Any, batch: dict[str, Array], frozen: Params, projection: Any) -> dict[str, Array]:
        return held_out_sums(trained, heads, frozen, projection, config, batch, settings, shards=shards)

    def evaluate(state: Any) -> dict[str, Any]:
        made = (mesh.put_batch(batch, on) for batch in _batches(held_out, settings, epochs=1))
        return accuracies([jax.device_get(sums(state["trained"], b, frozen, projection)) for b in made], TOP)

    trained = loop.fit(
        lambda state, batch: step(state, batch, frozen, projection),
        state,
        _batches(data, settings, epochs=None),
        steps=steps,
        directory=directory,
        checkpoint_every=settings.checkpoint_every,
        evaluate=evaluate,
        report=report,
        placement=loop.Placement(lambda state: state, functools.partial(mesh.put_batch, on=on)),
    )
    whole = mesh.gather(trained.state["trained"], on)
    whole = jax.tree.map(jnp.asarray, whole)
    return Fitted(replace(heads, params=whole["heads"]), whole.get("lora"), trained.log)


def _check(config: ModelConfig, heads: Heads, data: list[Conversation]) -> None:
    if (heads.config.hidden_size, heads.config.vocab_size) != (config.hidden_size, config.vocab_size):
        raise ConfigError(
            f"the heads are for hidden size {heads.config.hidden_size} and vocabulary {heads.config.vocab_size}, the "
            f"target has {config.hidden_size} and {config.vocab_size}; make them for this target."
        )
    for i, item in enumerate(data):
        tokens = np.concatenate([item.prompt, item.answer])
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            raise DataError(
                f"conversation {i} has token ids from {tokens.min()} to {tokens.max()}, the target's vocabulary is "
                f"{config.vocab_size}; the data was made by another model."
            )
    if all(len(item.answer) < 2 for item in data):
        raise DataError(f"none of the {len(data)} conversations has an answer of two tokens; add longer ones.")


def _batches(data: list[Conversation], settings: JointConfig, epochs: int | None) -> Any:
    # Without cached features: these are computed.
    text = [replace(item, features=None) for item in data]
    return packed(text, length=settings.length, batch_size=settings.batch_size, seed=settings.seed, epochs=epochs)
