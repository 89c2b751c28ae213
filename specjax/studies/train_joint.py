"""The experiment that fits heads, and with Medusa-2 the backbone's LoRA changes, with features computed on the fly."""

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from specjax.corpus.build import Distillation, prepared
from specjax.corpus.conversation import Conversation, answer_tokens, cut_tokens
from specjax.corpus.split import turns
from specjax.environment import environment
from specjax.errors import ConfigError
from specjax.fingerprint import fingerprint
from specjax.heads import Heads, MedusaConfig, init_heads
from specjax.loading.head_files import BACKBONE, backbone_of, load_heads, save_heads
from specjax.loading.hf import save_hf
from specjax.loading.load import Model, load_model
from specjax.report.training_figures import save_training_figures
from specjax.target import params as parameters
from specjax.target.config import ModelConfig
from specjax.training.joint import JointConfig
from specjax.training.joint_trainer import Fitted, fit_joint
from specjax.training.lora import LoraConfig, merge
from specjax.training.mesh import MODEL, HostsConfig, MeshConfig, check_rows, first_alone
from specjax.training.monitor import RunMonitor, evaluation_line, tell_of_start, throughput, warn_if_worse
from specjax.training.packing import packed_steps
from specjax.training.quality import selected, tree_for
from specjax.training.trainer import frequent_tokens
from specjax.tree import Tree

HEADS = "heads.safetensors"
TEXT_MARK, EXPORT_MARK = "text.made", "export.made"  # tell the other hosts


@dataclass(frozen=True)
class FitJoint:
    """Fits Medusa heads to text of the target's own, on a mesh: Medusa-2, or without `training.lora` Medusa-1.

    Several hosts run it with one `data.directory`, model, `start_from` and output directory, which all of them see. The
    first one makes the text and writes the log, events, curves, heads and backbone; all write checkpoints together.

    Attributes:
      reduced_vocab_size: the most frequent tokens of the training text; None for the whole vocabulary.
      start_from: heads to go on from, as `load_heads` takes them: their shape and vocabulary hold then, not the fields
        above. With Medusa-2 it is the second of the paper's two stages (section 2.2.2), the heads being Medusa-1's.
        None: from the LM head.
      tree: whose tokens_per_round is followed, as `Tree.parse` takes it; None: `default_tree`.
    """

    name: str
    model: str
    num_heads: int = 4
    num_layers: int = 1
    reduced_vocab_size: int | None = 8192
    start_from: str | None = None
    tree: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the target and of the products; what is fitted is float32
    data: Distillation = field(default_factory=Distillation)
    training: JointConfig = field(default_factory=lambda: JointConfig(lora=LoraConfig(), select="best"))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, fits, and writes heads.safetensors and Medusa-2's `backbone`, both bfloat16.

        They are of the checkpoint that `training.select` names. Beside them: log.jsonl, TensorBoard events, curves as
        PNG, and checkpoints. A run that was stopped goes on where the same `output_dir` is given.

        Raises:
          As `prepared` and `fit_joint`; before there is any text: ConfigError for a shape that does not fit the model,
            or rows or a dimension that the mesh does not divide; TreeError where there is no such tree, or it is deeper
            than there are heads; CheckpointError where `start_from` cannot be loaded, or is for another width or
            vocabulary.
        """
        self.hosts.join()
        mesh, first = self.mesh.build(), jax.process_index() == 0
        model = load_model(self.model, dtype=self.dtype)
        begun = None if self.start_from is None else load_heads(self.start_from, model.config, dtype=jnp.float32)
        shape = self._shape(model.config) if begun is None else begun.config
        tree = tree_for(None if self.tree is None else Tree.parse(self.tree), shape.num_heads)
        self._check_mesh(model.config, shape, mesh)
        # Read now, as the heads are: the file may have changed when the training ends.
        backbone, wrong = backbone_of(self.start_from, model.params)
        if first:
            tell_of_start(console, wrong)
        read = functools.partial(prepared, model, self.data, console, features=False)
        # One process writes shards; a file of chats all read at once.
        made = read() if self.data.chats is not None else first_alone(read, output_dir / TEXT_MARK)
        text, held_out = made or read(make=False)
        multihost_utils.sync_global_devices("read")  # they begin to train together
        heads = self._from_lm_head(model, shape, text) if begun is None else begun
        training = self.training
        fit = functools.partial(
            fit_joint, model.config, model.params, heads, text, held_out, training, output_dir, on=mesh, tree=tree
        )
        # In all processes, so that none waits long for the first one.
        steps, tokens = packed_steps(text, training), training.batch_size * training.length
        if first:
            with RunMonitor(output_dir, console, steps=steps, tokens_per_step=tokens) as monitor:
                fitted = fit(monitor=monitor, report=lambda record: console.print(evaluation_line(record)))
        else:
            fitted = fit()
        chosen = selected(fitted.log, training.select)
        if first and self.start_from is not None:
            warn_if_worse(console, fitted.log, chosen["eval"], self.start_from)

        def write() -> list[str]:
            metadata = {"target": self.model, "config": asdict(self), **backbone}
            export(output_dir, model, fitted, metadata | {k: chosen["eval"][k] for k in ("hits", "accuracy")})
            return save_training_figures(fitted.log, output_dir, tree.name or f"{tree.size} nodes")

        figures = first_alone(write, output_dir / EXPORT_MARK) or []  # no process ends while the first one still writes
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "conversations": {"training": len(text), "held_out": len(held_out)},
            "answer_tokens": {"training": answer_tokens(text), "held_out": answer_tokens(held_out)},
            "cut_answer_tokens": {  # of those, beyond training.length: neither trained on nor evaluated
                "training": cut_tokens(text, training.length),
                "held_out": cut_tokens(held_out, training.length),
            },
            "record": chosen["eval"],
            "step": chosen["step"],
            "heads": asdict(heads.config),
            "tree": {"name": tree.name, "nodes": tree.size, "paths": [list(path) for path in tree.rank_paths]},
            "evaluations": [entry for entry in fitted.log if "eval" in entry],
            "throughput": throughput(fitted.log),
            "figures": figures,
        }

    def _shape(self, target: ModelConfig) -> MedusaConfig:
        width, vocab = target.hidden_size, target.vocab_size
        return MedusaConfig(self.num_heads, width, vocab, self.num_layers, "shared", self.reduced_vocab_size)

    def _check_mesh(self, config: ModelConfig, shape: MedusaConfig, mesh: Mesh) -> None:
        # All that `fit_joint` places on the mesh, by shapes alone: it does so when the text has been made.
        check_rows(self.training.batch_size, mesh)
        parameters.shardings(config, mesh)
        if shape.output_size % mesh.shape[MODEL]:
            remedy = "a multiple of it as reduced_vocab_size, or another mesh"
            if self.start_from is not None:  # whose vocabulary holds
                remedy = "another mesh"
            raise ConfigError(
                f"the heads' vocabulary of {shape.output_size} tokens does not divide over mesh axis {MODEL!r} of size "
                f"{mesh.shape[MODEL]}; choose {remedy}."
            )

    def _from_lm_head(self, model: Model, shape: MedusaConfig, text: list[Conversation]) -> Heads:
        answers = np.concatenate([tokens for item in text for _, tokens, _ in turns(item)])
        size = shape.reduced_vocab_size
        tokens = None if size is None else frequent_tokens(answers, size, shape.vocab_size)
        return init_heads(shape, model.params, tokens)


def export(directory: Path, model: Model, fitted: Fitted, metadata: dict[str, Any]) -> None:
    """Writes the heads, and what they belong to where that changed: the backbone, its LoRA changes merged, as a Hugging
    Face directory with the tokenizer.

    Args:
      model: that was fitted; the files are in bfloat16.
      metadata: kept with the heads, and beside it the fingerprint of a backbone that changed as `backbone`.
    """
    if fitted.lora is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merge(model.params, fitted.lora))
        save_hf(directory / BACKBONE, params, model.config)
        if model.tokenizer is not None:
            model.tokenizer.save(directory / BACKBONE)
        metadata = metadata | {BACKBONE: fingerprint(params)}
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fitted.heads.params)
    save_heads(directory / HEADS, Heads(half, fitted.heads.token_map, fitted.heads.config), metadata)
