"""What a round costs against the size of the tree, on this machine: `make bench`.

    make bench
    specjax run experiments/round_time_smollm2.py --dtype float32

The ratio of a round's time to that of an autoregressive step is what tokens_per_round must beat. Some minutes. Expect
rounds of 4, 8 and 16 nodes to cost 1.2, 1.5 and 1.9 steps in bfloat16 with AVX-512, 1.4, 1.7 and 2.2 in float32.
"""

from specjax.studies.round_time import RoundTime


def get_config() -> RoundTime:
    return RoundTime(name="round_time_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
