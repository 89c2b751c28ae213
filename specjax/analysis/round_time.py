"""The round-time experiment: milliseconds per round against the number of tree nodes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from specjax.analysis.search import choose_tree
from specjax.bench import environment
from specjax.errors import ConfigError
from specjax.loading.heads import heads_metadata, load_heads
from specjax.loading.load import load_model


@dataclass(frozen=True)
class RoundTime:
    """Times rounds of greedy trees of several sizes; size 1 is autoregressive decoding."""

    name: str
    model: str
    heads: str  # with accuracies in their metadata
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    sizes: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    prompt_tokens: int = 64
    repeats: int = 5

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints the table and gives the result."""
        if self.sizes[:1] != (1,):
            raise ConfigError(f"sizes is {self.sizes}; it must begin with 1, autoregressive decoding, the baseline.")
        model = load_model(self.model, dtype=self.dtype)
        heads = load_heads(self.heads, model.config, dtype=self.dtype)
        hits = np.asarray(heads_metadata(self.heads).get("hits", ()))
        if not hits.size:
            raise ConfigError(f"{self.heads} records no accuracies to build trees from.")
        prompt = (np.arange(self.prompt_tokens) + 1) % model.config.vocab_size
        choice = choose_tree(model, heads, hits, prompt.tolist(), sizes=self.sizes, repeats=self.repeats)
        base = choice.rows[0]["milliseconds"]["median"]
        rows = [row | {"cost": row["milliseconds"]["median"] / base} for row in choice.rows]
        table = Table(title=f"{self.name}, {self.dtype}: time of a round")
        for column in ("nodes", "ms per round (min-max)", "cost against one step", "expected tokens per round", "gain"):
            table.add_column(column, justify="right")
        for row in rows:
            ms = row["milliseconds"]
            spread = f"{ms['median']:.1f} ({ms['min']:.1f}-{ms['max']:.1f})"
            gain = row["expected_tokens"] / row["cost"]
            table.add_row(
                str(row["nodes"]), spread, f"{row['cost']:.2f}", f"{row['expected_tokens']:.2f}", f"{gain:.2f}"
            )
        console.print(table)
        return {"experiment": self.name, "config": asdict(self), "environment": environment(), "rows": rows}
