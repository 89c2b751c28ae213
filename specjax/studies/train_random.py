"""Fitting heads to a random Qwen2 that the config makes itself: the whole training path in seconds, without files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from specjax.acceptance import Acceptance, Greedy, Sample
from specjax.corpus.answers import Answers, answer, distinct
from specjax.errors import ConfigError
from specjax.loading.load import Model
from specjax.ranks.measuring import Text
from specjax.studies.train_cached_medusa import CachedHeadTraining
from specjax.target import params
from specjax.target.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class TrainRandomQwen2(CachedHeadTraining):
    """Makes a Qwen2 with random weights, lets it answer random prompts, and fits heads to that text."""

    vocab_size: int = 64
    hidden_size: int = 32
    num_layers_of_target: int = 2
    stddev: float = 0.02  # of its weights: small, so that the next token depends on the last few most
    conversations: int = 256
    held_out: int = 64
    prompt_tokens: int = 4
    answer_tokens: int = 32
    temperature: float = 0.0  # of the answers; 0: greedy
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.conversations, self.held_out, self.prompt_tokens, self.answer_tokens) < 1 or self.temperature < 0:
            raise ConfigError(
                f"{self}: expected conversations, held_out, prompt_tokens and answer_tokens of at least 1, and a "
                "temperature of at least 0."
            )

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Makes model and text, then `fit`; adds `gain`: what head 1's top-1 accuracy and tokens_per_round gained."""
        model = self.target()
        start = self.start(model, console)
        rng = np.random.default_rng(self.seed)
        shape = (self.conversations + self.held_out, self.prompt_tokens)
        prompts = [row.tolist() for row in rng.integers(0, self.vocab_size, shape)]
        acceptance: Acceptance = Sample(self.temperature) if self.temperature else Greedy()
        key = jax.random.key(self.seed + 1)
        made = answer(model, prompts, acceptance=acceptance, max_new_tokens=self.answer_tokens, key=key)
        parts = np.split(made.tokens, np.cumsum(made.lengths)[:-1])
        text = distinct(_slice(made, 0, self.conversations))
        held_out = distinct(_slice(made, self.conversations, len(prompts)), without=text)
        seen = {part.tobytes() for part in parts[: self.conversations]}
        others = [
            Text(prompt, part)
            for prompt, part in zip(prompts[self.conversations :], parts[self.conversations :], strict=True)
            if part.tobytes() not in seen
        ]
        result = self.fit(model, start, text, held_out, others, output_dir, console)
        first, last = result["evaluations"][0]["eval"], result["record"]
        top1 = [b - a for a, b in zip(first["accuracy"]["top1"], last["accuracy"]["top1"], strict=True)]
        gain = {"top1": top1, "tokens_per_round": last["tokens_per_round"] - first["tokens_per_round"]}
        return result | {"gain": gain, "target": asdict(model.config)}

    def target(self) -> Model:
        """The model: two query heads share each of two key/value heads."""
        config = ModelConfig(
            family="qwen2",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=2 * self.hidden_size,
            num_layers=self.num_layers_of_target,
            num_heads=4,
            num_kv_heads=2,
            head_dim=self.hidden_size // 4,
            qkv_bias=True,
            tie_word_embeddings=False,
            max_positions=512,
            name=self.name,
        )
        return Model(params.init(jax.random.key(self.seed), config, stddev=self.stddev), config, None)


def _slice(answers: Answers, first: int, last: int) -> Answers:
    ends = np.concatenate([[0], np.cumsum(answers.lengths)])
    inside = slice(ends[first], ends[last])
    return Answers(answers.tokens[inside], answers.features[inside], answers.lengths[first:last])
