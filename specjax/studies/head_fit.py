"""From a target and text of its own to heads on disk, with the record of how good they are."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console

from specjax.corpus.answers import Answers
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads, MedusaConfig, init_heads
from specjax.loading.head_files import backbone_of, load_heads, save_heads
from specjax.loading.load import Model
from specjax.ranks.measuring import Text, measure
from specjax.report.training_figures import save_training_figures
from specjax.training.monitor import RunMonitor, evaluation_line, tell_of_start, throughput, warn_if_worse
from specjax.training.quality import record as evaluation_record
from specjax.training.quality import selected, tree_for
from specjax.training.trainer import TrainConfig, dataset, evaluate, frequent_tokens, steps_of, train
from specjax.tree import Tree


@dataclass(frozen=True, kw_only=True)
class HeadFit:
    """Which heads, and how to train them; the text comes from what extends this.

    Attributes:
      reduced_vocab_size: the most frequent tokens of the training text; None for the whole vocabulary.
      start_from: heads to go on from, as `load_heads` takes them: their shape and vocabulary hold then, not the fields
        above. None: from the LM head.
      start_share: share of `start_from`'s weights in those that are exported, the trained ones having the rest: what
        goes on from other heads on new text forgets some of the old (weight averaging, Wortsman et al. 2022). The
        checkpoint is selected before they are averaged.
      tree: whose tokens_per_round is followed, as `Tree.parse` takes it; None: `default_tree`.

    Raises:
      ConfigError: a share outside [0, 1), or without `start_from`.
    """

    name: str
    num_heads: int = 4
    num_layers: int = 1
    projection: Literal["shared", "full"] = "shared"
    reduced_vocab_size: int | None = 8192
    start_from: str | None = None
    start_share: float = 0.0
    tree: str | None = None
    training: TrainConfig = field(default_factory=lambda: TrainConfig(select="best"))

    def __post_init__(self) -> None:
        if not 0 <= self.start_share < 1:
            raise ConfigError(f"start_share is {self.start_share}; expected at least 0, and less than 1.")
        if self.start_share and self.start_from is None:
            raise ConfigError(
                f"start_share is {self.start_share}, but there are no heads to average with: set start_from to some, "
                "or leave it out."
            )

    def check(self, model: Model, console: Console) -> None:
        """Tells what needs no text to be told; to be called before the text is made, which takes long.

        On the console: that `start_from` belongs to another backbone (Medusa-2), and is a start alone here.

        Raises:
          ConfigError: a shape that does not fit the model.
          TreeError: there is no such tree, or it is deeper than there are heads, or too wide to simulate.
          CheckpointError: `start_from` cannot be loaded, or is for another width or vocabulary.
        """
        begun = None if self.start_from is None else load_heads(self.start_from, model.config)
        self._tree(self._shape(model) if begun is None else begun.config)
        tell_of_start(console, backbone_of(self.start_from, model.params)[1])

    def start(self, model: Model, text: Answers) -> Heads:
        """The float32 heads that training starts with.

        Raises:
          As `check`, but for the tree.
        """
        if self.start_from is not None:
            return load_heads(self.start_from, model.config, dtype=jnp.float32)
        vocab, size = model.config.vocab_size, self.reduced_vocab_size
        tokens = None if size is None else frequent_tokens(text.tokens, size, vocab)
        return init_heads(self._shape(model), model.params, tokens)

    def _shape(self, model: Model) -> MedusaConfig:
        width, vocab = model.config.hidden_size, model.config.vocab_size
        return MedusaConfig(self.num_heads, width, vocab, self.num_layers, self.projection, self.reduced_vocab_size)

    def _tree(self, shape: MedusaConfig) -> Tree:
        return tree_for(None if self.tree is None else Tree.parse(self.tree), shape.num_heads)

    def fit(
        self,
        model: Model,
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
          As `check` and `train`.
        """
        begun = heads = self.start(model, text)
        # Read now, as the heads are: the file may have changed when the training ends.
        backbone, _ = backbone_of(self.start_from, model.params)
        tree = self._tree(heads.config)
        data, judged = dataset(text, heads), dataset(held_out, heads)
        steps = steps_of(data, self.training)
        with RunMonitor(output_dir, console, steps=steps, tokens_per_step=self.training.batch_size) as monitor:
            heads, log = train(
                heads,
                model.params,
                data,
                judged,
                self.training,
                output_dir,
                tree=tree,
                monitor=monitor,
                report=lambda record: console.print(evaluation_line(record)),
            )
        chosen = selected(log, self.training.select)
        judgement = chosen["eval"]
        if self.start_share:
            share = self.start_share
            average = jax.tree.map(lambda old, new: share * old + (1 - share) * new, begun.params, heads.params)
            heads = replace(heads, params=average)
            judgement = evaluation_record(evaluate(heads, model.params, judged), tree)
            console.print(f"averaged with {self.start_from}, whose share is {share:g}")
        if self.start_from is not None:
            warn_if_worse(console, log, judgement, self.start_from, "a larger start_share, ")
        record = {"trained_tokens": len(text.tokens), "held_out_tokens": len(held_out.tokens), **judgement}
        half = Heads(jax.tree.map(lambda p: p.astype(jnp.bfloat16), heads.params), heads.token_map, heads.config)
        metadata = {
            "target": model.config.name,
            "config": asdict(self),
            "hits": record["hits"],
            "accuracy": record["accuracy"],
            **backbone,
        }
        save_heads(output_dir / "heads.safetensors", half, metadata)
        measure(model, half, texts).save(output_dir / "heads.ranks.npz")  # beside the heads: tree="auto" finds it
        console.print(json.dumps(record["accuracy"]))
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "record": record,
            "step": chosen["step"],
            "heads": asdict(heads.config),
            "tree": {"name": tree.name, "nodes": tree.size, "paths": [list(path) for path in tree.rank_paths]},
            "data": {
                "model": fingerprint(model.params),
                "training": _counts(text, data.labels),
                "held_out": _counts(held_out, judged.labels),
            },
            "evaluations": [entry for entry in log if "eval" in entry],
            "throughput": throughput(log),
            "figures": save_training_figures(log, output_dir, tree.name or f"{tree.size} nodes"),
        }


def _counts(answers: Answers, labels: Any) -> dict[str, Any]:
    return {
        "conversations": len(answers.lengths),
        "tokens": len(answers.tokens),
        "labels_per_head": (labels >= 0).sum(0).tolist(),
    }
