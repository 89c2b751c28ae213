"""Sampling stays the target's: 20,000 continuations of three tokens with a draft model's and a Medusa tree.

They are tested against autoregressive ones, which are tested against another sample of themselves.

    specjax run experiments/two_sample_smollm2.py

Record (2 CPU cores, Intel Xeon without AMX, jax 0.10.2, float32, T = 1, 20,000 samples each, 11,622 distinct
continuations, 18 minutes; the result is in `records`): p against the autoregressive sample 0.846 for another
autoregressive one; 0.311 with the draft model's tree (0.15 drafts accepted per round); 0.328 with Medusa's (0.01
accepted: after this prompt the heads are seldom right). With earlier heads Medusa's was 0.301 (0.02 accepted).
"""

from specjax.studies.two_sample import TwoSample


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
