"""Fits Medusa-1 heads to cached features of a target's text: the study that most heads come from."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from specjax.corpus.answers import Answers
from specjax.corpus.build import Corpus, load_corpus
from specjax.corpus.split import joined
from specjax.corpus.texts import conversation_texts
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.loading.load import Model, load_model
from specjax.ranks.measuring import Text, measure
from specjax.report.training_figures import save_training_figures
from specjax.studies.training_study import HeadTraining, Start, follow, result_of
from specjax.training.cached_medusa import CachedMedusa, CachedMedusaConfig, dataset
from specjax.training.heads_export import in_bfloat16
from specjax.training.monitor import warn_if_worse
from specjax.training.run import evaluate


@dataclass(frozen=True, kw_only=True)
class CachedHeadTraining(HeadTraining):
    """How heads are fitted to cached features; the text comes from what extends this.

    Attributes:
      start_share: share of `start_from`'s weights in those that are exported, the trained ones having the rest: what
        goes on from other heads on new text forgets some of the old (weight averaging, Wortsman et al. 2022). The
        checkpoint is selected before they are averaged.

    Raises:
      ConfigError: a share outside [0, 1), or without `start_from`.
    """

    projection: Literal["shared", "full"] = "shared"
    start_share: float = 0.0
    training: CachedMedusaConfig = field(default_factory=lambda: CachedMedusaConfig(select="best"))

    def __post_init__(self) -> None:
        if not 0 <= self.start_share < 1:
            raise ConfigError(f"start_share is {self.start_share}; expected at least 0, and less than 1.")
        if self.start_share and self.start_from is None:
            raise ConfigError(
                f"start_share is {self.start_share}, but there are no heads to average with: set start_from to some, "
                "or leave it out."
            )

    def fit(
        self,
        model: Model,
        start: Start,
        text: Answers,
        held_out: Answers,
        texts: list[Text],
        output_dir: Path,
        console: Console,
    ) -> dict[str, Any]:
        """Trains on `text`, evaluates on `held_out`, and gives the content of result.json.

        Writes heads.safetensors (bfloat16; `record` is of them before they are rounded), heads.ranks.npz (measured on
        `texts`: the held-out conversations with their prompts), log.jsonl, TensorBoard events, curves as PNG, and
        checkpoints into `output_dir`. Log, curves, `evaluations` and `step` are of checkpoints as they were trained;
        with a `start_share`, `record` is of the average.

        Raises:
          SpecJaxError: as `train`.
        """
        begun = start.begin(model, text.tokens)
        data, judged = dataset(text, begun), dataset(held_out, begun)
        objective = CachedMedusa(
            heads=begun, target=model.params, data=data, held_out=judged, settings=self.training, tree=start.tree
        )
        followed = follow(objective, output_dir, console)
        heads, judgement, share = followed.result, followed.chosen["eval"], self.start_share
        if share:
            average = jax.tree.map(lambda old, new: share * old + (1 - share) * new, begun.params, heads.params)
            heads, judgement = replace(heads, params=average), evaluate(objective, average)
            console.print(f"averaged with {self.start_from}, whose share is {share:g}")
        if self.start_from is not None:
            warn_if_worse(console, followed.log, judgement, self.start_from, "a larger start_share, ")
        record = {"trained_tokens": len(text.tokens), "held_out_tokens": len(held_out.tokens), **judgement}
        kept = {"hits": record["hits"], "accuracy": record["accuracy"], **start.backbone}
        objective.export(output_dir, heads, {"target": model.config.name, "config": asdict(self), **kept})
        if followed.partial is None:  # beside the heads, where tree="auto" finds it
            measure(model, in_bfloat16(heads), texts).save(output_dir / "heads.ranks.npz")
        console.print(json.dumps(record["accuracy"]))
        figures = save_training_figures(followed.log, output_dir, start.tree.name or f"{start.tree.size} nodes")
        return {
            **result_of(self, followed, figures),
            **start.told(),
            "record": record,
            "data": {
                "model": fingerprint(model.params),
                "training": _counts(text, data.labels),
                "held_out": _counts(held_out, judged.labels),
            },
        }


def _counts(answers: Answers, labels: Any) -> dict[str, Any]:
    return {
        "conversations": len(answers.lengths),
        "tokens": len(answers.tokens),
        "labels_per_head": (labels >= 0).sum(0).tolist(),
    }


@dataclass(frozen=True, kw_only=True)
class TrainCachedMedusa(CachedHeadTraining):
    """Fits Medusa heads to text of the target's own, or to chats."""

    model: str
    data: Corpus = field(default_factory=Corpus)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Makes the text where it is missing, then `fit`.

        Raises:
          SpecJaxError: as `start`, before there is any text; as `load_corpus` and `fit`.
        """
        model = load_model(self.model, dtype=jnp.bfloat16)
        start = self.start(model, console)
        training, evaluation = load_corpus(model, self.data, console)
        texts = conversation_texts(evaluation)
        return self.fit(model, start, joined(training), joined(evaluation), texts, output_dir, console)
