"""Distilling a draft model: a small Qwen2 learns the target's law on the target's own text (DistillSpec, Zhou 2024).

The draft speaks a reduced vocabulary: the most frequent tokens of the text, and one more row as which it reads all
others and which it never says. Its law is compared with the target's over the tokens that it can say; the target's
comes from the features kept at distillation, so that the target itself need not run.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from specjax.corpus.conversation import Conversation, text_identity
from specjax.errors import ConfigError
from specjax.fingerprint import arrays_fingerprint, fingerprint, float_dtype
from specjax.loading.load import save_draft
from specjax.target import params as parameters
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.target.params import Params
from specjax.training import mesh, preflight, run
from specjax.training.identity import settings_of
from specjax.training.losses import DIVERGENCES, Divergence
from specjax.training.objective import Batch, HostBatch, Moment
from specjax.training.packing import PackedConfig, PackedObjective, attention_mask


@dataclass(frozen=True)
class DraftConfig(PackedConfig):
    """How to distil; the best checkpoint is the one with the highest acceptance."""

    epochs: int = 4
    length: int = 256
    final: float = 0.1
    b2: float = 0.95
    weight_decay: float = 0.01
    divergence: Divergence = "forward_kl"
    text_weight: float = 0.2  # of the cross-entropy with the text itself, added to the divergence
    checkpoint_every: int | None = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES or self.text_weight < 0:
            raise ConfigError(
                f"divergence {self.divergence!r}, text_weight {self.text_weight}; expected one of "
                f"{sorted(DIVERGENCES)} and a weight of at least 0."
            )


def reduced_map(frequent: Int[np.ndarray, "R"]) -> Int[np.ndarray, "R+1"]:
    """The draft's token map: the tokens it says, ascending, then -1, the row that stands for all others."""
    return np.append(np.sort(frequent), -1).astype(np.int32)


def init_draft(key: jax.Array, config: ModelConfig, target: Params, token_map: Int[np.ndarray, "R+1"]) -> Params:
    """Random float32 parameters, but the embedding: the target's rows in their main `hidden_size` directions."""
    _check_width(config, target)
    made = parameters.init(key, config)
    rows = np.asarray(target.unembedding, np.float32)[np.maximum(token_map, 0)]
    centred = rows - rows.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    reduced = centred @ directions[:, ::-1][:, : config.hidden_size]
    reduced[token_map < 0] = 0.0
    return replace(made, embed=jnp.asarray(0.02 * reduced / reduced.std(), jnp.float32))


def _check_width(config: ModelConfig, target: Params) -> None:
    if config.hidden_size > (width := target.unembedding.shape[1]):
        raise ConfigError(
            f"the draft's hidden_size {config.hidden_size} exceeds the target's {width}, whose rows it begins with; "
            "take a narrower one."
        )


class Frozen(NamedTuple):
    """The target's LM head, its rows that the draft can say (bfloat16), the draft's token map, and the draft's row of
    every target token."""

    unembedding: Float[Array, "V D"]
    sayable: Float[Array, "R D"]
    token_map: Int[Array, "R+1"]
    to_draft: Int[Array, "V"]


@dataclass(frozen=True, kw_only=True)
class DraftDistillation(PackedObjective):
    """Distils a draft of shape `config` from text with the target's features; gives its float32 parameters.

    A step's record has the loss's two parts, `divergence` and `text`, in nats over the answers' tokens. An evaluation's
    says what the draft would be accepted at, one token ahead, on average over the answers' tokens: `acceptance` is
    sum_x min(p(x), q(x)), the acceptance rate of sampling at temperature 1; `agreement` the share of positions where
    both prefer the same token, the acceptance rate of greedy decoding; `text` the cross-entropy with the text in nats,
    over the tokens that the draft can say. Conversations count up to `length` tokens.

    Attributes:
      target: its LM head reads the features that the text brings along.
      token_map: of `reduced_map`.

    Raises:
      ConfigError: a vocabulary of another size than the token map, or a width above the target's.
    """

    config: ModelConfig
    target: Params
    token_map: Int[np.ndarray, "R+1"]
    settings: DraftConfig
    score: ClassVar[str] = "acceptance"

    def __post_init__(self) -> None:
        if self.config.vocab_size != len(self.token_map):
            raise ConfigError(
                f"the draft's vocab_size is {self.config.vocab_size}, its token map has {len(self.token_map)} entries."
            )
        _check_width(self.config, self.target)

    def check(self, on: Mesh) -> None:
        mesh.check_rows(self.settings.batch_size, on)
        preflight.check_conversations(self.target.unembedding.shape[0], self.data, self.held_out)
        preflight.check_features(self.target.unembedding.shape[1], self.data, self.held_out)
        for text, what in ((self.data, "training"), (self.held_out, "evaluation")):
            preflight.check_cut(text, self.settings.length, what, ahead=1)

    def identity(self) -> dict[str, Any]:
        return {
            "training": settings_of(self.settings),
            "draft": asdict(self.config),
            "token_map": arrays_fingerprint(self.token_map),
            "target": fingerprint(self.target),
            "target_dtype": float_dtype(self.target),
            "data": text_identity(self.data),
            "held_out": text_identity(self.held_out),
        }

    def initial(self) -> Params:
        return init_draft(jax.random.key(self.settings.seed), self.config, self.target, self.token_map)

    def shardings(self, on: Mesh) -> Params:
        return parameters.shardings(self.config, on)

    def constants(self, on: Mesh) -> Frozen:
        """The target's side."""
        vocab, said = self.target.unembedding.shape[0], self.token_map[:-1]
        to_draft = np.full(vocab, len(said), np.int32)
        to_draft[said] = np.arange(len(said), dtype=np.int32)
        sayable = self.target.unembedding[said].astype(jnp.bfloat16)
        whole = Frozen(self.target.unembedding, sayable, jnp.asarray(self.token_map), jnp.asarray(to_draft))
        return mesh.put(whole, jax.tree.map(lambda _: mesh.replicated(on), whole))

    def loss(
        self, params: Params, constants: Frozen, batch: Batch, moment: Moment
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The divergence from the target, and beside it the text's cross-entropy."""
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)  # float32 master weights
        divergence = self.settings.divergence
        apart, text = distil_loss(half, self.config, constants, batch, divergence, shards=moment.shards)
        return apart + self.settings.text_weight * text, {"divergence": apart, "text": text}

    def judge(self, params: Params, constants: Frozen, batch: Batch, shards: int = 1) -> dict[str, Array]:
        """Sums over the answers' tokens: overlap of the laws, agreement, text loss, and the tokens themselves."""
        draft = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        unembedding, said = constants.unembedding, constants.token_map[:-1]

        def one(row: tuple[Array, ...]) -> Float[Array, "4"]:
            tokens, positions, segments, theirs, counted = row
            out = forward(draft, self.config, tokens, positions=positions, mask=attention_mask(segments))
            log_q = jax.nn.log_softmax(unembed(draft, out.features[:-1])[:, :-1], axis=-1)
            logits = _logits(unembedding, theirs)
            p = jnp.exp(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))[:, said]
            overlap = jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1)
            same = constants.token_map[jnp.argmax(log_q, axis=-1)] == jnp.argmax(logits, axis=-1)
            labels = tokens[1:]
            picked = jnp.take_along_axis(log_q, jnp.minimum(labels, log_q.shape[1] - 1)[:, None], axis=1)[:, 0]
            text = jnp.where(labels < log_q.shape[1], -picked, 0.0)
            found = jnp.stack([overlap, same.astype(jnp.float32), text, jnp.ones_like(text)])
            return jnp.sum(jnp.where(counted, found, 0), axis=1)

        rows = constants.to_draft[batch["tokens"]]
        parts = (rows, batch["positions"], batch["segments"], batch["features"][:, 1:], _counted(batch))
        return {"sums": jnp.sum(_by_row(one, shards, *parts), axis=0)}

    def record(self, found: Sequence[HostBatch]) -> dict[str, float]:
        sums = np.zeros(4)
        for part in found:
            sums += part["sums"]
        return dict(zip(("acceptance", "agreement", "text"), (sums[:3] / max(sums[3], 1)).tolist(), strict=True))

    def trained(self, params: Params) -> Params:
        return params

    def export(self, directory: Path, trained: Params, metadata: Mapping[str, Any]) -> None:
        """A Hugging Face directory `draft` with its token map, bfloat16."""
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trained)
        save_draft(directory / "draft", half, self.config, self.token_map)


def distil_loss(
    draft: Params, config: ModelConfig, constants: Frozen, batch: Batch, divergence: Divergence, *, shards: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean divergence and mean text cross-entropy, in nats, over the answers' tokens.

    Args:
      draft: its parameters; the products run in their dtype.
      batch: of `packing.packed`, with features.
      shards: groups of rows that are computed side by side.
    """
    rows = constants.to_draft[batch["tokens"]]

    def features(tokens: Int[Array, "T"], positions: Int[Array, "T"], segments: Int[Array, "T"]) -> Float[Array, "T d"]:
        return forward(draft, config, tokens, positions=positions, mask=attention_mask(segments)).features

    ours = jax.vmap(features)(rows, batch["positions"], batch["segments"])[:, :-1]
    # The draft's feature at slot t - 1 and the target's kept at slot t predict the same token, that of slot t.
    counted = _counted(batch)

    def one(row: tuple[Array, ...]) -> tuple[Array, Array]:
        return _row_loss(draft, constants.sayable, *row, divergence)

    apart, text = _by_row(one, shards, ours, batch["features"][:, 1:], rows[:, 1:])
    total = jnp.maximum(jnp.sum(counted), 1)
    return jnp.sum(jnp.where(counted, apart, 0)) / total, jnp.sum(jnp.where(counted, text, 0)) / total


@functools.partial(jax.checkpoint, static_argnums=(5,))
def _row_loss(
    draft: Params,
    sayable: Float[Array, "R D"],
    ours: Float[Array, "T d"],
    theirs: Float[Array, "T D"],
    labels: Int[Array, "T"],
    divergence: Divergence,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    # Recomputed in the backward pass: T x R logits of both models live only here.
    log_q = jax.nn.log_softmax(unembed(draft, ours)[:, :-1], axis=-1)
    log_p = jax.nn.log_softmax(_logits(sayable, theirs), -1)
    known = labels < log_q.shape[1]
    picked = jnp.take_along_axis(log_q, jnp.where(known, labels, 0)[:, None], axis=1)[:, 0]
    return DIVERGENCES[divergence](log_p, log_q), jnp.where(known, -picked, 0.0)


def _logits(rows: Float[Array, "V D"], features: Float[Array, "T D"]) -> Float[Array, "T V"]:
    return jnp.einsum("TD,VD->TV", features.astype(rows.dtype), rows, preferred_element_type=jnp.float32)


def _by_row(function: Callable[..., Any], shards: int, *arrays: Array) -> Any:
    """`function` of every row, one after the other within each of the groups of rows that devices hold."""
    if shards == 1:
        return jax.lax.map(function, arrays)
    groups = tuple(array.reshape(shards, -1, *array.shape[1:]) for array in arrays)
    found = jax.vmap(lambda *rows: jax.lax.map(function, rows))(*groups)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def _counted(batch: Batch) -> Bool[Array, "B T-1"]:
    segments = batch["segments"]
    return batch["answer"][:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def evaluate_draft(
    draft: Params,
    config: ModelConfig,
    target: Params,
    token_map: Int[np.ndarray, "R+1"],
    data: Sequence[Conversation],
    settings: DraftConfig,
) -> dict[str, float]:
    """What `DraftDistillation` says of a draft in an evaluation, on `data`."""
    objective = DraftDistillation(
        config=config, target=target, token_map=token_map, data=(), held_out=data, settings=settings
    )
    return run.evaluate(objective, draft)
