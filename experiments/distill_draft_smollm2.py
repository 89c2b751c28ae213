"""Made the draft model that ships for SmolLM2-135M-Instruct: a Qwen2 of 7 million parameters.

specjax run experiments/distill_draft_smollm2.py --output-dir results/distill_draft_smollm2
"""

from specjax.training.draft import DistilConfig
from specjax.training.fit import Distillation
from specjax.training.fit_draft import FitDraft


def get_config() -> FitDraft:
    return FitDraft(
        name="distill_draft_smollm2",
        model="smollm2-135m-instruct",
        data=Distillation(shards=90, held_out_shards=2),
        training=DistilConfig(epochs=4),
    )
