"""Rank tables: one pass over text records, at every position, where each head ranks the true future token.

A table holds all that greedy acceptance of any tree depends on, so that trees are compared without decoding again
(`simulate`, `search`). Position j of a sequence is the answer's token j; its feature predicted that token, and head i
(from 0), reading that feature, is to give token j + 1 + i: the round whose root is token j sees exactly `ranks[j]`.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specjax.config import ModelConfig
from specjax.errors import DataError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads, draft_projection, project
from specjax.loading.load import Model
from specjax.model import forward, unembed
from specjax.params import Params
from specjax.training.losses import IGNORED, future_labels, label_ranks, reduce_labels

UNLABELLED = -1  # a rank past the end of its sequence
_CHUNK = 128  # positions whose LM-head logits exist at once
_PADDING = 256  # sequences are padded to a multiple of this, so that few lengths compile
_FORMAT, _VERSION = "specjax.ranks", 1


@dataclass(frozen=True)
class Text:
    """A sequence to measure: `answer` [a] after `prompt` [p], token ids, and a category to report by."""

    prompt: Sequence[int] | np.ndarray
    answer: Sequence[int] | np.ndarray
    category: str = "all"


@dataclass(frozen=True)
class RankTable:
    """Ranks over n positions of c sequences, end to end; on the host.

    Attributes:
      ranks: of the true token for each head, 0 the best; `cap` stands for that rank and all beyond (tokens outside a
        reduced vocabulary too), `UNLABELLED` for positions past the end of the sequence. int16.
      confidence: each head's probability of its own best token.
      log_p: the target's ln probability of token j, given all before it.
      entropy: of that distribution, in nats.
      tokens: the text itself.
      lengths: positions per sequence; they sum to n.
      categories: of every sequence.
      cap: ranks below it are exact.
      manifest: what made the table; `model` and `heads` are fingerprints.
    """

    ranks: Int[np.ndarray, "n C"]
    confidence: Float[np.ndarray, "n C"]
    log_p: Float[np.ndarray, "n"]
    entropy: Float[np.ndarray, "n"]
    tokens: Int[np.ndarray, "n"]
    lengths: Int[np.ndarray, "c"]
    categories: tuple[str, ...]
    cap: int
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def num_heads(self) -> int:
        """C."""
        return self.ranks.shape[1]

    @functools.cached_property
    def starts(self) -> Int[np.ndarray, "c"]:
        """Where each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def rooted(self) -> np.ndarray:
        """Which positions can be a round's root, bool [n]: all but the last of each sequence."""
        return self.ranks[:, 0] != UNLABELLED

    def hits(self) -> Float[np.ndarray, "C cap"]:
        """hits[i, r]: the share of head i's labelled positions where the true token has rank r: the marginals."""
        labelled = (self.ranks != UNLABELLED).sum(0)
        counts = [np.bincount(column[column >= 0], minlength=self.cap + 1)[: self.cap] for column in self.ranks.T]
        return np.stack(counts) / np.maximum(labelled, 1)[:, None]

    def accuracy(self, k: int) -> Float[np.ndarray, "C"]:
        """Each head's top-k accuracy.

        Raises:
          DataError: a k beyond the cap.
        """
        if not 1 <= k <= self.cap:
            raise DataError(f"k is {k}; this table knows ranks below {self.cap}.")
        return self.hits()[:, :k].sum(1)

    def conditional(self, path: Sequence[int]) -> Float[np.ndarray, "cap"]:
        """The law of the next head's rank given that the heads before it had the ranks `path`; zeros where never seen.

        Heads are not independent: compare with `hits()[len(path)]`.

        Raises:
          DataError: a path that leaves no head.
        """
        depth = len(path)
        if depth >= self.num_heads:
            raise DataError(f"the path {tuple(path)} uses all {self.num_heads} heads; give fewer ranks.")
        column = self.ranks[(self.ranks[:, :depth] == np.asarray(path, int)).all(1), depth]
        column = column[column != UNLABELLED]
        return np.bincount(column, minlength=self.cap + 1)[: self.cap] / max(len(column), 1)

    def calibration(self, head: int, bins: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean confidence, accuracy and count of a head's best token in equal-width bins of confidence [bins]."""
        labelled = self.ranks[:, head] != UNLABELLED
        confidence, right = self.confidence[labelled, head], self.ranks[labelled, head] == 0
        index = np.minimum((confidence * bins).astype(int), bins - 1)
        count = np.bincount(index, minlength=bins)
        sums = (np.bincount(index, weights, bins) for weights in (confidence, right.astype(float)))
        mean, accuracy = (total / np.maximum(count, 1) for total in sums)
        return mean, accuracy, count

    def select(self, keep: Callable[[int], bool]) -> "RankTable":
        """The table of the sequences whose number `keep` accepts, e.g. of one category.

        Raises:
          DataError: none is left.
        """
        chosen = np.array([keep(i) for i in range(len(self.lengths))], bool)
        inside = np.repeat(chosen, self.lengths)
        return RankTable(
            self.ranks[inside],
            self.confidence[inside],
            self.log_p[inside],
            self.entropy[inside],
            self.tokens[inside],
            self.lengths[chosen],
            tuple(c for c, k in zip(self.categories, chosen, strict=True) if k),
            self.cap,
            self.manifest,
        ).check()

    def category(self, name: str) -> "RankTable":
        """The sequences of one category.

        Raises:
          DataError: an unknown category; the message lists the known ones.
        """
        if name not in self.categories:
            raise DataError(f"no category {name!r} in this table; it has {sorted(set(self.categories))}.")
        return self.select(lambda i: self.categories[i] == name)

    def check(self, model: Model | None = None, heads: Heads | None = None) -> "RankTable":
        """Gives the table back if it is sound, and made with `model` and `heads` where these are given.

        Raises:
          DataError: a table without a round, inconsistent sizes, or another model's or other heads' table.
        """
        n = len(self.ranks)
        sizes = {len(part) for part in (self.confidence, self.log_p, self.entropy, self.tokens)}
        if sizes != {n} or int(self.lengths.sum()) != n or len(self.categories) != len(self.lengths):
            raise DataError(
                f"the rank table's columns have {sorted(sizes | {n})} rows for lengths of {self.lengths.sum()}."
            )
        if not n or not self.rooted.any():
            raise DataError("the rank table is empty: no sequence has two tokens; measure longer text.")
        for name, tree in (("model", model and model.params), ("heads", heads and heads.params)):
            if tree is not None and self.manifest.get(name) != fingerprint(tree):
                raise DataError(
                    f"the rank table was measured with {name} of fingerprint {self.manifest.get(name)}, these have "
                    f"{fingerprint(tree)}; measure again."
                )
        return self

    def save(self, path: str | Path) -> None:
        """Writes one compressed .npz file with the manifest in it."""
        header = {"format": _FORMAT, "version": _VERSION, "cap": self.cap, "manifest": self.manifest}
        np.savez_compressed(
            path,
            header=np.array(json.dumps(header)),
            ranks=self.ranks,
            confidence=self.confidence.astype(np.float16),
            log_p=self.log_p,
            entropy=self.entropy,
            tokens=self.tokens,
            lengths=self.lengths,
            categories=np.array(self.categories),
        )

    @classmethod
    def load(cls, path: str | Path) -> "RankTable":
        """Reads what `save` wrote.

        Raises:
          DataError: no such file, another format or version, or an unsound table.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                data = {name: file[name] for name in file}
            header = json.loads(str(data["header"]))
            found = header["format"], header["version"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} is not a rank table ({error}); make one with `specjax tree measure`.") from error
        if found != (_FORMAT, _VERSION):
            raise DataError(f"{path} has format and version {found}; expected {(_FORMAT, _VERSION)}. Measure again.")
        return cls(
            data["ranks"],
            data["confidence"].astype(np.float32),
            data["log_p"],
            data["entropy"],
            data["tokens"],
            data["lengths"],
            tuple(map(str, data["categories"])),
            int(header["cap"]),
            header["manifest"],
        ).check()


def measure(
    model: Model,
    heads: Heads,
    texts: Sequence[Text],
    *,
    cap: int = 32,
    progress: Callable[[int], None] = lambda tokens: None,
) -> RankTable:
    """Measures `heads` on texts in one teacher-forced pass, a sequence at a time.

    On the target's own greedy answers (`generate`), what the table says is exactly what decoding does.

    Args:
      cap: ranks from here on are recorded as `cap`; wider trees cannot be simulated.
      progress: called with the number of tokens after every sequence.

    Raises:
      DataError: no text, an empty prompt or answer, token ids outside the vocabulary, or a cap below 1.
    """
    if not texts:
        raise DataError("there is no text to measure; pass at least one sequence.")
    if not 1 <= cap < 2**15:
        raise DataError(f"cap is {cap}; expected 1 to 32767.")
    projection = draft_projection(heads, model.params.unembedding)
    vocab, token_map = model.config.vocab_size, heads.token_map
    columns: list[tuple[np.ndarray, ...]] = []
    began = time.perf_counter()
    for number, text in enumerate(texts):
        prompt, answer = (np.asarray(part, np.int32) for part in (text.prompt, text.answer))
        if not (prompt.ndim == answer.ndim == 1 and prompt.size and answer.size):
            raise DataError(f"text {number} has a prompt of shape {prompt.shape} and an answer of {answer.shape}.")
        whole = np.concatenate([prompt, answer])
        if whole.min() < 0 or whole.max() >= vocab:
            raise DataError(
                f"text {number} has token ids from {whole.min()} to {whole.max()}; the vocabulary is {vocab}."
            )
        labels = future_labels(answer, np.array([len(answer)]), heads.config.num_heads)
        rows = labels if token_map is None else reduce_labels(labels, np.asarray(token_map), vocab)
        padded = np.zeros(-(-len(whole) // _PADDING) * _PADDING, np.int32)
        padded[: len(whole)] = whole
        at = np.zeros(-(-len(answer) // _CHUNK) * _CHUNK, np.int32)
        at[: len(answer)] = np.arange(len(answer)) + len(prompt) - 1
        wanted = np.full((len(at), labels.shape[1]), IGNORED, np.int32)
        wanted[: len(answer)] = rows
        out = _measure(
            model.params, model.config, heads, projection, jnp.asarray(padded), jnp.asarray(at), jnp.asarray(wanted)
        )
        ranks_here, *others = (np.asarray(part)[: len(answer)] for part in out)
        # Outside the reduced vocabulary no head can be right.
        ranks_here = np.where(
            labels == IGNORED, UNLABELLED, np.where(rows == IGNORED, cap, np.minimum(ranks_here, cap))
        )
        columns.append((ranks_here.astype(np.int16), *others, answer))
        progress(len(answer))
    seconds = time.perf_counter() - began
    ranks, confidence, log_p, entropy, tokens = (np.concatenate(column) for column in zip(*columns, strict=True))
    manifest = {
        "model": fingerprint(model.params),
        "model_name": model.config.name,
        "heads": fingerprint(heads.params),
        "dtype": jnp.dtype(model.params.dtype).name,
        "tokens": len(tokens),
        "tokens_per_second": len(tokens) / seconds,
    }
    lengths = np.array([len(text.answer) for text in texts], np.int32)
    categories = tuple(text.category for text in texts)
    return RankTable(ranks, confidence, log_p, entropy, tokens, lengths, categories, cap, manifest).check()


@functools.partial(jax.jit, static_argnames="config")
def _measure(
    params: Params,
    config: ModelConfig,
    heads: Heads,
    projection: Float[Array, "R D"] | None,
    tokens: Int[Array, "T"],
    at: Int[Array, "n"],
    labels: Int[Array, "n C"],
) -> tuple[Int[Array, "n C"], Float[Array, "n C"], Float[Array, "n"], Float[Array, "n"]]:
    features = forward(params, config, tokens).features

    def chunk(part: tuple[Array, Array]) -> tuple[Array, ...]:
        at, labels = part
        here = features[at]
        drafts = project(heads, projection, here)
        best = jnp.exp(jnp.max(drafts, -1) - jax.nn.logsumexp(drafts, -1))
        log_law = jax.nn.log_softmax(unembed(params, here), axis=-1)
        said = jnp.take_along_axis(log_law, tokens[at + 1][:, None], axis=1)[:, 0]
        law = jnp.exp(log_law)
        return label_ranks(drafts, labels).T, best.T, said, -jnp.sum(jnp.where(law > 0, law * log_law, 0.0), axis=-1)

    parts = at.reshape(-1, _CHUNK), labels.reshape(-1, _CHUNK, labels.shape[1])
    out = jax.lax.map(chunk, parts)
    return tuple(part.reshape(len(at), *part.shape[2:]) for part in out)  # type: ignore[return-value]
