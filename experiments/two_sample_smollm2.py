"""Sampling stays the target's: 20,000 continuations of three tokens with every drafter, against autoregressive ones.

specjax run experiments/two_sample_smollm2.py
"""

from specjax.analysis.two_sample import TwoSample


def get_config() -> TwoSample:
    return TwoSample(
        name="two_sample_smollm2",
        model="smollm2-135m-instruct",
        prompt="Name a river. Name a river. Name a",
        drafters=(
            ("draft", "chain:2"),
            ("ngram", "cartesian:2,1"),
            ("medusa", "cartesian:3,1"),
            ("ngram+draft", "chain:2+chain:2"),
        ),
        heads="smollm2-135m-instruct",
        draft_model="smollm2-draft",
    )
