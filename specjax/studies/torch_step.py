"""Our Medusa-1 training step beside a plain PyTorch one that does the same work, in the same run."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.heads import MedusaConfig, draft_projection, init_heads
from specjax.journal import Journal
from specjax.loading.load import load_model
from specjax.stopping import Stopped
from specjax.training.cached_medusa import CachedMedusa, CachedMedusaConfig, Dataset, Rows
from specjax.training.optimiser import build
from specjax.training.run import step_of

Step = Callable[[int], list[float]]  # runs so many steps; their losses


@dataclass(frozen=True)
class TorchStep:
    """Both sides train fresh heads of one layer on the LM head's rows; one step is forward, backward, clip and AdamW.

    PyTorch is eager, one cross-entropy per head; in bfloat16 under `torch.autocast`, with float32 parameters as ours.
    Features and labels are random: neither side's time depends on them.
    """

    name: str
    model: str  # a packaged name or a directory; only its LM head is used
    reduced_vocab_size: int = 8192
    num_heads: int = 4
    batch_size: int = 1024
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    steps: int = 2  # timed together
    repeats: int = 5  # of each side, by turns
    learning_rate: float = 2e-3

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints positions per second of both sides, their ratio in every repeat, and how far their losses differ."""
        try:
            import torch
        except ImportError as error:
            raise ConfigError(f"this comparison needs torch ({error}); `make test` installs it.") from error
        rows: list[dict[str, Any]] = []
        table = Table("dtype", "specjax, positions/s", "PyTorch, positions/s", "ratio", "losses differ by")
        journal = Journal.of(self, output_dir, torch=torch.__version__)

        def compared(dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
            sides = {"specjax": self._ours(dtype), "torch": self._theirs(dtype)}
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            losses = {name: side(self.steps) for name, side in sides.items()}  # warm up: the same steps on both sides
            gap = float(np.max(np.abs(np.array(losses["specjax"]) / np.array(losses["torch"]) - 1)))
            for repeat in range(self.repeats):
                for name in sorted(sides, reverse=bool(repeat % 2)):
                    begin = time.perf_counter()
                    sides[name](self.steps)
                    seconds[name].append((time.perf_counter() - begin) / self.steps)
            rates = {name: self.batch_size / np.array(taken) for name, taken in seconds.items()}
            row: dict[str, Any] = {"dtype": dtype, "loss_gap": gap}
            row |= {name: _spread(rate) for name, rate in rates.items()}
            return row | {"ratio": _spread(rates["specjax"] / rates["torch"])}

        partial = None
        for dtype in self.dtypes:
            try:
                row = journal.once(f"steps in {dtype}", functools.partial(compared, dtype))
            except Stopped as stopped:
                if not rows:
                    raise
                partial = str(stopped)
                break
            rows.append(row)
            cells = [_cell(row[name], form) for name, form in (("specjax", ".0f"), ("torch", ".0f"), ("ratio", ".2f"))]
            table.add_row(dtype, *cells, f"{row['loss_gap']:.1e}")
        table.title = f"{self.name}: median (min-max) of {self.repeats}"
        console.print(table)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment() | {"torch": torch.__version__, "torch_threads": torch.get_num_threads()},
            "rows": rows,
            "partial": partial,
        }

    def _data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # The LM head's rows [R D], features [T D], labels [T C].
        matrix = np.asarray(load_model(self.model).params.unembedding, np.float32)
        rng = np.random.default_rng(0)
        if not 1 <= self.reduced_vocab_size <= len(matrix):
            raise ConfigError(f"reduced_vocab_size is {self.reduced_vocab_size}; expected 1 to {len(matrix)}.")
        rows = np.sort(rng.choice(len(matrix), self.reduced_vocab_size, replace=False))
        features = rng.normal(size=(self.batch_size, matrix.shape[1])).astype(np.float32)
        labels = rng.integers(0, self.reduced_vocab_size, (self.batch_size, self.num_heads)).astype(np.int32)
        return np.ascontiguousarray(matrix[rows]), features, labels

    def _ours(self, dtype: Literal["float32", "bfloat16"]) -> Step:
        matrix, features, labels = self._data()
        model = load_model(self.model)
        shape = MedusaConfig(
            self.num_heads, matrix.shape[1], model.config.vocab_size, 1, "shared", self.reduced_vocab_size
        )
        token_map = np.arange(self.reduced_vocab_size)
        heads = init_heads(shape, model.params, token_map)
        config = CachedMedusaConfig(schedule="constant", warmup=0.0, learning_rate=self.learning_rate, compute=dtype)
        optimiser = build(config, 1)
        assert draft_projection(heads, model.params.unembedding) is not None
        projection = jnp.asarray(matrix, dtype)
        text = Dataset(features, labels, np.array([len(features)]))
        objective = CachedMedusa(heads=heads, target=model.params, data=text, held_out=text, settings=config)
        step = jax.jit(step_of(objective, optimiser, 1), donate_argnums=0)
        state = optimiser.init(heads.params)
        batch = {"features": jnp.asarray(features, dtype), "labels": jnp.asarray(labels)}

        def run(steps: int) -> list[float]:
            nonlocal state
            losses = []
            for _ in range(steps):
                state, metrics = step(state, batch, Rows(projection, None))
                losses.append(metrics["loss"])
            return [float(loss) for loss in losses]

        return run

    def _theirs(self, dtype: Literal["float32", "bfloat16"]) -> Step:
        import torch
        from torch import nn
        from torch.nn import functional as F

        matrix, features, labels = self._data()
        kind = getattr(torch, dtype)
        layers = nn.ModuleList(nn.Linear(matrix.shape[1], matrix.shape[1]) for _ in range(self.num_heads))
        for parameter in layers.parameters():
            nn.init.zeros_(parameter)
        optimiser = torch.optim.AdamW(layers.parameters(), lr=self.learning_rate, eps=1e-8, weight_decay=0.0)
        projection, given = torch.tensor(matrix).to(kind), torch.tensor(features).to(kind)
        wanted = torch.tensor(labels).long()

        def run(steps: int) -> list[float]:
            losses = []
            for _ in range(steps):
                optimiser.zero_grad(set_to_none=True)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                    total = torch.zeros(())
                    for i, layer in enumerate(layers):
                        hidden = given + F.silu(layer(given))
                        logits = F.linear(hidden, projection)
                        total = total + F.cross_entropy(logits.float(), wanted[:, i], ignore_index=-100)
                total.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
                optimiser.step()
                losses.append(float(total.detach()))
            return losses

        return run


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


def _cell(spread: dict[str, float], form: str) -> str:
    return f"{spread['median']:{form}} ({spread['min']:{form}}-{spread['max']:{form}})"
