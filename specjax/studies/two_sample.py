"""Is it still the target's distribution? Samples with and without speculation, and a two-sample test between them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from specjax import decode
from specjax.acceptance import Acceptance, Sample
from specjax.drafters.base import Drafter, NoDrafter
from specjax.drafters.registry import build_drafter
from specjax.environment import environment
from specjax.errors import DataError
from specjax.fingerprint import fingerprint
from specjax.journal import NOWHERE, Journal, whole
from specjax.loading.load import Model, load_model
from specjax.loop import Plan, State, batch_rounds, first_token
from specjax.stopping import Stopped
from specjax.target.cache import KVCache

_EXPECTED = 8  # outcomes that are rarer in both samples together are pooled by hash


def sample(
    model: Model,
    prompt_ids: Sequence[int],
    *,
    drafter: Drafter | None,
    acceptance: Acceptance,
    length: int,
    samples: int,
    batch_size: int,
    key: jax.Array,
    progress: Callable[[int], None] = lambda samples: None,
    journal: Journal = NOWHERE,
    name: str = "samples",
) -> tuple[Int[np.ndarray, "samples length"], float]:
    """Continuations of one prompt by the real decoding loop, `batch_size` at a time, and the mean drafts accepted.

    The prompt is read once; every sample starts from there with a key of its own. EOS does not end a sample.

    Args:
      journal: keeps the batches that are drawn, as `name`.

    Raises:
      Stopped: that was asked for; what is drawn is in the journal.
    """
    drafter = drafter or NoDrafter()
    drafter.check(model)
    drafter = drafter.prepare(model.params)
    tokens = np.zeros(decode.capacity_for(len(prompt_ids), length, drafter.tree.max_depth), np.int32)
    tokens[: len(prompt_ids)] = prompt_ids

    n = jnp.int32(len(prompt_ids))
    target_read = decode.read_prompt(model.params, model.config, jnp.asarray(tokens), n)

    plan = decode.plan_for(model, drafter, acceptance, ())

    @jax.jit
    def run(plan: Plan, key: jax.Array, features: jax.Array, cache: KVCache) -> tuple[jax.Array, jax.Array]:
        def begin(key: jax.Array) -> State:
            return first_token(plan, jnp.asarray(tokens), n, n + length, key, features, cache)

        state = batch_rounds(plan, jax.vmap(begin)(jax.random.split(key, batch_size)))
        accepted = jnp.where(jnp.arange(state.accepted.shape[1]) < state.rounds[:, None], state.accepted, 0)
        return state.tokens[:, len(prompt_ids) : len(prompt_ids) + length], accepted.sum() / state.rounds.sum()

    def batch(number: int) -> dict[str, np.ndarray]:
        out, drafts = run(plan, jax.random.fold_in(key, number), *target_read)
        return {"tokens": np.asarray(out), "accepted": np.asarray(drafts)}

    pieces = whole(journal.pieces(name, -(-samples // batch_size), batch, progress=lambda _: progress(batch_size)))
    drawn = np.concatenate([piece["tokens"] for piece in pieces])[:samples]
    return drawn, float(np.mean([piece["accepted"] for piece in pieces]))


def p_value(a: Int[np.ndarray, "n length"], b: Int[np.ndarray, "m length"], *, pools: int = 64) -> float:
    """Chi-square two-sample test of homogeneity over whole continuations; small values reject equality.

    Frequent continuations are cells of their own, the others are spread over `pools` cells by a hash.

    Raises:
      DataError: continuations of different lengths, or too few of them for a single cell.
    """
    if a.shape[1:] != b.shape[1:]:
        raise DataError(f"continuations of {a.shape[1:]} and {b.shape[1:]} tokens cannot be compared.")
    outcomes, cell = np.unique(np.concatenate([a, b]), axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    frequent = np.bincount(cell) >= 2 * _EXPECTED
    hashed = np.zeros(len(outcomes), np.uint64)
    for column in outcomes.T:
        hashed = (hashed * np.uint64(1_000_003) + column.astype(np.uint64)) % np.uint64(2_147_483_647)
    hashed %= np.uint64(pools)
    number = np.where(frequent, np.cumsum(frequent) - 1 + pools, hashed.astype(int))[cell]
    counts = np.stack([np.bincount(part, minlength=number.max() + 1) for part in (number[: len(a)], number[len(a) :])])
    counts = counts[:, counts.sum(0) >= 2 * _EXPECTED]
    if counts.shape[1] < 2:
        raise DataError(f"{len(a)} and {len(b)} samples fill {counts.shape[1]} cells; draw more.")
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), counts.shape[1] - 1
    return float(jax.scipy.special.gammaincc(freedom / 2, statistic / 2))


@dataclass(frozen=True)
class TwoSample:
    """Tests drafters against autoregressive sampling on a real model."""

    name: str
    model: str
    prompt: str
    drafters: tuple[tuple[str, str], ...]  # (drafter, tree), as `specjax generate` takes them
    heads: str | None = None
    draft_model: str | None = None
    temperature: float = 1.0
    samples: int = 20_000
    length: int = 3
    batch_size: int = 250
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints the p-values and gives the result."""
        model = load_model(self.model, dtype=self.dtype)
        if model.tokenizer is None:
            raise DataError(f"{self.model} has no tokenizer; the prompt is text.")
        ids = model.tokenizer.apply_chat_template([{"role": "user", "content": self.prompt}])
        acceptance = Sample(self.temperature)
        request = {"acceptance": acceptance, "length": self.length, "samples": self.samples}
        draw = functools.partial(sample, model, ids, batch_size=self.batch_size, **request)  # type: ignore[arg-type]
        journal = Journal.of(self, output_dir, model=fingerprint(model.params), prompt=ids)
        keys = jax.random.split(jax.random.key(self.seed), len(self.drafters) + 2)
        with console.status("sampling autoregressively"):
            base, _ = draw(drafter=None, key=keys[0], journal=journal, name="baseline")
            control, _ = draw(drafter=None, key=keys[1], journal=journal, name="control")
        rows: list[dict[str, Any]] = [
            {"drafter": "autoregressive", "tree": "", "accepted_per_round": 0.0, "p_value": p_value(base, control)}
        ]
        partial = None
        for number, (key, (name, tree)) in enumerate(zip(keys[2:], self.drafters, strict=True)):
            with console.status(f"sampling with {name}"):
                files = {"heads": self.heads, "draft_model": self.draft_model}
                drafter = build_drafter(name, model, tree=tree, files=files, acceptance=acceptance)
                own = journal.part(f"{number} {name}", {"drafter": fingerprint(drafter)})
                try:
                    drawn, accepted = draw(drafter=drafter, key=key, journal=own)
                except Stopped as stopped:
                    partial = f"{stopped} of {name}"
                    break
            rows.append(
                {"drafter": name, "tree": tree, "accepted_per_round": accepted, "p_value": p_value(base, drawn)}
            )
        table = Table("drafter", "tree", "accepted per round", "p", title=f"{self.name}: {self.samples} samples each")
        for row in rows:
            accepted, p = row["accepted_per_round"], row["p_value"]
            table.add_row(str(row["drafter"]), str(row["tree"]), f"{accepted:.2f}", f"{p:.3f}")
        console.print(table)
        outcomes = len(np.unique(base, axis=0))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "distinct_continuations": outcomes,
            "rows": rows,
            "partial": partial,
        }
