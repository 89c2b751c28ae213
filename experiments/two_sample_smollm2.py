"""Sampling stays the target's: 20,000 continuations of three tokens with a draft model's and a Medusa tree.

They are tested against autoregressive ones, which are tested against another sample of themselves.

specjax run experiments/two_sample_smollm2.py
"""

from specjax.analysis.two_sample import TwoSample


def get_config() -> TwoSample:
    return TwoSample(
        name="two_sample_smollm2",
        model="smollm2-135m-instruct",
        prompt="Name a river. Name a river. Name a",
        drafters=(
            ("draft", "paths:0,1,0.0"),
            ("medusa", "paths:0,1,0.0"),
        ),
        heads="smollm2-135m-instruct",
        draft_model="smollm2-draft",
    )
