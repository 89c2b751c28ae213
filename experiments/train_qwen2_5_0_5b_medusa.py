"""Medusa heads for Qwen2.5-0.5B-Instruct, on text of its own: downloads the model, distils, trains, exports.

    specjax run experiments/train_qwen2_5_0_5b_medusa.py --output-dir results/train_qwen2_5_0_5b_medusa
    specjax convert ... (see `specjax convert --help`) then writes the layout that another engine reads

Needs a network for the first run (or the model in Hugging Face's cache), and is meant for an accelerator: about a
million tokens of answers, then three epochs over their features. No record yet: it has not been run to the end.
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_cached_medusa import TrainCachedMedusa
from specjax.training.cached_medusa import CachedMedusaConfig


def get_config() -> TrainCachedMedusa:
    return TrainCachedMedusa(
        name="train_qwen2_5_0_5b_medusa",
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reduced_vocab_size=32_768,
        data=Corpus(directory="results/distill_qwen2_5_0_5b", shards=90),
        training=CachedMedusaConfig(epochs=3, batch_size=1024, learning_rate=2e-3, select="best"),
    )
