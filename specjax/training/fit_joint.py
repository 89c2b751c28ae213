"""The experiment that fits heads, and with Medusa-2 the backbone's LoRA changes, with features computed on the fly."""

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from specjax.bench import environment
from specjax.heads import Heads, MedusaConfig, init_heads
from specjax.loading.heads import save_heads
from specjax.loading.hf import save_hf
from specjax.loading.load import Model, load_model
from specjax.loading.tokenizer import Tokenizer
from specjax.params import Params
from specjax.training.corpus import turns
from specjax.training.distillation import Distillation, prepared
from specjax.training.joint import JointConfig
from specjax.training.joint_trainer import Fitted, fit_joint
from specjax.training.lora import LoraConfig, merge
from specjax.training.mesh import HostsConfig, MeshConfig
from specjax.training.trainer import frequent_tokens

BACKBONE, HEADS = "backbone", "heads.safetensors"


@dataclass(frozen=True)
class FitJoint:
    """Fits Medusa heads to text of the target's own, on a mesh: Medusa-2, or without `training.lora` Medusa-1.

    Several hosts run it with one `data.directory` and one output directory, which all of them see.
    """

    name: str
    model: str
    num_heads: int = 4
    num_layers: int = 1
    reduced_vocab_size: int | None = 8192  # the most frequent tokens of the training text
    data: Distillation = field(default_factory=Distillation)
    training: JointConfig = field(default_factory=lambda: JointConfig(lora=LoraConfig()))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Distils, fits, and writes heads.safetensors and Medusa-2's `backbone`, both bfloat16, log and checkpoints."""
        self.hosts.join()
        mesh, first = self.mesh.build(), jax.process_index() == 0
        model = load_model(self.model, dtype=jnp.bfloat16)
        read = functools.partial(prepared, model, self.data, console, features=False)
        made = read() if first else None  # one process writes
        multihost_utils.sync_global_devices("distilled")
        text, held_out = made or read(make=False)
        answers = np.concatenate([tokens for item in text for _, tokens, _ in turns(item)])
        vocab = model.config.vocab_size
        size = self.reduced_vocab_size
        token_map = None if size is None else frequent_tokens(answers, size, vocab)
        shape = MedusaConfig(self.num_heads, model.config.hidden_size, vocab, self.num_layers, "shared", size)

        def report(record: dict[str, Any]) -> None:
            if first:
                console.print(f"step {record['step']}", json.dumps(record["eval"]["accuracy"]))

        fitted = fit_joint(
            model.config,
            model.params,
            init_heads(shape, model.params, token_map),
            text,
            held_out,
            self.training,
            output_dir,
            on=mesh,
            report=report,
        )
        record = fitted.log[-1]["eval"]
        if first:
            metadata = {"target": self.model, "config": asdict(self), **record}
            export(output_dir, model, fitted, metadata)
        return {
            "experiment": self.name,
            "config": asdict(self),
            "environment": environment(),
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "conversations": {"training": len(text), "held_out": len(held_out)},
            "answer_tokens": len(answers),
            "record": record,
            "evaluations": [entry for entry in fitted.log if "eval" in entry],
        }


def export(directory: Path, model: Model, fitted: Fitted, metadata: dict[str, Any]) -> Params:
    """Writes the heads, and what they belong to where that changed: the backbone, its LoRA changes merged, as a Hugging
    Face directory with the tokenizer. Gives the backbone's parameters.

    Args:
      model: that was fitted; the files are in bfloat16.
      metadata: kept with the heads.
    """
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), fitted.heads.params)
    save_heads(directory / HEADS, Heads(half, fitted.heads.token_map, fitted.heads.config), metadata)
    if fitted.lora is None:
        return model.params
    merged = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merge(model.params, fitted.lora))
    save_hf(directory / BACKBONE, merged, model.config)
    if model.tokenizer is not None:
        _save_tokenizer(model.tokenizer, directory / BACKBONE)
    return merged


def _save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
