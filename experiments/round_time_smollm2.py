"""What a round costs against the size of the tree, on this machine: `make bench`.

    make bench
    specjax run experiments/round_time_smollm2.py --dtype float32

The ratio of a round's time to that of an autoregressive step is what tokens_per_round must beat.
"""

from specjax.analysis.round_time import RoundTime


def get_config() -> RoundTime:
    return RoundTime(name="round_time_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
