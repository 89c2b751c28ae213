"""One teacher-forced pass over text records, at every position, where each head ranks the true future token.

The `RankTable` that comes of it holds all that acceptance of any tree depends on, so that trees are compared without
decoding again (`simulate`, `search`).
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.checks import is_whole
from specjax.errors import DataError
from specjax.fingerprint import fingerprint, float_dtype, text_fingerprint
from specjax.heads import Heads, draft_projection, project
from specjax.journal import NOWHERE, Journal
from specjax.loading.load import Model
from specjax.ranks.labels import IGNORED, future_labels, label_ranks, reduce_labels
from specjax.ranks.table import UNLABELLED, RankTable
from specjax.target.config import ModelConfig
from specjax.target.model import forward, unembed
from specjax.target.params import Params

_GROUP = 16  # texts that a journal keeps together
_CHUNK = 128  # positions whose LM-head logits exist at once
_PADDING = 128  # sequences are padded to a multiple of this, so that few lengths compile


@dataclass(frozen=True)
class Text:
    """A sequence to measure: `answer` [a] after `prompt` [p], token ids, and a category to report by."""

    prompt: Sequence[int] | np.ndarray
    answer: Sequence[int] | np.ndarray
    category: str = "all"


def check_measure(cap: int, typical_temperature: float | None) -> None:
    """Raises DataError for a cap or a temperature that `measure` would refuse."""
    if not is_whole(cap) or not 1 <= cap < 2**15:
        raise DataError(f"cap is {cap}; expected a whole number from 1 to 32767.")
    if typical_temperature is not None and not 0 < typical_temperature < math.inf:
        raise DataError(f"typical_temperature is {typical_temperature}; expected a positive number, or None.")


def measure(
    model: Model,
    heads: Heads,
    texts: Sequence[Text],
    *,
    cap: int = 32,
    typical_temperature: float | None = None,
    candidates: int = 10,
    progress: Callable[[int], None] = lambda tokens: None,
    journal: Journal = NOWHERE,
) -> RankTable:
    """Measures `heads` on texts in one teacher-forced pass, a sequence at a time.

    On the target's own greedy answers (`generate`), the table says exactly what greedy decoding does in float32; in
    bfloat16 near-ties can flip.

    Args:
      cap: ranks from here on are recorded as `cap`; wider trees cannot be simulated.
      typical_temperature: records what typical acceptance at this temperature depends on, too; None: it does not.
      candidates: how many of each head's best tokens are recorded for that, R.
      progress: called with the number of tokens of the sequences that are done.
      journal: keeps what is measured. Where a stop is asked for, the table is of the first texts alone, and the
        manifest's `partial` says of how many.

    Raises:
      DataError: no text, an empty prompt or answer, token ids outside the vocabulary, a cap below 1, a temperature that
        is not positive, or more candidates than the heads' vocabulary holds.
      ConfigError: heads of another width or vocabulary than the model's.
    """
    if not texts:
        raise DataError("there is no text to measure; pass at least one sequence.")
    check_measure(cap, typical_temperature)
    if not 1 <= candidates <= heads.config.output_size and typical_temperature is not None:
        raise DataError(f"candidates is {candidates}; these heads allow 1 to {heads.config.output_size}.")
    heads.check(model.config)
    projection = draft_projection(heads, model.params.unembedding)
    vocab, token_map = model.config.vocab_size, heads.token_map
    wholes = []
    for number, text in enumerate(texts):
        prompt, answer = np.asarray(text.prompt), np.asarray(text.answer)
        if not (prompt.ndim == answer.ndim == 1 and prompt.size and answer.size):
            raise DataError(f"text {number} has a prompt of shape {prompt.shape} and an answer of {answer.shape}.")
        whole = np.concatenate([prompt, answer])
        if whole.dtype.kind not in "iu":
            raise DataError(f"text {number} holds {whole.dtype}; expected token ids, whole numbers.")
        if whole.min() < 0 or whole.max() >= vocab:
            raise DataError(
                f"text {number} has token ids from {whole.min()} to {whole.max()}; the vocabulary is {vocab}."
            )
        if len(whole) > model.config.max_positions:
            raise DataError(
                f"text {number} has {len(whole)} tokens, the model reads {model.config.max_positions}; cut it."
            )
        wholes.append(whole)

    def measured(whole: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, ...]:
        labels = future_labels(answer, np.array([len(answer)]), heads.config.num_heads)
        rows = labels if token_map is None else reduce_labels(labels, np.asarray(token_map), vocab)
        padded = np.zeros(-(-len(whole) // _PADDING) * _PADDING, np.int32)
        padded[: len(whole)] = whole
        at = np.zeros(-(-len(answer) // _CHUNK) * _CHUNK, np.int32)
        at[: len(answer)] = np.arange(len(answer)) + len(whole) - len(answer) - 1
        wanted = np.full((len(at), labels.shape[1]), IGNORED, np.int32)
        wanted[: len(answer)] = rows
        out = _measure(
            model.params,
            model.config,
            heads,
            projection,
            jnp.asarray(padded),
            jnp.asarray(at),
            jnp.asarray(wanted),
            jnp.float32(typical_temperature or 1.0),
            candidates if typical_temperature is not None else 0,
        )
        ranks_here, *others = (np.asarray(part)[: len(answer)] for part in out)
        # Outside the reduced vocabulary no head can be right.
        ranks_here = np.where(
            labels == IGNORED, UNLABELLED, np.where(rows == IGNORED, cap, np.minimum(ranks_here, cap))
        )
        if typical_temperature is not None:
            others[3] = np.where((labels == IGNORED)[..., None], -np.inf, others[3])
        return ranks_here.astype(np.int16), *others, answer.astype(np.int32)

    def group(number: int) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        here = slice(number * _GROUP, (number + 1) * _GROUP)
        parts = [measured(w, np.asarray(text.answer)) for w, text in zip(wholes[here], texts[here], strict=True)]
        columns = {str(i): np.concatenate(column) for i, column in enumerate(zip(*parts, strict=True))}
        return columns | {"seconds": np.array(time.perf_counter() - began)}

    def tell(number: int) -> None:
        progress(sum(len(text.answer) for text in texts[number * _GROUP : (number + 1) * _GROUP]))

    done, partial = journal.pieces("groups of texts", -(-len(texts) // _GROUP), group, progress=tell)
    seconds = sum(float(piece["seconds"]) for piece in done)
    columns = (np.concatenate([piece[str(i)] for piece in done]) for i in range(len(done[0]) - 1))
    ranks, confidence, log_p, entropy, *typical, tokens = columns
    texts = texts[: len(done) * _GROUP]
    manifest = {
        "model": fingerprint(model.params),
        "model_name": model.config.name,
        "heads": fingerprint((heads.params, heads.token_map)),
        "dtype": float_dtype(model.params),
        "heads_dtype": float_dtype(heads.params),
        "text": text_fingerprint(
            "".join(json.dumps([list(map(int, t.prompt)), list(map(int, t.answer))]) for t in texts)
        ),
        "specjax": version("specjax"),
        "tokens": len(tokens),
        "tokens_per_second": len(tokens) / seconds,
        "temperature": typical_temperature,
        **({} if partial is None else {"partial": partial}),
    }
    lengths = np.array([len(text.answer) for text in texts], np.int32)
    categories = tuple(text.category for text in texts)
    table = RankTable(ranks, confidence, log_p, entropy, tokens, lengths, categories, cap, manifest, *typical)
    return table.check()


@functools.partial(jax.jit, static_argnames=("config", "candidates"))
def _measure(
    params: Params,
    config: ModelConfig,
    heads: Heads,
    projection: Float[Array, "R D"] | None,
    tokens: Int[Array, "T"],
    at: Int[Array, "n"],
    labels: Int[Array, "n C"],
    temperature: Float[Array, ""],
    candidates: int,
) -> tuple[Array, ...]:
    # ranks [n C], confidence [n C], log_p [n], entropy [n]; with candidates, draft_log_p [n C R], typical_entropy [n].
    features = forward(params, config, tokens).features

    def chunk(part: tuple[Array, Array]) -> tuple[Array, ...]:
        at, labels = part
        here = features[at]
        drafts = project(heads, projection, here)
        best = jnp.exp(jnp.max(drafts, -1) - jax.nn.logsumexp(drafts, -1))
        log_law = jax.nn.log_softmax(unembed(params, here), axis=-1)
        said = jnp.take_along_axis(log_law, tokens[at + 1][:, None], axis=1)[:, 0]
        law = jnp.exp(log_law)
        entropy = -jnp.sum(jnp.where(law > 0, law * log_law, 0.0), axis=-1)
        found = label_ranks(drafts, labels).T, best.T, said, entropy
        if not candidates:
            return found
        ids = jax.lax.top_k(drafts, candidates)[1]
        ids = ids if heads.token_map is None else heads.token_map[ids]
        return *found, jnp.swapaxes(ids, 0, 1)

    def judge(part: tuple[Array, Array]) -> tuple[Array, Array]:
        at, ids = part
        log_law = jax.nn.log_softmax(unembed(params, features[at]) / temperature, axis=-1)
        law = jnp.exp(log_law)
        log_p = jnp.take_along_axis(log_law, ids.reshape(len(at), -1), axis=1).reshape(ids.shape)
        return log_p, -jnp.sum(law * jnp.log(law + 1e-5), axis=-1)  # the constant is Typical's

    def in_chunks(function: Callable[..., tuple[Array, ...]], *columns: Array) -> tuple[Array, ...]:
        out = jax.lax.map(function, tuple(column.reshape(-1, _CHUNK, *column.shape[1:]) for column in columns))
        return tuple(part.reshape(len(at), *part.shape[2:]) for part in out)

    if not candidates:
        return in_chunks(chunk, at, labels)
    *found, ids = in_chunks(chunk, at, labels)

    # Root j's candidates for head i are judged by row j + 1 + i, where the text's token j + 1 + i was predicted.
    def shift(column: Array, sign: int) -> Array:
        return jnp.stack([jnp.roll(column[:, i], sign * (1 + i), axis=0) for i in range(column.shape[1])], axis=1)

    log_p, typical_entropy = in_chunks(judge, at, shift(ids, 1))
    return *found, shift(log_p, -1), typical_entropy
