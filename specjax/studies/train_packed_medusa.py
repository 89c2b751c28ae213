"""Fits heads, and with Medusa-2 the backbone's LoRA changes, with features computed on the fly, on a mesh."""

import functools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from specjax.corpus.build import Corpus, load_corpus
from specjax.corpus.split import turns
from specjax.loading.load import load_model
from specjax.report.training_figures import save_training_figures
from specjax.studies.training_study import HeadTraining, follow, result_of, text_counts
from specjax.training import preflight
from specjax.training.lora import LoraConfig
from specjax.training.mesh import HostsConfig, MeshConfig, first_alone
from specjax.training.monitor import warn_if_worse
from specjax.training.packed_medusa import PackedMedusa, PackedMedusaConfig

TEXT_MARK, EXPORT_MARK = "text.made", "export.made"  # tell the other hosts


@dataclass(frozen=True, kw_only=True)
class TrainPackedMedusa(HeadTraining):
    """Fits Medusa heads to text of the target's own, on a mesh: Medusa-2, or without `training.lora` Medusa-1.

    Several hosts run it with one `data.directory`, model, `start_from` and output directory, which all of them see. The
    first one makes the text and writes the log, events, curves, heads and backbone; all write checkpoints together.
    """

    model: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the target and of the products; what is fitted is float32
    data: Corpus = field(default_factory=Corpus)
    training: PackedMedusaConfig = field(default_factory=lambda: PackedMedusaConfig(lora=LoraConfig(), select="best"))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def run(self, output_dir: Path, console: Console) -> dict[str, Any]:
        """Makes the text, fits, and writes heads.safetensors and Medusa-2's `backbone`, both bfloat16.

        They are of the checkpoint that `training.select` names. Beside them: log.jsonl, TensorBoard events, curves as
        PNG, and checkpoints. A run that was stopped goes on where the same `output_dir` is given.

        Raises:
          ConfigError: rows or a dimension that the mesh does not divide, before there is any text.
          SpecJaxError: as `start`, before there is any text; as `load_corpus` and `train`.
        """
        self.hosts.join()
        mesh, first = self.mesh.build(), jax.process_index() == 0
        model = load_model(self.model, dtype=self.dtype)
        start = self.start(model, console)
        fixed = self.start_from is not None
        preflight.check_heads_on_mesh(model.config, start.shape, self.training.batch_size, mesh, fixed_vocabulary=fixed)
        read = functools.partial(load_corpus, model, self.data, console, features=False)
        # One process writes shards; a file of chats all read at once.
        made = read() if self.data.chats is not None else first_alone(read, output_dir / TEXT_MARK)
        text, held_out = made or read(make=False)
        multihost_utils.sync_global_devices("read")  # they begin to train together
        heads = start.begin(model, np.concatenate([tokens for item in text for _, tokens, _ in turns(item)]))
        objective = PackedMedusa(
            model=model, heads=heads, data=text, held_out=held_out, settings=self.training, tree=start.tree
        )
        followed = follow(objective, output_dir, console, mesh)
        judgement = followed.chosen["eval"]
        if first and self.start_from is not None:
            warn_if_worse(console, followed.log, judgement, self.start_from)

        def write() -> list[str]:
            kept = {name: judgement[name] for name in ("hits", "accuracy")}
            metadata = {"target": self.model, "config": asdict(self), **start.backbone, **kept}
            objective.export(output_dir, followed.result, metadata)
            return save_training_figures(followed.log, output_dir, start.tree.name or f"{start.tree.size} nodes")

        figures = first_alone(write, output_dir / EXPORT_MARK) or []  # no process ends while the first one still writes
        return {
            **result_of(self, followed, figures),
            **start.told(),
            **text_counts(text, held_out, self.training.length),
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
        }
