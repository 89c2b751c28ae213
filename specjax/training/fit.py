"""The training experiment: from a packaged target to heads with a record of their quality."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from specjax.analysis.ranks import measure
from specjax.analysis.texts import conversation_texts
from specjax.bench import environment
from specjax.heads import Heads, MedusaConfig, init_heads
from specjax.loading.heads import save_heads
from specjax.loading.load import load_model
from specjax.training.corpus import joined
from specjax.training.distillation import Distillation, prepared
from specjax.training.trainer import TrainConfig, dataset, frequent_tokens, train


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
        training, evaluation = prepared(model, self.data, console)
        text, held_out = joined(training), joined(evaluation)
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
        table = measure(model, half, conversation_texts(evaluation))
        table.save(output_dir / "heads.ranks.npz")  # beside the heads, where tree="auto" finds it
        console.print(json.dumps(record["accuracy"]))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "record": record,
            "evaluations": [entry for entry in log if "eval" in entry],
        }
