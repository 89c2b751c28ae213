"""Makes heads for the draft model that ships: a trained Qwen2 with heads of its own.

specjax run experiments/train_smollm2_draft_medusa.py --output-dir results/train_smollm2_draft_medusa

Record: not run to its end yet, and no such heads ship.
"""

from specjax.training.fit_draft_heads import FitDraftHeads
from specjax.training.trainer import TrainConfig


def get_config() -> FitDraftHeads:
    return FitDraftHeads(
        name="train_smollm2_draft_medusa",
        draft="smollm2-draft",
        tokenizer="smollm2-135m-instruct",
        reduced_vocab_size=2048,
        training=TrainConfig(epochs=4, batch_size=1024, learning_rate=2e-3, compute="float32", select="best"),
    )
