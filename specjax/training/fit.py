"""The training experiment: from a packaged target to heads with a record of their quality."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specjax.analysis.texts import shard_texts
from specjax.errors import ConfigError
from specjax.loading.load import Model, load_model
from specjax.training.distill import distinct, read_shards, user_turns, write_shards
from specjax.training.fit_heads import HeadFit
from specjax.training.seeds import seed_prompts


@dataclass(frozen=True)
class Distillation:
    """The text: `shards` batches of `batch_size` conversations, every second one on seed prompts alone."""

    directory: str = "results/distill"  # shards that are already there are used as they are
    shards: int = 64
    held_out_shards: int = 2  # the first ones; never trained on
    batch_size: int = 96
    max_answer_tokens: int = 192
    turn_seed: int = 7  # of the user turns that the model writes
    prompt_seed: int = 1000  # of the seed prompts

    def __post_init__(self) -> None:
        if not 0 < self.held_out_shards < self.shards:
            raise ConfigError(
                f"held_out_shards is {self.held_out_shards} of {self.shards}; expected at least one for evaluation and "
                "one for training."
            )


def distilled(model: Model, data: Distillation, console: Console) -> list[Path]:
    """The files of `data`'s shards; those that are not there yet are made."""
    directory = Path(data.directory)

    def prompts_for(shard: int) -> list[str]:
        turns: list[str] = []
        if shard % 2 == 0:
            key = jax.random.fold_in(jax.random.key(data.turn_seed), shard)
            turns = user_turns(model, data.batch_size + data.batch_size // 2, key=key)[: data.batch_size]
        return turns + seed_prompts(data.batch_size - len(turns), seed=data.prompt_seed + shard)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        done = sum((directory / f"shard_{i:05d}.npz").exists() for i in range(data.shards))
        task = progress.add_task("distilling: shards", total=data.shards, completed=done)
        write_shards(
            model,
            directory,
            data.shards,
            prompts_for,
            max_new_tokens=data.max_answer_tokens,
            progress=lambda shard, tokens: progress.advance(task),
        )
    return [directory / f"shard_{i:05d}.npz" for i in range(data.shards)]


@dataclass(frozen=True, kw_only=True)
class FitHeads(HeadFit):
    """Fits Medusa heads to text of the target's own."""

    model: str
    data: Distillation = field(default_factory=Distillation)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, then `fit`."""
        model = load_model(self.model, dtype=jnp.bfloat16)
        paths = distilled(model, self.data, console)
        text = distinct(read_shards(paths[self.data.held_out_shards :]))
        held_out = distinct(read_shards(paths[: self.data.held_out_shards]), without=text)
        seen = {part.tobytes() for part in np.split(text.tokens, np.cumsum(text.lengths)[:-1])}
        others = [
            item
            for item in shard_texts(paths[: self.data.held_out_shards])
            if len(item.answer) > 1 and np.asarray(item.answer).tobytes() not in seen
        ]
        return self.fit(model, text, held_out, others, output_dir, console)
