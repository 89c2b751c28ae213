"""Heads for a tiny Qwen2 with random weights: the training path from data to exported heads, in seconds (in the tests).

    specjax run experiments/train_tiny_qwen2.py

The config makes the model, the model its text. On held-out text the trained heads must beat their initialisation, the
LM head, by at least 0.15 (head 1) and 0.03 (heads 2 and 3) in top-1 accuracy and by 0.3 tokens per round with a tree
of 15 drafts (tests/training/test_train_cached_medusa.py). It takes some 20 seconds; records/train_tiny_qwen2 has a run.
"""

from specjax.studies.train_random import TrainRandomQwen2
from specjax.training.cached_medusa import CachedMedusaConfig


def get_config() -> TrainRandomQwen2:
    return TrainRandomQwen2(
        name="train_tiny_qwen2",
        num_heads=3,
        reduced_vocab_size=48,
        training=CachedMedusaConfig(epochs=6, batch_size=256, learning_rate=1e-2, checkpoint_every=62, select="best"),
    )
