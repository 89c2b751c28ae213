"""What a round costs against the size of the tree, on this machine: `make bench`.

    make bench
    specjax run experiments/round_time_smollm2.py --dtype float32

The ratio of a round's time to that of an autoregressive step is what tokens_per_round must beat.

Record (2 CPU cores, AMD EPYC Zen 4 with AVX-512 bf16, jax 0.10.2, nothing else running; medians of 5 and min-max):

    nodes      1     2     4     8     12    16    32    64
    bfloat16   1.00  1.07  1.24  1.48  1.68  1.87  2.89  4.75   steps of 19.7 ms (19.3-21.3)
    float32    1.00  1.29  1.38  1.67  2.20  2.23  3.70  6.23   steps of 20.5 ms (20.0-22.6)

Before bfloat16 loops stopped copying the weights (100 ms a call) and attention reading free slots of the cache, its
step took 24.9 ms and 8 nodes 1.30 of them: the step has gained more than the round. Float32 products of 12 rows are
slower than those of 16, so that 12 nodes take 16 rows.

On an Intel Xeon with AVX-512 bf16 but no AMX (2 cores, jax 0.10.2, nothing else running):

    nodes      1     2     4     5     8     9     16    32    64
    bfloat16   1.00  1.07  1.26  1.36  1.60  1.81  2.46  4.20  7.29   steps of 23.6 ms (23.4-26.3)
    float32    1.00  1.47  1.56  1.88  1.85  2.43  2.48  4.09  5.57   steps of 23.5 ms (23.4-26.6)

There the layers' bfloat16 products take 18 ms with 2 rows (which a step has), 22 with 5 and 29 with 9; columns in place
of rows, weights laid out the other way and padded rows are no faster up to 12 rows. In profiles of the loops, one after
the other, all products take 30 of the 34 ms of a round of the demo's bfloat16 hybrid, and 23 of the 25 of an
autoregressive step: what is not a product could gain little. (Scripts and profiles that were not kept.)

Without AVX-512 (Zen 3, float32, an earlier state) 2, 4, 8 and 16 nodes cost 1.47, 1.50, 1.96 and 2.67 steps of 21.5
ms. A step's products are matrix-vector ones that read the weights at 27 GB/s; those of a round are YNNPACK's (the
MLP's first one reads them at 17 GB/s with 4 rows), and 6 and 12 rows take as long as 8 and more than 16. What did not
help, tried on matrices of 3072 x 576: weights laid out the other way (1.4 to 1.8 times as slow at 4 to 16 rows),
Eigen in place of YNNPACK, one matrix-vector product per row, a multiplication and a reduction fused with
reassociation allowed. Widening bfloat16 weights inside YNNPACK's product, with float32 rows, makes rounds nearly flat
(4, 8 and 16 nodes of SmolLM2 cost 1.1, 1.3 and 1.7 steps), but only as its step is slow: 35 ms.
"""

from specjax.studies.round_time import RoundTime


def get_config() -> RoundTime:
    return RoundTime(name="round_time_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
