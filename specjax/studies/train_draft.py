"""Distils a draft model for a target, and evaluates one on new answers."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from specjax.corpus.build import Corpus, load_corpus
from specjax.corpus.conversation import answer_tokens, cut_tokens
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.loading.load import load_draft, load_model
from specjax.ranks.labels import frequent_tokens
from specjax.report.training_figures import save_draft_figures
from specjax.studies.training_study import follow, result_of, text_counts
from specjax.target.config import ModelConfig
from specjax.training import preflight
from specjax.training.draft import DraftConfig, DraftDistillation, evaluate_draft, reduced_map


@dataclass(frozen=True)
class TrainDraft:
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
    data: Corpus = field(default_factory=Corpus)
    training: DraftConfig = field(default_factory=lambda: DraftConfig(select="best"))

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, and writes the draft of the checkpoint that `training.select` names (bfloat16, a Hugging Face
        directory `draft`).

        Beside it: log.jsonl, TensorBoard events, curves as PNG, and checkpoints. A run that was stopped goes on where
        the same `output_dir` is given.

        Raises:
          ConfigError: a shape that does not fit the target, before there is any text.
          SpecJaxError: as `load_corpus` and `train`.
        """
        model = load_model(self.model, dtype=jnp.bfloat16)
        config = self._shape(model.config)  # raises now, not when the text has been made
        text, held_out = load_corpus(model, self.data, console)
        every = np.concatenate([part for item in text for part in (item.prompt, item.answer)])
        token_map = reduced_map(frequent_tokens(every, self.reduced_vocab_size - 1, model.config.vocab_size))
        rows = {int(token): row for row, token in enumerate(token_map)}
        objective = DraftDistillation(
            config=replace(config, eos_token_ids=tuple(rows[t] for t in model.config.eos_token_ids if t in rows)),
            target=model.params,
            token_map=token_map,
            data=text,
            held_out=held_out,
            settings=self.training,
        )
        followed = follow(objective, output_dir, console)
        objective.export(output_dir, followed.result, {})
        figures = save_draft_figures(followed.log, output_dir)
        return result_of(self, followed, figures) | text_counts(text, held_out, self.training.length)

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
    data: Corpus = field(default_factory=Corpus)
    batch_size: int = 8  # conversations
    length: int = 256  # tokens of each that count

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Prints and gives what `evaluate_draft` finds, over all conversations of `data`, held out or not.

        Raises:
          ConfigError: a draft without a token map, or a batch_size or length below 1.
          DataError: no answer begins within `length` tokens.
          SpecJaxError: as `load_corpus`.
        """
        training = DraftConfig(batch_size=self.batch_size, length=self.length)  # raises now, not after the text
        model = load_model(self.model, dtype=jnp.bfloat16)
        draft, token_map = load_draft(self.draft)
        if token_map is None:
            raise ConfigError(f"{self.draft} has no token map; this evaluates drafts that TrainDraft made.")
        text = [item for part in load_corpus(model, self.data, console) for item in part]
        preflight.check_cut(text, self.length, "evaluation", ahead=1)
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
