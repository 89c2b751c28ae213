"""Distilling a draft model: a small Qwen2 learns the target's law on the target's own text (DistillSpec, Zhou 2024).

The draft speaks a reduced vocabulary: the most frequent tokens of the text, and one more row as which it reads all
others and which it never says. Its law is compared with the target's over the tokens that it can say; the target's
comes from the features kept at distillation, so that the target itself need not run.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specjax.corpus.conversation import Conversation, text_identity
from specjax.errors import ConfigError
from specjax.fingerprint import arrays_fingerprint, fingerprint, float_dtype
from specjax.target import params as parameters
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.target.params import Params
from specjax.training import loop
from specjax.training.identity import settings_of
from specjax.training.optimiser import build
from specjax.training.packing import PackedConfig, attention_mask, check_cut, packed, packed_steps

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]


@dataclass(frozen=True)
class DistilConfig(PackedConfig):
    """How to distil; the best checkpoint is the one with the highest acceptance."""

    epochs: int = 4
    length: int = 256
    final: float = 0.1
    b2: float = 0.95
    weight_decay: float = 0.01
    divergence: Divergence = "forward_kl"
    text_weight: float = 0.2  # of the cross-entropy with the text itself, added to the divergence
    checkpoint_every: int = 200  # steps between checkpoints and evaluations

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES or self.text_weight < 0:
            raise ConfigError(
                f"divergence {self.divergence!r}, text_weight {self.text_weight}; expected one of "
                f"{sorted(DIVERGENCES)} and a weight of at least 0."
            )


def _kl(log_p: Float[Array, "T R"], log_q: Float[Array, "T R"]) -> Float[Array, "T"]:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _jsd(log_p: Float[Array, "T R"], log_q: Float[Array, "T R"]) -> Float[Array, "T"]:
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


# Of target p and draft q, both as logarithms, in nats; total variation is the rejection rate itself.
DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda log_p, log_q: _kl(log_q, log_p),
    "jsd": _jsd,
    "tvd": lambda log_p, log_q: 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1),
}


def reduced_map(frequent: Int[np.ndarray, "R"]) -> Int[np.ndarray, "R+1"]:
    """The draft's token map: the tokens it says, ascending, then -1, the row that stands for all others."""
    return np.append(np.sort(frequent), -1).astype(np.int32)


def init_draft(key: jax.Array, config: ModelConfig, target: Params, token_map: Int[np.ndarray, "R+1"]) -> Params:
    """Random float32 parameters, but the embedding: the target's rows in their main `hidden_size` directions."""
    made = parameters.init(key, config)
    rows = np.asarray(target.unembedding, np.float32)[np.maximum(token_map, 0)]
    centred = rows - rows.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    if config.hidden_size > rows.shape[1]:
        raise ConfigError(f"the draft's hidden_size {config.hidden_size} exceeds the target's {rows.shape[1]}.")
    reduced = centred @ directions[:, ::-1][:, : config.hidden_size]
    reduced[token_map < 0] = 0.0
    return replace(made, embed=jnp.asarray(0.02 * reduced / reduced.std(), jnp.float32))


def _to_draft(token_map: Int[np.ndarray, "R+1"], vocab: int) -> Int[np.ndarray, "V"]:
    rows = np.full(vocab, len(token_map) - 1, np.int32)
    rows[token_map[:-1]] = np.arange(len(token_map) - 1, dtype=np.int32)
    return rows


@functools.partial(jax.checkpoint, static_argnums=(5,))
def _chunk_loss(
    draft: Params,
    projection: Float[Array, "R D"],
    ours: Float[Array, "T d"],
    theirs: Float[Array, "T D"],
    labels: Int[Array, "T"],
    divergence: Divergence,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    # Recomputed in the backward pass: T x R logits of both models live only here.
    log_q = jax.nn.log_softmax(unembed(draft, ours)[:, :-1], axis=-1)
    log_p = jax.nn.log_softmax(
        jnp.einsum("TD,RD->TR", theirs.astype(projection.dtype), projection, preferred_element_type=jnp.float32), -1
    )
    sayable = labels < log_q.shape[1]
    picked = jnp.take_along_axis(log_q, jnp.where(sayable, labels, 0)[:, None], axis=1)[:, 0]
    return DIVERGENCES[divergence](log_p, log_q), jnp.where(sayable, -picked, 0.0)


def distil_loss(
    draft: Params,
    config: ModelConfig,
    projection: Float[Array, "R D"],
    to_draft: Int[Array, "V"],
    batch: dict[str, Array],
    divergence: Divergence,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean divergence and mean text cross-entropy, in nats, over the answers' tokens.

    Args:
      draft: its parameters; the products run in their dtype.
      projection: the target's LM head restricted to the tokens that the draft can say.
      to_draft: target id -> draft row.
      batch: of `data.packed`, with features.
    """
    rows = to_draft[batch["tokens"]]

    def features(tokens: Int[Array, "T"], positions: Int[Array, "T"], segments: Int[Array, "T"]) -> Float[Array, "T d"]:
        mask = attention_mask(segments)
        return forward(draft, config, tokens, positions=positions, mask=mask).features

    ours = jax.vmap(features)(rows, batch["positions"], batch["segments"])[:, :-1]
    # The draft's feature at slot t - 1 and the target's kept at slot t predict the same token, that of slot t.
    counted = _counted(batch)

    def one(row: tuple[Array, ...]) -> tuple[Array, Array]:
        return _chunk_loss(draft, projection, *row, divergence)

    apart, text = jax.lax.map(one, (ours, batch["features"][:, 1:], rows[:, 1:]))
    total = jnp.maximum(jnp.sum(counted), 1)
    return jnp.sum(jnp.where(counted, apart, 0)) / total, jnp.sum(jnp.where(counted, text, 0)) / total


def _counted(batch: dict[str, Array]) -> Bool[Array, "B T-1"]:
    segments = batch["segments"]
    return batch["answer"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def distil(
    config: ModelConfig,
    target: Params,
    token_map: Int[np.ndarray, "R+1"],
    data: list[Conversation],
    held_out: list[Conversation],
    training: DistilConfig,
    directory: Path,
    *,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    monitor: loop.Monitor | None = None,
) -> tuple[Params, list[dict[str, Any]]]:
    """Distils a draft of shape `config`; resumes from `directory`.

    Gives the float32 parameters (the averaged ones where there are any) of the checkpoint that `training.select` names,
    and the log of `loop.fit`: a step's record has the loss with its two parts, `divergence` and `text`, the gradient's
    norm and the learning rate; an evaluation's `eval` is what `evaluate_draft` gives on `held_out`.

    Args:
      monitor: follows the run (`monitor.RunMonitor`).

    Raises:
      ConfigError: a vocabulary of another size than the token map.
      DataError: too little data, no answer within `length` tokens, or a loss that is not finite.
      CheckpointError: a full disk, or a directory in which a run of other settings, target or data was begun.
    """
    if config.vocab_size != len(token_map):
        raise ConfigError(f"the draft's vocab_size is {config.vocab_size}, its token map has {len(token_map)} entries.")
    for part, what in ((data, "training"), (held_out, "evaluation")):
        check_cut(part, training.length, what, ahead=1)
    steps = packed_steps(data, training)
    optimiser = build(training, steps)
    start = init_draft(jax.random.key(training.seed), config, target, token_map)
    projection = target.unembedding[token_map[:-1]].astype(jnp.bfloat16)
    to_draft = jnp.asarray(_to_draft(token_map, target.unembedding.shape[0]))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        def loss(draft: Params) -> tuple[Array, tuple[Array, Array]]:
            half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draft)  # float32 master weights
            apart, text = distil_loss(half, config, projection, to_draft, batch, training.divergence)
            return apart + training.text_weight * text, (apart, text)

        (value, (apart, text)), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        state, metrics = optimiser.update(state, grads)
        return state, {"loss": value, "divergence": apart, "text": text, **metrics}

    def evaluate(state: Any) -> dict[str, float]:
        return evaluate_draft(optimiser.evaluated(state), config, target, token_map, held_out, training)

    batches = _batches(data, training, epochs=training.epochs)
    trained = loop.fit(
        step,
        optimiser.init(start),
        batches,
        steps=steps,
        directory=directory,
        checkpoint_every=training.checkpoint_every,
        settings={
            "training": settings_of(training),
            "draft": asdict(config),
            "token_map": arrays_fingerprint(token_map),
            "target": fingerprint(target),
            "target_dtype": float_dtype(target),
            "data": text_identity(data),
            "held_out": text_identity(held_out),
        },
        evaluate=evaluate,
        report=report,
        score=lambda found: found["acceptance"],
        keep=training.keep,
        per_step={"tokens": training.batch_size * training.length},
        monitor=monitor,
    )
    chosen = trained.state if training.select == "last" else loop.best_state(directory, trained.state, batches)
    return optimiser.evaluated(chosen), trained.log


def _batches(
    data: list[Conversation], training: DistilConfig, *, epochs: int, whole: bool = False
) -> grain.IterDataset:
    shape = {"length": training.length, "batch_size": training.batch_size, "seed": training.seed}
    return packed(data, **shape, epochs=epochs, whole=whole)


def evaluate_draft(
    draft: Params,
    config: ModelConfig,
    target: Params,
    token_map: Int[np.ndarray, "R+1"],
    data: list[Conversation],
    training: DistilConfig,
) -> dict[str, float]:
    """What the draft would be accepted at, one token ahead, on `data`, averaged over the answers' tokens.

    `acceptance` is sum_x min(p(x), q(x)), the acceptance rate of sampling at temperature 1; `agreement` the share of
    positions where both prefer the same token, the acceptance rate of greedy decoding; `text` the cross-entropy with
    the text in nats, over the tokens that the draft can say. Every token of conversations up to `length` tokens counts;
    the rest of longer ones is cut.
    """
    to_draft = jnp.asarray(_to_draft(token_map, target.unembedding.shape[0]))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draft)
    sums = np.zeros(4)
    for batch in _batches(data, training, epochs=1, whole=True):
        sums += np.asarray(_evaluate(half, config, target.unembedding, jnp.asarray(token_map), to_draft, batch))
    share = sums / max(sums[3], 1)
    return {"acceptance": float(share[0]), "agreement": float(share[1]), "text": float(share[2])}


@functools.partial(jax.jit, static_argnames="config")
def _evaluate(
    draft: Params,
    config: ModelConfig,
    unembedding: Float[Array, "V D"],
    token_map: Int[Array, "R+1"],
    to_draft: Int[Array, "V"],
    batch: dict[str, Array],
) -> Float[Array, "4"]:
    counted, rows = _counted(batch), to_draft[batch["tokens"]]

    def one(row: tuple[Array, ...]) -> Float[Array, "4"]:
        tokens, positions, segments, theirs, counted = row
        out = forward(draft, config, tokens, positions=positions, mask=attention_mask(segments))
        log_q = jax.nn.log_softmax(unembed(draft, out.features[:-1])[:, :-1], axis=-1)
        logits = jnp.einsum(
            "TD,VD->TV", theirs.astype(unembedding.dtype), unembedding, preferred_element_type=jnp.float32
        )
        p = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))[:, token_map[:-1]]
        overlap = jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1)
        same = token_map[jnp.argmax(log_q, axis=-1)] == jnp.argmax(logits, axis=-1)
        labels = tokens[1:]
        picked = jnp.take_along_axis(log_q, jnp.minimum(labels, log_q.shape[1] - 1)[:, None], axis=1)[:, 0]
        text = jnp.where(labels < log_q.shape[1], -picked, 0.0)
        return jnp.sum(
            jnp.where(counted, jnp.stack([overlap, same.astype(jnp.float32), text, jnp.ones_like(text)]), 0), axis=1
        )

    per_row = jax.lax.map(one, (rows, batch["positions"], batch["segments"], batch["features"][:, 1:], counted))
    return jnp.sum(per_row, axis=0)
