"""Medusa-2 for SmolLM2-135M-Instruct: heads and LoRA changes to the backbone, fitted together on its own text.

    specjax run experiments/train_smollm2_medusa2.py --output-dir results/train_smollm2_medusa2

The backbone's loss is its divergence from the frozen model (self-distillation); LoRA of rank 32, alpha 16, dropout
0.05 on all seven matrices of a layer. It uses the text of train_smollm2_medusa.py, and makes it where it is not there.
Output: heads.safetensors and `backbone`, the Hugging Face directory of the model that they belong to, both of the
checkpoint with the most tokens per round on the held-out text; log, TensorBoard events and curves.

On several hosts, each runs the same command with its own number, on directories that all of them see:

    specjax run experiments/train_smollm2_medusa2.py --output-dir DIR --mesh.model 1 \\
        --hosts.coordinator HOST:PORT --hosts.processes 2 --hosts.process-id 0

Record: not run at this size yet. A first look (2 CPU cores, AMD EPYC Zen 3, beside other work: seed prompts, 96 answers
of up to 96 tokens, 2,048 draft tokens, steps of 2 x 256 tokens, stopped after 30 of them): from step 0 to 30 the heads'
held-out losses fell from 9.8 11.4 12.0 12.0 to 5.6 7.3 8.1 8.0 nats, head 1's top-1 accuracy rose from 0.02 to 0.12,
tokens per round from 1.10 to 1.24 (1.26 at step 20); the backbone diverged from the frozen target by 0.005 nats.
"""

from specjax.training.distillation import Distillation
from specjax.training.fit_joint import FitJoint
from specjax.training.joint import JointConfig
from specjax.training.lora import LoraConfig


def get_config() -> FitJoint:
    return FitJoint(
        name="train_smollm2_medusa2",
        model="smollm2-135m-instruct",
        data=Distillation(shards=90),
        training=JointConfig(
            epochs=2, batch_size=8, length=512, lora=LoraConfig(rank=32, alpha=16.0, dropout=0.05), select="best"
        ),
    )
