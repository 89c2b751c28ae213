"""Heads for a tiny Qwen2 with random weights: the training path from data to exported heads, in seconds (in the tests).

    specjax run experiments/train_tiny_qwen2.py

The config makes the model, the model its text. On held-out text the trained heads must beat their initialisation, the
LM head, by at least 0.15 (head 1) and 0.03 (heads 2 and 3) in top-1 accuracy and by 0.3 tokens per round with a tree
of 15 drafts (tests/training/test_fit.py). Record (2 CPU cores, jax 0.10.2, 19 CPU seconds in all), heads 1 to 3, held
out:

    step   top-1               top-3               tokens per round
    0      0.320 0.405 0.334   0.358 0.462 0.403   1.374
    186    0.548 0.459 0.437   0.635 0.573 0.563   1.969
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
