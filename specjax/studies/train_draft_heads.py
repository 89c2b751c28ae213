"""Fitting heads to a draft model, as a target in its own right: a trained Qwen2 small enough for tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from specjax.acceptance import Greedy
from specjax.corpus.answers import TODAY, answer, chat_tokenizer
from specjax.corpus.conversation import conversations
from specjax.corpus.seeds import seed_prompts
from specjax.corpus.split import joined, split
from specjax.corpus.texts import conversation_texts
from specjax.errors import ConfigError
from specjax.loading.load import load_draft, load_model
from specjax.studies.train_cached_medusa import CachedHeadTraining


@dataclass(frozen=True, kw_only=True)
class TrainDraftHeads(CachedHeadTraining):
    """Lets a draft model answer seed prompts, and fits heads to that text."""

    draft: str  # as `load_draft` takes it
    tokenizer: str  # the model whose tokens it speaks, as `load_model` takes it
    prompts: int = 1024
    prompt_seed: int = 1000
    batch_size: int = 1024
    max_answer_tokens: int = 128
    evaluation_share: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.prompts, self.batch_size, self.max_answer_tokens) < 1:
            raise ConfigError(f"{self}: expected prompts, batch_size and max_answer_tokens of at least 1.")

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Makes the text, then `fit`.

        Raises:
          SpecJaxError: as `start`, before there is any text; as `answer`, `split` and `fit`.
        """
        tokenizer = chat_tokenizer(load_model(self.tokenizer, dtype="bfloat16")).dated(TODAY)
        model, token_map = load_draft(self.draft)
        start = self.start(model, console)
        asked = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}])
            for text in seed_prompts(self.prompts, self.prompt_seed)
        ]
        if token_map is not None:
            row = {int(token): i for i, token in enumerate(token_map)}
            asked = [[row.get(token, row[-1]) for token in ids] for ids in asked]  # -1: the row of all other tokens
        with console.status(f"{self.draft} answers {len(asked)} prompts"):
            made = answer(
                model,
                asked,
                acceptance=Greedy(),
                max_new_tokens=self.max_answer_tokens,
                key=jax.random.key(0),
                batch_size=self.batch_size,
            )
        prompts = [np.asarray(ids, np.int32) for ids in asked]
        training, held_out = split(
            conversations(prompts, made.tokens, made.lengths, made.features), self.evaluation_share
        )
        texts = conversation_texts(held_out)
        return self.fit(model, start, joined(training), joined(held_out), texts, output_dir, console)
