"""The experiment that distils a draft model for a target."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from specjax.corpus.build import Distillation, prepared
from specjax.corpus.conversation import answer_tokens, cut_tokens
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.loading.load import load_draft, load_model, save_draft
from specjax.report.training_figures import save_draft_figures
from specjax.target.config import ModelConfig
from specjax.training.draft import DistilConfig, distil, evaluate_draft, reduced_map
from specjax.training.monitor import RunMonitor, throughput
from specjax.training.packing import check_cut, packed_steps
from specjax.training.quality import selected
from specjax.training.trainer import frequent_tokens


@dataclass(frozen=True)
class FitDraft:
    """Distils a Qwen2 of the given shape, with a reduced vocabulary, on text of the target's own.

    The vocabulary is always reduced: one row stands for all tokens that the draft does not say, so that there must be
    some. More rows than the target has tokens are refused.
    """

    name: str
    model: str
    reduced_vocab_size: int = 16_384  # rows: the most frequent tokens of the text, and one row for all others
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    data: Distillation = field(default_factory=Distillation)
    training: DistilConfig = field(default_factory=lambda: DistilConfig(select="best"))

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, and writes the draft of the checkpoint that `training.select` names (bfloat16, a Hugging Face
        directory `draft`).

        Beside it: log.jsonl, TensorBoard events, curves as PNG, and checkpoints. A run that was stopped goes on where
        the same `output_dir` is given.

        Raises:
          ConfigError: a shape that does not fit the target, before there is any text.
          As `prepared` and `distil`.
        """
        model = load_model(self.model, dtype=jnp.bfloat16)
        config = self._shape(model.config)  # raises now, not when the text has been made
        text, held_out = prepared(model, self.data, console)
        every = np.concatenate([part for item in text for part in (item.prompt, item.answer)])
        token_map = reduced_map(frequent_tokens(every, self.reduced_vocab_size - 1, model.config.vocab_size))
        rows = {int(token): row for row, token in enumerate(token_map)}
        config = replace(config, eos_token_ids=tuple(rows[t] for t in model.config.eos_token_ids if t in rows))
        training = self.training
        steps, tokens = packed_steps(text, training), training.batch_size * training.length
        with RunMonitor(output_dir, console, steps=steps, tokens_per_step=tokens) as monitor:
            draft, log = distil(
                config,
                model.params,
                token_map,
                text,
                held_out,
                training,
                output_dir,
                monitor=monitor,
                report=lambda record: console.print(f"step {record['step']}", json.dumps(record["eval"])),
            )
        chosen = selected(log, training.select, "acceptance")
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draft)
        save_draft(output_dir / "draft", half, config, token_map)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "conversations": {"training": len(text), "held_out": len(held_out)},
            "answer_tokens": {"training": answer_tokens(text), "held_out": answer_tokens(held_out)},
            "cut_answer_tokens": {  # of those, beyond training.length: neither trained on nor evaluated
                "training": cut_tokens(text, training.length),
                "held_out": cut_tokens(held_out, training.length),
            },
            "record": chosen["eval"],
            "step": chosen["step"],
            "evaluations": [entry for entry in log if "eval" in entry],
            "throughput": throughput(log),
            "figures": save_draft_figures(log, output_dir),
        }

    def _shape(self, target: ModelConfig) -> ModelConfig:
        if not 2 <= self.reduced_vocab_size <= target.vocab_size:
            raise ConfigError(
                f"reduced_vocab_size is {self.reduced_vocab_size}; expected 2 to {target.vocab_size}: tokens that "
                f"the draft says and a row for all others of the target's {target.vocab_size}. Choose one of these."
            )
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads):  # rotary embeddings turn pairs
            raise ConfigError(
                f"num_heads is {self.num_heads} at hidden_size {self.hidden_size}; expected at least 1, and an even "
                "width for each head. Choose a divisor of half of hidden_size."
            )
        if self.hidden_size > target.hidden_size:  # the embedding begins as the target's in its main directions
            raise ConfigError(
                f"hidden_size is {self.hidden_size}; expected at most {target.hidden_size}, the target's. Lower it."
            )
        return ModelConfig(
            family="qwen2",
            vocab_size=self.reduced_vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.hidden_size // self.num_heads,
            qkv_bias=True,
            tie_word_embeddings=True,
            max_positions=target.max_positions,
            name=self.name,
        )


@dataclass(frozen=True)
class EvaluateDraft:
    """How often a target takes a draft model's tokens, on text that the target makes now."""

    name: str
    model: str
    draft: str  # a packaged name or a directory
    data: Distillation = field(default_factory=Distillation)
    batch_size: int = 8  # conversations
    length: int = 256  # tokens of each that count

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints and gives what `evaluate_draft` finds, over all conversations of `data`, held out or not.

        Raises:
          ConfigError: a draft without a token map, or a batch_size or length below 1.
          DataError: no answer begins within `length` tokens.
          As `prepared`.
        """
        training = DistilConfig(batch_size=self.batch_size, length=self.length)  # raises now, not after the text
        model = load_model(self.model, dtype=jnp.bfloat16)
        draft, token_map = load_draft(self.draft)
        if token_map is None:
            raise ConfigError(f"{self.draft} has no token map; this evaluates drafts that FitDraft made.")
        text = [item for part in prepared(model, self.data, console) for item in part]
        check_cut(text, self.length, "evaluation", ahead=1)
        found = evaluate_draft(draft.params, draft.config, model.params, np.asarray(token_map), text, training)
        console.print(json.dumps(found))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "conversations": len(text),
            "answer_tokens": answer_tokens(text),
            "cut_answer_tokens": cut_tokens(text, self.length),  # of those, beyond length: they do not count
            "evaluation": found,
        }
