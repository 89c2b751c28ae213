"""Honest timing: methods alternate prompt by prompt, compile time and prefill stay outside, spreads are kept.

A speed-up is per prompt, against autoregressive decoding in the same dtype and run; where another dtype decodes
faster autoregressively, the ratio to that one stands beside it.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decode
from specjax.acceptance import Acceptance, Greedy
from specjax.drafters.base import Drafter, NoDrafter
from specjax.errors import ConfigError, DataError
from specjax.fingerprint import fingerprint, text_fingerprint
from specjax.journal import NOWHERE, Journal
from specjax.loading.load import Model
from specjax.target.model import forward, unembed


@dataclass(frozen=True)
class Contender:
    """A named way to decode."""

    name: str
    model: Model
    drafter: Drafter = field(default_factory=NoDrafter)
    acceptance: Acceptance = field(default_factory=Greedy)

    @property
    def dtype(self) -> str:
        """The model's dtype by name."""
        return jnp.dtype(self.model.params.dtype).name

    @property
    def sampling(self) -> Acceptance:
        """How the autoregressive baseline decodes: typical acceptance is set beside greedy decoding."""
        return self.acceptance if self.acceptance.lossless else Greedy()

    @property
    def kind(self) -> tuple[str, Acceptance]:
        """What a contender shares with its baseline."""
        return self.dtype, self.sampling

    @property
    def autoregressive(self) -> bool:
        """Whether this is a baseline."""
        return self.drafter.tree.size == 1


@dataclass(frozen=True)
class Request:
    """A tokenised prompt."""

    ids: tuple[int, ...]
    category: str


@dataclass(frozen=True)
class _Run:
    generation: decode.Generation
    seconds: float  # of the decoding loop alone

    @property
    def tokens_per_second(self) -> float:
        return float((self.generation.accepted_lengths + 1).sum()) / self.seconds


class Compared(NamedTuple):
    """The `methods` records of a result, of how many prompts they are, and why of no more, or None."""

    methods: list[dict[str, Any]]
    prompts: int
    partial: str | None


def compare(
    contenders: Sequence[Contender],
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    journal: Journal = NOWHERE,
) -> Compared:
    """Decodes every request with every contender, alternating.

    Args:
      contenders: with one autoregressive contender for each dtype and temperature among them.
      repeats: timed runs per request and contender; their median counts.
      seed: of the prompts' PRNG keys, for contenders that sample.
      progress: called after every timed run.
      journal: keeps what is decoded, a request at a time.

    Raises:
      DataError: no requests, or a generation without a single round (EOS at once) for all of them.
      ConfigError: a dtype or temperature without its baseline, a budget under 2 (the first token comes from the
        prefill), or no repeats.
      Stopped: that was asked for before a request was decoded.
    """
    if not requests:
        raise DataError("there are no prompts; pass at least one.")
    if max_new_tokens < 2:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens}; timing needs at least 2, the first comes from the prefill."
        )
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}; expected at least 1.")
    baselines = {c.kind: i for i, c in enumerate(contenders) if c.autoregressive}
    for contender in contenders:
        if contender.kind not in baselines:
            raise ConfigError(
                f"{contender.name} runs in {contender.dtype} with {contender.sampling}, which has no autoregressive "
                "method beside it."
            )
    depth = max(c.drafter.tree.max_depth for c in contenders)
    longest = max(len(r.ids) for r in requests)
    capacity = decode.capacity_for(longest, max_new_tokens, depth)
    once = functools.partial(_run, max_new_tokens=max_new_tokens, capacity=capacity)
    # A prompt's own key, the same for all contenders; greedy ones do not use it.
    keys = jax.random.split(jax.random.key(seed), len(requests))
    first: list[float] = []  # seconds for the first prompt, with compilation
    for contender in contenders:
        begin = time.perf_counter()
        once(contender, requests[0], keys[0])
        first.append(time.perf_counter() - begin)
        progress()

    def decoded(number: int) -> dict[str, np.ndarray]:
        timed: list[list[_Run]] = [[] for _ in contenders]
        again = [0.0] * len(contenders)
        for _ in range(repeats):
            for i, contender in enumerate(contenders):
                begin = time.perf_counter()
                timed[i].append(once(contender, requests[number], keys[number]))
                again[i] = again[i] or time.perf_counter() - begin
                progress()
        piece = {"again": np.array(again)}
        for i, several in enumerate(timed):
            out = several[0].generation
            piece |= {f"tokens_{i}": out.tokens, f"accepted_lengths_{i}": out.accepted_lengths}
            piece[f"seconds_{i}"] = np.array([run.seconds for run in several])
        return piece

    prints = {id(c.model): fingerprint(c.model.params) for c in {id(c.model): c for c in contenders}.values()}
    sides = [
        {
            "name": c.name,
            "acceptance": repr(c.acceptance),
            "tree": [list(path) for path in c.drafter.tree.rank_paths],
            "weights": [prints[id(c.model)], fingerprint(c.drafter)],
        }
        for c in contenders
    ]
    asked = text_fingerprint(repr([(r.ids, r.category) for r in requests]))
    settings = {"contenders": sides, "requests": asked, "max_new_tokens": max_new_tokens, "seed": seed}
    own = journal.part("decoding", settings | {"repeats": repeats})
    pieces, partial = own.pieces("prompts", len(requests), decoded)
    requests, again = requests[: len(pieces)], pieces[0]["again"]
    runs: list[list[_Run]] = [
        [
            _Run(
                decode.Generation(piece[f"tokens_{i}"], piece[f"accepted_lengths_{i}"]),
                float(np.median(piece[f"seconds_{i}"])),
            )
            for piece in pieces
        ]
        for i in range(len(contenders))
    ]
    # Prompts that end in the prefill say nothing about decoding.
    kept = [p for p in range(len(requests)) if all(r[p].generation.rounds for r in runs)]
    if not kept:
        raise DataError("every prompt was answered by its first token alone; there is nothing to time.")
    rates = np.array([[r[p].tokens_per_second for p in kept] for r in runs])
    records = []
    for i, contender in enumerate(contenders):
        base = baselines[contender.kind]
        alike = [baselines[c.kind] for c in contenders if c.sampling == contender.sampling]
        fastest = max(alike, key=lambda j: float(np.median(rates[j])))
        record: dict[str, Any] = {
            "name": contender.name,
            "dtype": contender.dtype,
            "tree_nodes": contender.drafter.tree.size,
            "lossless": contender.acceptance.lossless,
            "temperature": getattr(contender.acceptance, "temperature", 0.0),
            "tokens_per_second": _spread(rates[i]),
            **_acceptance([runs[i][p].generation for p in kept], contender.drafter.tree.max_depth),
            "compile_seconds": max(first[i] - float(again[i]), 0.0),
        }
        if not contender.autoregressive:
            record["speedup"] = _spread(rates[i] / rates[base])
            if fastest != base:
                record["speedup_over_fastest_autoregressive"] = {
                    "name": contenders[fastest].name,
                    **_spread(rates[i] / rates[fastest]),
                }
            if isinstance(contender.acceptance, Greedy):  # samples differ, whatever their law
                record["identical_to_autoregressive"] = _identity(contender.model, requests, runs[i], runs[base])
            record["per_category"] = {
                category: {
                    "tokens_per_round": _acceptance(
                        [runs[i][p].generation for p in kept if requests[p].category == category], 0
                    )["tokens_per_round"],
                    "speedup": _spread(
                        np.array(
                            [
                                (rates[i] / rates[base])[k]
                                for k, p in enumerate(kept)
                                if requests[p].category == category
                            ]
                        )
                    ),
                }
                for category in dict.fromkeys(requests[p].category for p in kept)
            }
        records.append(record)
    return Compared(records, len(requests), partial)


def _run(contender: Contender, request: Request, key: jax.Array, *, max_new_tokens: int, capacity: int) -> _Run:
    drafter = contender.drafter.prepare(contender.model.params)
    state = decode.prefill(
        contender.model,
        request.ids,
        drafter=drafter,
        acceptance=contender.acceptance,
        max_new_tokens=max_new_tokens,
        key=key,
        capacity=capacity,
    )
    jax.block_until_ready(state)
    begin = time.perf_counter()
    done = decode.decode(contender.model, state, drafter=drafter, acceptance=contender.acceptance)
    jax.block_until_ready(done)
    return _Run(decode.summarise(done), time.perf_counter() - begin)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def _acceptance(generations: Sequence[decode.Generation], depth: int) -> dict[str, Any]:
    accepted = np.concatenate([g.accepted_lengths for g in generations])
    return {
        "tokens_per_round": float(accepted.mean()) + 1.0,
        "accepted_per_round": float(accepted.mean()),
        "acceptance_by_depth": [float((accepted >= d).mean()) for d in range(1, depth + 1)],
    }


def _identity(model: Model, requests: Sequence[Request], ours: Sequence[_Run], base: Sequence[_Run]) -> dict[str, Any]:
    """How many outputs equal the baseline's, and the target's top-2 logit gap where the others part."""
    same, gaps = 0, []
    for request, a, b in zip(requests, ours, base, strict=True):
        x, y = a.generation.tokens, b.generation.tokens
        if np.array_equal(x, y):
            same += 1
            continue
        n = min(len(x), len(y))
        at = int(np.argmax(np.append(x[:n] != y[:n], True)))
        gaps.append(_top_gap(model, [*request.ids, *x[:at].tolist()]))
    result: dict[str, Any] = {"same": same, "of": len(requests)}
    if gaps:
        result["logit_gap_where_different"] = _spread(np.array(gaps))
    return result


@functools.partial(jax.jit, static_argnames="config")
def _top_two(params: Any, config: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
    features = forward(params, config, tokens).features[last]
    return jax.lax.top_k(unembed(params, features[None])[0], 2)[0]


def _top_gap(model: Model, ids: Sequence[int]) -> float:
    padded = np.zeros(-(-len(ids) // 128) * 128, np.int32)
    padded[: len(ids)] = ids
    first, second = _top_two(model.params, model.config, jnp.asarray(padded), jnp.int32(len(ids) - 1))
    return float(first - second)
