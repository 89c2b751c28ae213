"""What training studies share: which heads are fitted, a run that is followed, and what a result says of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from specjax import stopping
from specjax.corpus.conversation import Conversation, answer_tokens, cut_tokens
from specjax.environment import environment
from specjax.heads import Heads, MedusaConfig, init_heads
from specjax.loading.head_files import backbone_of, load_heads
from specjax.loading.load import Model
from specjax.ranks.labels import frequent_tokens
from specjax.training.monitor import RunMonitor, evaluation_line, throughput, warn_of_other_backbone
from specjax.training.objective import Objective
from specjax.training.quality import tree_for
from specjax.training.run import selected, train
from specjax.tree import Tree


class Followed(NamedTuple):
    """What was trained, the log's evaluation of it, the log, and why steps are missing, or None."""

    result: Any
    chosen: dict[str, Any]
    log: list[dict[str, Any]]
    partial: str | None


def follow(objective: Objective, output_dir: Path, console: Console, on: Mesh | None = None) -> Followed:
    """Trains with a live line, evaluations on the console and TensorBoard events; of several processes the first shows.

    Raises:
      SpecJaxError: as `train`.
    """
    steps, tokens = objective.steps, objective.amounts["tokens"]  # in all processes: none waits long for the first one

    def report(record: dict[str, Any]) -> None:
        console.print(evaluation_line(record))

    if jax.process_index() == 0:
        with RunMonitor(output_dir, console, steps=steps, tokens_per_step=tokens) as monitor:
            trained = train(objective, output_dir, on=on, monitor=monitor, report=report)
    else:
        trained = train(objective, output_dir, on=on)
    done = trained.log[-1]["step"]
    partial = None if done == steps else stopping.reason(f"step {done} of {steps}")
    chosen = selected(trained.log, objective.settings.select, objective.score)
    return Followed(trained.result, chosen, trained.log, partial)


def result_of(config: Any, followed: Followed, figures: Sequence[str]) -> dict[str, Any]:
    """What every training's result.json says."""
    return {
        "experiment": config.name,
        "config": asdict(config),
        "environment": environment(),
        "record": followed.chosen["eval"],
        "step": followed.chosen["step"],
        "evaluations": [entry for entry in followed.log if "eval" in entry],
        "throughput": throughput(followed.log),
        "figures": list(figures),
        "partial": followed.partial,
    }


def text_counts(training: Sequence[Conversation], held_out: Sequence[Conversation], length: int) -> dict[str, Any]:
    """Conversations and answer tokens of both sides; what lies beyond `length` is neither trained on nor evaluated."""
    sides = {"training": training, "held_out": held_out}
    return {
        "conversations": {name: len(text) for name, text in sides.items()},
        "answer_tokens": {name: answer_tokens(text) for name, text in sides.items()},
        "cut_answer_tokens": {name: cut_tokens(text, length) for name, text in sides.items()},
    }


class Start(NamedTuple):
    """What is known of a head training before there is any text.

    Attributes:
      heads: float32, to go on from; None: from the LM head.
      shape: of the heads that are fitted.
      tree: whose tokens_per_round is followed.
      backbone: what the file of `heads` says of a backbone that they belong to (Medusa-2), where the model is that one.
    """

    heads: Heads | None
    shape: MedusaConfig
    tree: Tree
    backbone: dict[str, str]

    def begin(self, model: Model, tokens: Any) -> Heads:
        """The heads before the first step; a reduced vocabulary has the most frequent of `tokens` [n]."""
        if self.heads is not None:
            return self.heads
        size = self.shape.reduced_vocab_size
        return init_heads(
            self.shape, model.params, None if size is None else frequent_tokens(tokens, size, self.shape.vocab_size)
        )

    def told(self) -> dict[str, Any]:
        """Shape and tree, for result.json."""
        tree = {"name": self.tree.name, "nodes": self.tree.size, "paths": [list(path) for path in self.tree.rank_paths]}
        return {"heads": asdict(self.shape), "tree": tree}


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Which Medusa heads to fit; the text and how to train come from what extends this.

    Attributes:
      reduced_vocab_size: the most frequent tokens of the training text; None for the whole vocabulary.
      start_from: heads to go on from, as `load_heads` takes them: their shape and vocabulary hold then, not the fields
        above. With Medusa-2 it is the second of the paper's two stages (section 2.2.2), the heads being Medusa-1's.
        None: from the LM head.
      tree: whose tokens_per_round is followed, as `Tree.parse` takes it; None: `default_tree`.
    """

    name: str
    num_heads: int = 4
    num_layers: int = 1
    reduced_vocab_size: int | None = 8192
    start_from: str | None = None
    tree: str | None = None

    def start(self, model: Model, console: Console) -> Start:
        """What needs no text to be told; to be called before the text is made, which takes long.

        Tells on the console that `start_from` belongs to another backbone (Medusa-2), and is a start alone here.

        Raises:
          ConfigError: a shape that does not fit the model.
          TreeError: there is no such tree, or it is deeper than there are heads, or too wide to simulate.
          CheckpointError: `start_from` cannot be loaded, or is for another width or vocabulary.
        """
        heads = None
        if self.start_from is not None:
            heads = load_heads(self.start_from, model.config, dtype=jnp.float32)
        shape = self._shape(model) if heads is None else heads.config
        tree = tree_for(None if self.tree is None else Tree.parse(self.tree), shape.num_heads)
        # Read now, as the heads are: the file may have changed when the training ends.
        backbone, wrong = backbone_of(self.start_from, model.params)
        if jax.process_index() == 0:
            warn_of_other_backbone(console, wrong)
        return Start(heads, shape, tree, backbone)

    def _shape(self, model: Model) -> MedusaConfig:
        width, vocab = model.config.hidden_size, model.config.vocab_size
        projection: Any = getattr(self, "projection", "shared")
        return MedusaConfig(self.num_heads, width, vocab, self.num_layers, projection, self.reduced_vocab_size)
