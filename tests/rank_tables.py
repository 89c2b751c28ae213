"""Rank tables made up for the tests."""

import numpy as np

from specjax.ranks.table import UNLABELLED, RankTable


def table_of(seed=0, *, heads=2, cap=8, sequences=6, length=40, ranks=None, dependent=False) -> RankTable:
    """Random ranks, or the given ones as a single sequence; `dependent` heads are right together more often."""
    if ranks is not None:
        body = np.array(ranks)
        sequences, length, heads = 1, len(body), body.shape[1]
    else:
        rng = np.random.default_rng(seed)
        hard = rng.random((sequences * length, 1)) < 0.5
        p = np.where(hard, 0.25, 0.8) if dependent else 0.5
        body = np.minimum(rng.geometric(p, (sequences * length, heads)) - 1, cap)
    body = body.reshape(sequences, length, heads).astype(np.int16)
    for head in range(heads):
        body[:, max(0, length - 1 - head) :, head] = UNLABELLED
    n = sequences * length
    return RankTable(
        body.reshape(n, heads), np.full((n, heads), 0.5), np.full(n, -1.0), np.ones(n), np.arange(n),
        np.full(sequences, length), tuple("ab"[i % 2] for i in range(sequences)), cap, {"model": "m", "heads": "h"},
    )  # fmt: skip
