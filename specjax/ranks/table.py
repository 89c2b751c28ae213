"""The rank table: what one pass over text (`ranks.measure`) recorded, the statistics it gives, and its file.

Position j of a sequence is the answer's token j; its feature predicted that token, and head i (from 0), reading that
feature, is to give token j + 1 + i: the round whose root is token j sees exactly `ranks[j]`. The law that predicted
token j, with its `log_p` and `entropy`, is row j's; head i's draft there is judged by the law of row j + 1 + i.
"""

import functools
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from specjax.errors import DataError
from specjax.files import read_arrays, write_atomically
from specjax.fingerprint import fingerprint, float_dtype
from specjax.heads import Heads
from specjax.loading.load import Model

UNLABELLED = -1  # a rank past the end of its sequence
_FORMAT, _VERSION = "specjax.ranks", 2
_COLUMNS = ("ranks", "confidence", "log_p", "entropy", "tokens", "lengths", "categories")
_OPTIONAL = ("draft_log_p", "typical_entropy")
# Which of a table's positions count: for all heads alike, or for each.
Where = Bool[np.ndarray, "n"] | Bool[np.ndarray, "n C"] | None


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
      manifest: what made the table; `model` and `heads` are fingerprints, `dtype` and `heads_dtype` what they ran in.
      draft_log_p: for typical acceptance: ln of the probability, under the law that judges it on this text (row
        j + 1 + i, at the manifest's `temperature`), of each of head i's R best candidates; -inf past the end.
      typical_entropy: of row j's law at that temperature, as `Typical` has it: -sum p ln(p + 1e-5).
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
    draft_log_p: Float[np.ndarray, "n C R"] | None = None
    typical_entropy: Float[np.ndarray, "n"] | None = None

    @property
    def num_heads(self) -> int:
        """C."""
        return self.ranks.shape[1]

    @functools.cached_property
    def starts(self) -> Int[np.ndarray, "c"]:
        """Where each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    @functools.cached_property
    def rooted(self) -> Bool[np.ndarray, "n"]:
        """Which positions can be a round's root: all but the last of each sequence."""
        return self.ranks[:, 0] != UNLABELLED

    @functools.cached_property
    def judged_entropy(self) -> Float[np.ndarray, "n C"]:
        """The entropy of the law that judges head i's draft at j, row j + 1 + i's; NaN past the sequence's end."""
        rows = np.minimum(np.arange(len(self.ranks))[:, None] + 1 + np.arange(self.num_heads), len(self.ranks) - 1)
        return np.where(self.ranks != UNLABELLED, self.entropy[rows], np.nan)

    def hits(self, where: Where = None) -> Float[np.ndarray, "C cap"]:
        """hits[i, r]: the share of head i's labelled positions where the true token has rank r: the marginals."""
        labelled = self._labelled(where)
        columns = zip(self.ranks.T, labelled.T, strict=True)
        counts = [np.bincount(column[inside], minlength=self.cap + 1)[: self.cap] for column, inside in columns]
        return np.stack(counts) / np.maximum(labelled.sum(0), 1)[:, None]

    def accuracy(self, k: int, where: Where = None) -> Float[np.ndarray, "C"]:
        """Each head's top-k accuracy.

        Raises:
          DataError: a k beyond the cap.
        """
        if not 1 <= k <= self.cap:
            raise DataError(f"k is {k}; this table knows ranks below {self.cap}.")
        return self.hits(where)[:, :k].sum(1)

    def conditional(self, path: Sequence[int], where: Where = None) -> Float[np.ndarray, "cap"]:
        """The law of the next head's rank given that the heads before it had the ranks `path`; zeros where never seen.

        Heads are not independent: compare with `hits()[len(path)]`.

        Raises:
          DataError: a path that leaves no head, or with a rank that the table does not know.
        """
        depth = len(path)
        if depth >= self.num_heads:
            raise DataError(f"the path {tuple(path)} uses all {self.num_heads} heads; give fewer ranks.")
        if any(not 0 <= rank < self.cap for rank in path):
            raise DataError(f"the path is {tuple(path)}; this table knows ranks from 0 to {self.cap - 1}.")
        along = (self.ranks[:, :depth] == np.asarray(path, int)).all(1)
        column = self.ranks[along & self._labelled(where)[:, depth], depth]
        return np.bincount(column, minlength=self.cap + 1)[: self.cap] / max(len(column), 1)

    def calibration(self, head: int, bins: int = 10, where: Where = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean confidence, accuracy and count of a head's best token in equal-width bins of confidence [bins].

        Raises:
          DataError: a head that the table does not have, or fewer than one bin.
        """
        if not 0 <= head < self.num_heads or bins < 1:
            raise DataError(f"head is {head}, bins {bins}; expected 0 to {self.num_heads - 1}, and at least 1.")
        labelled = self._labelled(where)[:, head]
        confidence, right = self.confidence[labelled, head], self.ranks[labelled, head] == 0
        index = np.minimum((confidence * bins).astype(int), bins - 1)
        count = np.bincount(index, minlength=bins)
        sums = (np.bincount(index, weights, bins) for weights in (confidence, right.astype(float)))
        mean, accuracy = (total / np.maximum(count, 1) for total in sums)
        return mean, accuracy, count

    def entropy_bins(self, k: int) -> tuple[Float[np.ndarray, "k+1"], Int[np.ndarray, "n C"]]:
        """Edges of k bins of `judged_entropy` of about as many drafts each, and the bin of each draft; -1 past the end.

        `accuracy(1, where=index == b)` is then the accuracy in bin b.

        Raises:
          DataError: a k below 1.
        """
        if k < 1:
            raise DataError(f"k is {k}; expected at least one bin.")
        known = ~np.isnan(self.judged_entropy)
        edges = np.quantile(self.judged_entropy[known], np.linspace(0, 1, k + 1))
        index = np.searchsorted(edges[1:-1], self.judged_entropy, side="right")
        return edges, np.where(known, index, -1)

    def _labelled(self, where: Where) -> Bool[np.ndarray, "n C"]:
        labelled = self.ranks != UNLABELLED
        if where is None:
            return labelled
        if where.dtype != bool or where.shape not in (labelled.shape, labelled.shape[:1]):
            n, c = labelled.shape
            raise DataError(
                f"where is {where.dtype} of shape {where.shape}; expected bool of shape {(n,)} or {(n, c)}."
            )
        return labelled & (where if where.ndim == 2 else where[:, None])

    def select(self, keep: Callable[[int], bool]) -> "RankTable":
        """The table of the sequences whose number `keep` accepts, e.g. of one category.

        Raises:
          DataError: none is left.
        """
        chosen = np.array([keep(i) for i in range(len(self.lengths))], bool)
        inside = np.repeat(chosen, self.lengths)
        columns: dict[str, Any] = {
            name: None if (column := getattr(self, name)) is None else column[inside]
            for name in ("ranks", "confidence", "log_p", "entropy", "tokens", *_OPTIONAL)
        }
        return RankTable(
            **columns,
            lengths=self.lengths[chosen],
            categories=tuple(c for c, k in zip(self.categories, chosen, strict=True) if k),
            cap=self.cap,
            manifest=self.manifest | {"tokens": int(inside.sum())},
        ).check()

    def category(self, name: str) -> "RankTable":
        """The sequences of one category.

        Raises:
          DataError: an unknown category; the message lists the known ones.
        """
        if name not in self.categories:
            raise DataError(f"no category {name!r} in this table; it has {sorted(set(self.categories))}.")
        return self.select(lambda i: self.categories[i] == name)

    def check(self, model: Model | None = None, heads: Heads | None = None, *, any_dtype: bool = False) -> "RankTable":
        """Gives the table back if it is sound, and made with `model` and `heads` where these are given.

        Args:
          any_dtype: takes a table that was measured in another dtype: its ranks are nearly these.

        Raises:
          DataError: a table without a round, inconsistent sizes, or one of another model, other heads or dtype.
        """
        n = len(self.ranks)
        parts = (self.confidence, self.log_p, self.entropy, self.tokens, self.draft_log_p, self.typical_entropy)
        sizes = {len(part) for part in parts if part is not None}
        if sizes != {n} or int(self.lengths.sum()) != n or len(self.categories) != len(self.lengths):
            raise DataError(
                f"the rank table's columns have {sorted(sizes | {n})} rows for lengths of {self.lengths.sum()}."
            )
        ranks = self.ranks
        if ranks.ndim != 2 or not ranks.shape[1] or self.confidence.shape != ranks.shape:
            raise DataError(
                f"the rank table has ranks of shape {ranks.shape} and confidence of {self.confidence.shape}; expected "
                "one column per head in both."
            )
        if n and not UNLABELLED <= ranks.min() <= ranks.max() <= self.cap:
            raise DataError(
                f"the rank table has ranks from {ranks.min()} to {ranks.max()}; its cap is {self.cap}. Measure again."
            )
        if (self.draft_log_p is None) != (self.typical_entropy is None):
            raise DataError("the rank table has one of draft_log_p and typical_entropy; expected both, or neither.")
        if not n or not self.rooted.any():
            raise DataError("the rank table is empty: no sequence has two tokens; measure longer text.")
        given = {
            "model": (model and model.params, "dtype"),
            "heads": (heads and (heads.params, heads.token_map), "heads_dtype"),
        }
        for name, (tree, dtype) in given.items():
            if tree is None:
                continue
            if self.manifest.get(name) != fingerprint(tree):
                raise DataError(
                    f"the rank table was measured with {name} {self.manifest.get(name)}, these are "
                    f"{fingerprint(tree)}: other weights. Measure again, `specjax tree measure`, or load the {name} "
                    "that it was made with."
                )
            here = float_dtype(tree)
            if not any_dtype and self.manifest.get(dtype) != here:
                raise DataError(
                    f"the rank table was measured with {name} in {self.manifest.get(dtype)}, these are in {here}; load "
                    f"them with dtype={self.manifest.get(dtype)!r}, or measure again with --dtype {here}."
                )
        return self

    def save(self, path: str | Path) -> None:
        """Writes one compressed .npz file with the manifest in it.

        Raises:
          DataError: a path that does not end in .npz.
        """
        check_path(path)
        header = {"format": _FORMAT, "version": _VERSION, "cap": self.cap, "manifest": self.manifest}
        columns = {name: getattr(self, name) for name in (*_COLUMNS, *_OPTIONAL) if getattr(self, name) is not None}
        columns |= {"confidence": self.confidence.astype(np.float16), "categories": np.array(self.categories)}
        whole = io.BytesIO()
        np.savez_compressed(whole, header=np.array(json.dumps(header)), **columns)
        write_atomically(Path(path), whole.getbuffer())

    @classmethod
    def load(cls, path: str | Path) -> "RankTable":
        """Reads what `save` wrote.

        Raises:
          DataError: no such file, a damaged one, another format or version, missing columns, or an unsound table.
        """
        try:
            data = read_arrays(path, DataError)
            header = json.loads(str(data["header"]))
            found = header["format"], header["version"]
            cap, manifest = int(header["cap"]), dict(header["manifest"])
            categories = tuple(map(str, data.get("categories", ())))
        except Exception as error:  # of what NumPy makes of damaged texts, among others
            raise DataError(f"{path} is not a rank table ({error}); make one with `specjax tree measure`.") from error
        if found != (_FORMAT, _VERSION):
            raise DataError(f"{path} has format and version {found}; expected {(_FORMAT, _VERSION)}. Measure again.")
        if missing := [name for name in _COLUMNS if name not in data]:
            raise DataError(f"{path} lacks the columns {missing}; measure again with `specjax tree measure`.")
        columns: dict[str, Any] = {name: data[name] for name in (*_COLUMNS, *_OPTIONAL) if name in data}
        columns |= {"confidence": data["confidence"].astype(np.float32)}
        return cls(**columns | {"categories": categories}, cap=cap, manifest=manifest).check()


def check_path(path: str | Path) -> None:
    """Raises a `DataError` for a path that a table cannot be saved to: one that does not end in .npz."""
    if Path(path).suffix != ".npz":
        raise DataError(f"rank tables are .npz files, not {Path(path).name!r}; change the name.")
