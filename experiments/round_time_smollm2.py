"""What a round costs against the size of the tree, on this machine: `make bench`.

    make bench
    specjax run experiments/round_time_smollm2.py --dtype float32

The ratio of a round's time to that of an autoregressive step is what tokens_per_round must beat.

Record (2 CPU cores, AMD EPYC with AVX-512 bf16, jax 0.10.2, bfloat16): 4, 8, 12, 16, 24 and 32 nodes cost 1.13, 1.31,
1.45, 1.61, 1.99 and 2.40 steps (medians of 5; a step took 17.9 ms, 17.2-20.7).

On a Zen 4 with AVX-512 bf16, weights in today's layout: 2, 4, 8, 12, 16, 32 and 64 nodes cost 1.04, 1.15, 1.30, 1.51,
1.69, 2.58 and 4.01 bfloat16 steps of 24.9 ms (23.2-25.0); in float32 1.32, 1.37, 1.64, 2.46, 2.19, 3.68 and 6.32 steps
of 20.2 ms (19.4-21.7). Float32 has the faster step and bfloat16 the cheaper rounds.
These and the earlier figures are with a cache of fewer slots than the 128 tokens that it has room for now.

Without AVX-512 (Zen 3, float32) 2, 4, 8 and 16 nodes cost 1.47, 1.50, 1.96 and 2.67 steps of 21.5 ms. A step's products
are matrix-vector ones that read the weights at 27 GB/s; those of a round are YNNPACK's (the MLP's first one reads them
at 17 GB/s with 4 rows), and 6 and 12 rows take as long as 8 and more than 16. What did not help there, tried on
matrices of 3072 x 576: weights laid out the other way (1.4 to 1.8 times as slow at 4 to 16 rows), Eigen in place of
YNNPACK, one matrix-vector product per row, a multiplication and a reduction fused with reassociation allowed. Widening
bfloat16 weights inside YNNPACK's product, with float32 rows, makes rounds nearly flat (4, 8 and 16 nodes of SmolLM2
cost 1.1, 1.3 and 1.7 steps), but only as its step is slow: 35 ms.
"""

from specjax.analysis.round_time import RoundTime


def get_config() -> RoundTime:
    return RoundTime(name="round_time_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
