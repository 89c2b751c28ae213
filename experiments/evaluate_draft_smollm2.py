"""How often SmolLM2 takes the tokens of the draft model that ships, on answers to prompts that it was not trained on.

specjax run experiments/evaluate_draft_smollm2.py
"""

from specjax.training.distillation import Distillation
from specjax.training.fit_draft import EvaluateDraft


def get_config() -> EvaluateDraft:
    return EvaluateDraft(
        name="evaluate_draft_smollm2",
        model="smollm2-135m-instruct",
        draft="smollm2-draft",
        data=Distillation("results/evaluate_draft_smollm2/text", shards=2, turn_seed=107, prompt_seed=50_000),
    )
