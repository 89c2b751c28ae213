"""Training Medusa heads and draft models: self-distillation, data, losses, the loop."""

from specjax.heads import init_heads
from specjax.training.distill import answer, distinct
from specjax.training.seeds import seed_prompts
from specjax.training.trainer import TrainConfig, dataset, train

__all__ = ["TrainConfig", "answer", "dataset", "distinct", "init_heads", "seed_prompts", "train"]
