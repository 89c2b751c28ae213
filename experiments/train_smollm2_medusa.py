"""Made the Medusa heads that ship for SmolLM2-135M-Instruct.

    specjax run experiments/train_smollm2_medusa.py --output-dir results/train_smollm2_medusa

Four heads of one residual layer that share the LM head, restricted to the 8,192 most frequent tokens of the training
text; Medusa-1 on greedy answers of the model itself, to user turns that it wrote and to seed prompts.
"""

from specjax.training.fit import FitHeads


def get_config() -> FitHeads:
    return FitHeads(name="train_smollm2_medusa", model="smollm2-135m-instruct")
