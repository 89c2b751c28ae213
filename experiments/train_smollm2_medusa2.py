"""Medusa-2 for SmolLM2-135M-Instruct: heads and LoRA changes to the backbone, fitted together on its own text.

    specjax run experiments/train_smollm2_medusa2.py --output-dir results/train_smollm2_medusa2
    specjax run experiments/train_smollm2_medusa2.py --output-dir DIR --mesh.model 1 \\
        --hosts.coordinator HOST:PORT --hosts.processes 2 --hosts.process-id 0    (each host, its own number)

The backbone's loss is its divergence from the frozen model. Output: heads.safetensors and `backbone`, the model that
they belong to. With `--start-from HEADS` (Medusa-1's) it is the second of the paper's two stages. Not run at this
size; a small second stage, 27 minutes on 2 cores, did not pay: 1.752 tokens a round before, 1.736 after.
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_packed_medusa import TrainPackedMedusa
from specjax.training.lora import LoraConfig
from specjax.training.packed_medusa import PackedMedusaConfig


def get_config() -> TrainPackedMedusa:
    return TrainPackedMedusa(
        name="train_smollm2_medusa2",
        model="smollm2-135m-instruct",
        data=Corpus(shards=90),
        training=PackedMedusaConfig(
            epochs=2, batch_size=8, length=512, lora=LoraConfig(rank=32, alpha=16.0, dropout=0.05), select="best"
        ),
    )
