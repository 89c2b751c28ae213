"""The training experiment: from a packaged target to heads with a record of their quality."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specjax.analysis.ranks import measure
from specjax.analysis.texts import shard_texts
from specjax.bench import environment
from specjax.errors import ConfigError
from specjax.heads import Heads, MedusaConfig, init_heads
from specjax.loading.heads import save_heads
from specjax.loading.load import Model, load_model
from specjax.training.distill import distinct, read_shards, user_turns, write_shards
from specjax.training.seeds import seed_prompts
from specjax.training.trainer import TrainConfig, dataset, frequent_tokens, train


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


@dataclass(frozen=True)
class FitHeads:
    """Fits Medusa heads that share the target's LM head to text of the target's own."""

    name: str
    model: str
    num_heads: int = 4
    num_layers: int = 1
    reduced_vocab_size: int | None = 8192  # the most frequent tokens of the training text
    data: Distillation = field(default_factory=Distillation)
    training: TrainConfig = field(default_factory=TrainConfig)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, trains, and writes heads.safetensors (bfloat16), heads.ranks.npz, log.jsonl and checkpoints."""
        model = load_model(self.model, dtype=jnp.bfloat16)
        paths = distilled(model, self.data, console)
        text = distinct(read_shards(paths[self.data.held_out_shards :]))
        held_out = distinct(read_shards(paths[: self.data.held_out_shards]), without=text)
        vocab, size = model.config.vocab_size, self.reduced_vocab_size
        token_map = None if size is None else frequent_tokens(text.tokens, size, vocab)
        shape = MedusaConfig(self.num_heads, model.config.hidden_size, vocab, self.num_layers, "shared", size)
        heads = init_heads(shape, model.params, token_map)
        heads, log = train(
            heads,
            model.params,
            dataset(text, heads),
            dataset(held_out, heads),
            self.training,
            output_dir,
            report=lambda record: console.print(
                f"step {record['step']}", record["eval"]["accuracy"]["top1"], record["eval"]["accuracy"]["top3"]
            ),
        )
        record = {"trained_tokens": len(text.tokens), "held_out_tokens": len(held_out.tokens), **log[-1]["eval"]}
        half = Heads(jax.tree.map(lambda p: p.astype(jnp.bfloat16), heads.params), heads.token_map, heads.config)
        metadata = {
            "target": self.model,
            "config": asdict(self),
            "hits": record["hits"],
            "accuracy": record["accuracy"],
        }
        save_heads(output_dir / "heads.safetensors", half, metadata)
        seen = {part.tobytes() for part in np.split(text.tokens, np.cumsum(text.lengths)[:-1])}
        others = [
            item
            for item in shard_texts(paths[: self.data.held_out_shards])
            if len(item.answer) > 1 and np.asarray(item.answer).tobytes() not in seen
        ]
        table = measure(model, half, others)
        table.save(output_dir / "heads.ranks.npz")  # beside the heads, where tree="auto" finds it
        console.print(json.dumps(record["accuracy"]))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "record": record,
            "evaluations": [entry for entry in log if "eval" in entry],
        }
