"""Fits Medusa heads with the target's features computed on the fly, for text whose features would not fit on the disk.

    specjax run experiments/train_medusa_on_the_fly.py --model MODEL --data.chats chats.jsonl --output-dir results/mine

The backbone stays as it is (Medusa-1). Every step runs the frozen target over packed conversations, so that it costs
more than with cached features, and nothing but the text is kept. `--start-from HEADS` goes on from others. It runs on
a mesh and on several hosts (`--mesh.data`, `--mesh.model`, `--hosts.*`), as `train_smollm2_medusa2.py` says.

Record: none; the tests run it on tiny models.
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_packed_medusa import TrainPackedMedusa
from specjax.training.packed_medusa import PackedMedusaConfig


def get_config() -> TrainPackedMedusa:
    return TrainPackedMedusa(
        name="train_medusa_on_the_fly",
        model="smollm2-135m-instruct",
        data=Corpus("results/distill_without_features", shards=90, features=False),
        training=PackedMedusaConfig(epochs=3, batch_size=8, length=512, select="best"),
    )
