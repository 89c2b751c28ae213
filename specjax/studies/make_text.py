"""Makes the text that trainings share."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from specjax.corpus import manifest
from specjax.corpus.build import Corpus, make_corpus
from specjax.corpus.shards import read_shards
from specjax.corpus.split import split
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.loading.load import load_model


@dataclass(frozen=True)
class MakeText:
    """Makes the text of a config and nothing else, so that trainings can share it."""

    name: str
    model: str
    data: Corpus = field(default_factory=Corpus)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Writes the shards to `data.directory`; the result tells what is there and how it is split."""
        model = load_model(self.model, dtype=jnp.bfloat16)
        if self.data.chats is not None:
            raise ConfigError(f"data.chats is {self.data.chats!r}; chats are trained on as they are, leave it out.")
        parts = split(read_shards(make_corpus(model, self.data, console)), self.data.evaluation_share)
        description, counts = manifest.load(Path(self.data.directory))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "manifest": {**asdict(description), "counts": counts},
            "split": {
                side: {"conversations": len(part), "answer_tokens": sum(len(item.answer) for item in part)}
                for side, part in parts._asdict().items()
            },
        }
