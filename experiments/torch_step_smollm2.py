"""The Medusa-1 training step beside a plain PyTorch one: SmolLM2's width, four heads, 8,192 rows of its LM head.

    specjax run experiments/torch_step_smollm2.py   (needs torch: `make test` installs it)

A step is 1,024 positions: forward, backward, clipping and AdamW. Record (2 CPU cores, AMD EPYC Zen 4 with AVX-512 bf16,
nothing else running, jax 0.10.2, torch 2.13), 5 alternating repeats, median (min-max); losses equal to 1e-5:

    positions  rows     dtype      positions/s  PyTorch's  ratio
    1,024      8,192    float32    2221         2124       1.04 (1.04-1.08)
    1,024      8,192    bfloat16   3819         3970       0.96 (0.94-1.00)
    2,048      8,192    float32    2143         1819       1.19 (1.13-1.21)
    2,048      8,192    bfloat16   3813         3293       1.17 (1.13-1.24)
    4,096      8,192    float32    2140         1454       1.48 (1.29-1.51)
    4,096      8,192    bfloat16   3815         2336       1.65 (1.62-1.71)
    1,024      49,152   float32    328          227        1.44 (1.15-1.64)   the whole vocabulary
    1,024      49,152   bfloat16   536          352        1.51 (1.37-1.81)

Our step takes chunks of positions whose logits stay in the cache, so that its speed hardly depends on the size;
PyTorch's falls once a head's logits (32 MB at the first size) outgrow the machine's 32 MB of level-3 cache. The aim of
1.2 is reached here with 4,096 positions and with the whole vocabulary, and missed with fewer positions over 8,192 rows
(our heads were trained with 1,024). There the products bound both sides: a step of 1,024 has 83 GFLOP, which ours does
at 179 GFLOP/s in float32 and 308 in bfloat16, and lone products of these shapes reach at best 200 and 370 here
(PyTorch's 200 and 408).

Without AVX-512 (2 CPU cores, AMD EPYC Zen 3, nothing else running), float32, 5 repeats, 4 for the whole vocabulary:

    1,024      8,192    float32    1142         1033       1.15 (0.82-1.21)
    2,048      8,192    float32    1108         1029       1.06 (0.96-1.28)
    4,096      8,192    float32    1315         880        1.47 (1.40-1.69)
    1,024      49,152   float32    172          147        1.19 (1.15-1.21)

On another day, on such a machine with nothing else running, 15 repeats (`--dtypes float32 --repeats 15`):

    1,024      8,192    float32    1197         1093       1.12 (0.83-1.27)
    2,048      8,192    float32    1281         958        1.32 (1.11-1.54)

And on a third one, the same way, all sizes within a quarter of an hour:

    1,024      8,192    float32    1403         1207       1.16 (1.07-1.21)
    2,048      8,192    float32    1329         1039       1.29 (1.17-1.49)
    4,096      8,192    float32    1318         936        1.41 (1.28-1.54)

So at 2,048, the trainer's default, the aim is reached in both of the longer runs there, and not in the one of 5. Ours
goes at 79 to 113 GFLOP/s; a step with nothing but its products, no softmax, is no faster (1,291 positions a second
beside 1,281, 9 alternating repeats with 1,024; script not kept), nor are chunks of another size or a transposed
projection: the products bound it. Beside other work the ratio with 1,024 was 1.47 (1.08-1.99) over 7 repeats; on one
core, in CPU time, 1.29 in each of 3. Products in bfloat16 are emulated there: torch then takes tens of seconds a step,
ours longer than in float32.

On an Intel Xeon with AVX-512 bf16 but no AMX, whose level-3 cache has 260 MB (2 CPU cores, nothing else running), 9
repeats, 5 for the whole vocabulary:

    1,024      8,192    float32    2838         2809       1.00 (0.92-1.03)
    1,024      8,192    bfloat16   1748         1719       1.02 (0.99-1.06)
    2,048      8,192    float32    2804         2585       1.09 (1.03-1.15)
    2,048      8,192    bfloat16   1766         1597       1.10 (1.09-1.12)
    4,096      8,192    float32    2810         2456       1.14 (1.11-1.18)
    4,096      8,192    bfloat16   1782         1555       1.14 (1.12-1.17)
    1,024      49,152   float32    384          418        0.91 (0.88-0.95)
    1,024      49,152   bfloat16   268          268        1.00 (0.99-1.01)
    2,048      49,152   float32    375          413        0.91 (0.90-0.93)
    2,048      49,152   bfloat16   255          251        1.02 (0.99-1.09)

There the aim is missed at every size, and with the whole vocabulary PyTorch is the faster in float32. Its gradient
products are: lone float32 ones of these shapes reach 210 to 259 GFLOP/s in XLA's way and 275 to 315 in PyTorch's (the
logits' 210 to 277 and 193 to 247; script not kept). Our step does 227 to 229 with 8,192 rows and 172 to 176 with the
whole vocabulary; what takes the rest there was not looked into. Chunks of another size change nothing: 2,757 to 2,807
positions a second with 64 to 512 positions and 8,192 rows, 373 to 380 with 64 to 213 and the whole vocabulary (5
repeats by turns, script not kept). Products in bfloat16, the trainer's default, are slower there than in float32 on
both sides: `compute="float32"` is the better choice. This day's results and the third day's are in `records`.
"""

from specjax.studies.torch_step import TorchStep


def get_config() -> TorchStep:
    return TorchStep(name="torch_step_smollm2", model="smollm2-135m-instruct")
