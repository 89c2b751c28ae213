"""Tiny Medusa-2 runs on meshes, as one of several processes where asked: prints a record of each as JSON.

python scale_job.py ROOT "DIRECTORY:DATAxMODEL ..." [COORDINATOR PROCESSES PROCESS_ID]
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import specjax as sj
from specjax.corpus.conversation import Conversation
from specjax.heads import init_heads
from specjax.target import params
from specjax.training.lora import LoraConfig
from specjax.training.mesh import HostsConfig, MeshConfig
from specjax.training.packed_medusa import PackedMedusa, PackedMedusaConfig
from specjax.training.run import Trained, train

CONFIG = sj.ModelConfig("qwen2", 64, 32, 32, 1, 4, 4, 8, qkv_bias=True)  # K, F and V divide by four
SETTINGS = PackedMedusaConfig(
    epochs=1, batch_size=8, length=24, lora=LoraConfig(4, 8.0, 0.1), checkpoint_every=20, learning_rate=5e-3,
    lora_learning_rate=2e-3, head_weight=0.5, backbone_loss="text", remat=False,
    accumulate=2, ema=0.5, select="best",
)  # fmt: skip
STEPS = 20


def text(count: int, seed: int) -> list[Conversation]:
    """Conversations of a language in which a token follows from the last one, five times in six."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = [int(rng.integers(64))]
        while len(tokens) < 12:
            tokens.append((5 * tokens[-1] + 3) % 64 if rng.random() < 5 / 6 else int(rng.integers(64)))
        made.append(Conversation(np.array(tokens[:3]), np.array(tokens[3:])))
    return made


def target() -> tuple[params.Params, sj.Heads]:
    """The model and its new heads."""
    rng = np.random.default_rng(0)  # not params.init: a process would spend seconds compiling it
    shapes = params.shape_structs(CONFIG)
    weights = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), shapes)
    return weights, init_heads(sj.MedusaConfig(2, 32, 64), weights)


def run(directory: Path, mesh: MeshConfig) -> Trained:
    """20 steps."""
    weights, heads = target()
    data = text(STEPS * 16, seed=0)
    objective = PackedMedusa(
        model=sj.Model(weights, CONFIG, None), heads=heads, data=data, held_out=text(60, seed=1), settings=SETTINGS
    )
    return train(objective, directory, on=mesh.build())


def digest(fitted: Trained) -> str:
    """Of every bit of the fitted arrays."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves((fitted.result.heads.params, fitted.result.lora)):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    root, jobs, *hosts = sys.argv[1:]
    if hosts:
        HostsConfig(hosts[0], int(hosts[1]), int(hosts[2])).join()
    for job in jobs.split():
        name, shape = job.split(":")
        fitted = run(Path(root) / name, MeshConfig(*map(int, shape.split("x"))))
        record = {"job": job, "devices": jax.device_count(), "digest": digest(fitted), "log": fitted.log}
        print(json.dumps(record), flush=True)
