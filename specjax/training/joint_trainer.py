"""The trainer of `joint`: Medusa-1 on the fly and Medusa-2, on one device or a mesh over several hosts."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from specjax.corpus.conversation import Conversation, text_identity
from specjax.errors import ConfigError, DataError
from specjax.heads import Heads, draft_projection
from specjax.target import params as parameters
from specjax.target.config import ModelConfig
from specjax.target.params import Params, ParamSpec, named_sharding
from specjax.training import loop, mesh
from specjax.training.identity import of_head_run
from specjax.training.joint import JointConfig, joint_loss
from specjax.training.joint_evaluation import joint_record, judged
from specjax.training.lora import Lora, init_lora, lora_shardings
from specjax.training.optimiser import Optimiser, build
from specjax.training.packing import check_cut, labels, packed, packed_steps
from specjax.training.quality import tree_for
from specjax.tree import Tree


class Fitted(NamedTuple):
    """What `fit_joint` gives: the selected checkpoint's float32 parameters, whole in every process (the averaged ones
    where there are any), and the log of `loop.fit`."""

    heads: Heads
    lora: Lora | None  # None for Medusa-1
    log: list[dict[str, Any]]


def start(config: ModelConfig, heads: Heads, settings: JointConfig, optimiser: Optimiser, on: Mesh) -> tuple[Any, Any]:
    """The optimiser's state before the first step, placed on the mesh, and its shardings.

    Raises:
      ConfigError: a dimension that its mesh axis does not divide.
    """
    trained: dict[str, Any] = {"heads": heads.params}
    where: dict[str, Any] = {"heads": mesh.head_shardings(heads, on)}
    if settings.lora is not None:
        trained["lora"] = init_lora(jax.random.key(settings.seed), config, settings.lora)
        where["lora"] = lora_shardings(config, settings.lora, on)
    shardings = mesh.optimiser_shardings(optimiser, trained, where, on)
    return mesh.put(optimiser.init(trained), shardings), shardings


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
    tree: Tree | None = None,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    monitor: loop.Monitor | None = None,
) -> Fitted:
    """Fits `heads` (float32), and with `settings.lora` the target's LoRA changes, to conversations.

    A step's record has the loss, every head's (`losses`, nats), Medusa-2's `backbone` loss, the gradient's norm and the
    heads' learning rate; an evaluation's `eval` is a `joint_record` on every token of `held_out`'s conversations up
    to `length` tokens; the rest of longer ones is cut, with a warning before the first step. A later call resumes from
    `directory`. Several processes call it with the same arguments and one directory that all of them see. Tokens per
    second are those of whole rows, padding included.

    Args:
      target: stays as it is; products run in its dtype.
      on: the mesh.
      tree: what `tokens_per_round` is of; None: `default_tree`.
      monitor: follows the run (`monitor.RunMonitor`).

    Raises:
      TreeError: a tree deeper than there are heads, or too wide to simulate.
      ConfigError: heads of another shape than the target, or rows or a dimension that the mesh does not divide.
      DataError: too little data, data of another vocabulary, no label within `length` tokens, or a loss that is not
        finite (the last checkpoint stays as it was).
      CheckpointError: a full disk, or a directory in which a run of other settings, heads, target, data or tree was
        begun.
    """
    mesh.check_rows(settings.batch_size, on)
    # Features that the text may have are not used: these are computed.
    data, held_out = ([replace(item, features=None) for item in part] for part in (data, held_out))
    _check(config, heads, data, held_out)
    for text, what in ((data, "training"), (held_out, "evaluation")):
        check_cut(text, settings.length, what, ahead=2)  # the first head's; the others' are fewer
    _check_sayable(heads, data, settings.length)
    tree, steps = tree_for(tree, heads.config.num_heads), packed_steps(data, settings)
    optimiser = build(settings, steps, {"lora": settings.lora_learning_rate / settings.learning_rate})
    state, shardings = start(config, heads, settings, optimiser, on)
    everywhere, shards = mesh.replicated(on), on.shape[mesh.DATA]
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

        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        state, metrics = optimiser.update(state, grads)
        return state, {"loss": value, **parts, **metrics}

    @functools.partial(jax.jit, out_shardings=everywhere)
    def judge(state: Any, batch: dict[str, Array], frozen: Params, projection: Any) -> dict[str, Array]:
        return judged(optimiser.evaluated(state), heads, frozen, projection, config, batch, settings, shards=shards)

    def evaluate(state: Any) -> dict[str, Any]:
        batches = list(_batches(held_out, settings, epochs=1, whole=True))
        found = [jax.device_get(judge(state, mesh.put_batch(batch, on), frozen, projection)) for batch in batches]
        return joint_record(batches, found, tree)

    batches = _batches(data, settings, epochs=settings.epochs)
    trained = loop.fit(
        lambda state, batch: step(state, batch, frozen, projection),
        state,
        batches,
        steps=steps,
        directory=directory,
        checkpoint_every=settings.checkpoint_every,
        settings=of_head_run(settings, heads, target, text_identity(data), text_identity(held_out), tree),
        evaluate=evaluate,
        report=report,
        score=lambda found: found["tokens_per_round"],
        keep=settings.keep,
        per_step={"tokens": settings.batch_size * settings.length},
        monitor=monitor,
        placement=loop.Placement(lambda state: state, functools.partial(mesh.put_batch, on=on)),
    )
    chosen = trained.state if settings.select == "last" else loop.best_state(directory, trained.state, batches)
    whole = mesh.gather(jax.jit(optimiser.evaluated)(chosen), on)
    whole = jax.tree.map(jnp.asarray, whole)
    return Fitted(replace(heads, params=whole["heads"]), whole.get("lora"), trained.log)


def _check(config: ModelConfig, heads: Heads, *texts: list[Conversation]) -> None:
    if (heads.config.hidden_size, heads.config.vocab_size) != (config.hidden_size, config.vocab_size):
        raise ConfigError(
            f"the heads are for hidden size {heads.config.hidden_size} and vocabulary {heads.config.vocab_size}, the "
            f"target has {config.hidden_size} and {config.vocab_size}; make them for this target."
        )
    for i, item in enumerate(item for text in texts for item in text):
        tokens = np.concatenate([item.prompt, item.answer])
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
            raise DataError(
                f"conversation {i} has token ids from {tokens.min()} to {tokens.max()}, the target's vocabulary is "
                f"{config.vocab_size}; the data was made by another model."
            )


def _check_sayable(heads: Heads, data: list[Conversation], length: int) -> None:
    if heads.token_map is None:
        return
    sayable = np.asarray(heads.token_map)
    if not any(np.isin(labels(item, length, 2), sayable).any() for item in data):
        raise DataError("no token of the text is in the heads' reduced vocabulary; choose it from this text.")


def _batches(data: list[Conversation], settings: JointConfig, *, epochs: int, whole: bool = False) -> Any:
    shape = {"length": settings.length, "batch_size": settings.batch_size, "seed": settings.seed}
    return packed(data, **shape, epochs=epochs, whole=whole)
