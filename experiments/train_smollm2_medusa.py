"""Fits Medusa heads to SmolLM2-135M-Instruct: the first ones, which `continue_smollm2_medusa.py` goes on from.

    specjax run experiments/train_smollm2_medusa.py --output-dir results/train_smollm2_medusa

Four heads of one residual layer that share the LM head, restricted to the 8,192 most frequent tokens of the training
text; Medusa-1 on greedy answers of the model itself, to user turns that it wrote and to seed prompts. A million
tokens: some 40 minutes for the text on 2 cores with AVX-512 and 9 an epoch. Expect a top-1 accuracy of .43 .28 .21
.16 on text of this kind.
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_cached_medusa import TrainCachedMedusa
from specjax.training.cached_medusa import CachedMedusaConfig


def get_config() -> TrainCachedMedusa:
    return TrainCachedMedusa(
        name="train_smollm2_medusa",
        model="smollm2-135m-instruct",
        data=Corpus(shards=90),
        training=CachedMedusaConfig(epochs=3, batch_size=1024, learning_rate=2e-3, select="best"),
    )
