"""What a round costs against the size of the tree, on this machine: `make bench`.

    make bench
    specjax run experiments/round_time_smollm2.py --dtype float32

The ratio of a round's time to that of an autoregressive step is what tokens_per_round must beat.

Record (2 CPU cores, AMD EPYC with AVX-512 bf16, jax 0.10.2, bfloat16): 4, 8, 12, 16, 24 and 32 nodes cost 1.13, 1.31,
1.45, 1.61, 1.99 and 2.40 steps (medians of 5; a step took 17.9 ms, 17.2-20.7).
"""

from specjax.analysis.round_time import RoundTime


def get_config() -> RoundTime:
    return RoundTime(name="round_time_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
