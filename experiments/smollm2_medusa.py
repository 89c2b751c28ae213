"""SmolLM2-135M-Instruct with and without Medusa heads: the demo.

    make demo
    specjax run experiments/smollm2_medusa.py   (10 prompts of 64 tokens)
    specjax run experiments/smollm2_medusa.py --prompts.per-category None --decoding.max-new-tokens 128
    specjax run experiments/smollm2_medusa.py --prompts FILE   (Spec-Bench JSONL)

In float32 the output is the same, token for token. The Medusa trees are the walk search's on the table beside the
heads, of the size that this machine decodes fastest: rounds of 4, 6 and 8 nodes are timed in each dtype. The hybrids
put drafts copied from the text beside Medusa's: in bfloat16 one after a match of one token and four after a longer one
beside four, which has the highest median speed-up, on other prompts and with the first heads, of the three of twelve
that commit more than 1.7 tokens a round (`hybrid_trees_smollm2.py`); in float32, whose rounds cost as much with 5 rows
as with 8, four after a match of at least two beside three, chosen by counting accepted drafts on those prompts (the
demo's own counts lay beside them; the script was not kept).

Record of `make demo` (2 CPU cores, AMD EPYC Zen 3 without AVX-512, jax 0.10.2, nothing else running but for half a
minute of git and a small script; the result is in `records`): 10 prompts of 64 tokens, 6:58 without installation;
median (min-max over prompts), against autoregressive decoding in the same dtype (22.5 tokens a second in float32, 21.1
in bfloat16):

    method             dtype      nodes  tokens/round  accepted/round  speed-up          same output
    medusa             float32    4      1.38          0.38            1.04 (0.71-1.20)  10 of 10
    ngram+medusa       float32    8      1.65          0.65            1.15 (0.71-2.05)  10 of 10
    medusa_bf16        bfloat16   6      1.50          0.50            1.06 (0.81-1.39)  8 of 10
    ngram+medusa_bf16  bfloat16   9      1.72          0.72            1.19 (0.71-1.59)  7 of 10

Over float32's baseline the last two are at 1.00 (0.75-1.17) and 1.10 (0.63-1.52): medians of ratios, prompt by prompt.

`make demo` once more, on the same kind of machine, when programs were traced and compiled faster (5:50, nothing else
running; `result_second_run_zen3.json`):

    medusa             float32    4      1.38          0.38            0.96 (0.73-1.10)  10 of 10
    ngram+medusa       float32    8      1.65          0.65            1.08 (0.74-1.93)  10 of 10
    medusa_bf16        bfloat16   4      1.38          0.38            1.12 (0.81-1.32)  9 of 10
    ngram+medusa_bf16  bfloat16   9      1.72          0.72            1.15 (0.73-1.88)  7 of 10

Over float32's baseline the last two at 1.02 and 1.06. A third time (5:24, nothing else running;
`result_third_run_zen3.json`):

    medusa             float32    8      1.56          0.56            0.96 (0.65-1.12)  10 of 10
    ngram+medusa       float32    8      1.65          0.65            1.00 (0.68-1.73)  10 of 10
    medusa_bf16        bfloat16   6      1.50          0.50            1.11 (0.79-1.44)  8 of 10
    ngram+medusa_bf16  bfloat16   9      1.72          0.72            1.17 (0.74-1.81)  7 of 10

Over float32's baseline the last two at 0.96 and 1.00. A fourth time, later (6:00, nothing else running;
`result_fourth_run_zen3.json`; 22.6 tokens a second in float32, 19.4 in bfloat16):

    medusa             float32    4      1.38          0.38            0.94 (0.74-1.16)  10 of 10
    ngram+medusa       float32    8      1.65          0.65            1.00 (0.72-1.85)  10 of 10
    medusa_bf16        bfloat16   6      1.50          0.50            1.18 (0.83-1.43)  8 of 10
    ngram+medusa_bf16  bfloat16   9      1.72          0.72            1.31 (0.76-2.44)  7 of 10

Over float32's baseline the last two at 0.98 and 1.06: bfloat16's baseline was slower than in the other runs (both were
slower than in the third). Speed-ups of runs on this kind of machine differ by more than a tenth; what the new heads
bring is seen in tokens per round.

The same heads on an Intel Xeon with AVX-512 bf16 but no AMX (3:00, nothing else running; `result_xeon.json`; 38.7
tokens a second in float32, 39.4 in bfloat16):

    medusa             float32    4      1.38          0.38            0.91 (0.71-1.20)  10 of 10
    ngram+medusa       float32    8      1.65          0.65            1.02 (0.65-1.68)  10 of 10
    medusa_bf16        bfloat16   4      1.39          0.39            1.15 (0.86-1.33)  7 of 10
    ngram+medusa_bf16  bfloat16   9      1.72          0.72            1.14 (0.83-1.98)  8 of 10

Over bfloat16's baseline the first two at 0.93 and 1.01. Twice more, an hour later (2:57 and 2:55, nothing else running;
`result_second_run_xeon.json`, `result_third_run_xeon.json`), in the table's order: 0.95, 0.97, 1.15, 1.15 and 0.97,
1.02, 1.17, 1.17; over the faster baseline 0.95, 0.97, 1.14, 1.14 and 0.93, 0.98, 1.17, 1.17. Later that
day, in a fresh clone (2:51, nothing else running; `result_fourth_run_xeon.json`): 0.95, 0.99, 1.16, 1.17; over the
faster baseline 0.95, 0.99, 1.18, 1.18.

Half an hour before the first run on the Zen 3, there with the first heads (`train_smollm2_medusa.py`;
`result_first_heads_zen3.json`; files read beside it; 6:31):

    medusa             float32    4      1.36          0.36            0.97 (0.71-1.38)  10 of 10
    ngram+medusa       float32    8      1.63          0.63            1.11 (0.66-1.74)  10 of 10
    medusa_bf16        bfloat16   6      1.43          0.43            1.00 (0.89-1.26)  8 of 10
    ngram+medusa_bf16  bfloat16   9      1.70          0.70            1.08 (0.84-2.19)  8 of 10

Over float32's baseline the last two at 0.88 and 0.97. The same on an earlier day: 0.88, 1.07, 1.04 (0.91) and 1.20
(1.03), and before that (trees of 4 or 8 nodes, in bfloat16 set to 6) 0.94, 1.09, 1.02 (0.91) and 1.17 (1.05).

With the first heads on an AMD EPYC Zen 4 with AVX-512 bf16 (`result_first_heads_zen4.json`; nothing else running; 2:57
without installation), against the same dtype's baseline (44.5 tokens a second in float32, 44.7 in bfloat16):

    medusa             float32    4      1.36          0.36            1.01 (0.78-1.22)  10 of 10
    ngram+medusa       float32    8      1.63          0.63            1.11 (0.76-1.90)  10 of 10
    medusa_bf16        bfloat16   6      1.43          0.43            1.13 (0.85-1.37)  7 of 10
    ngram+medusa_bf16  bfloat16   9      1.71          0.71            1.31 (0.84-1.97)  7 of 10

Over bfloat16's baseline the first two are at 0.99 (0.79-1.23) and 1.15 (0.77-1.89). Other runs on such machines, in the
table's order: 1.01, 1.13, 1.13, 1.28 (that day, files read beside it), 0.99, 1.12, 1.13, 1.29 and 1.06, 1.12, 1.16,
1.33 (another day; the bfloat16 Medusa tree was set to 6 nodes there).

On an Intel Xeon with AMX (`result_first_heads_amx.json`; nothing else running; 5:03 without installation), against the
same dtype's baseline (32.5 tokens a second in either):

    medusa             float32    4      1.36          0.36            0.89 (0.70-1.12)  10 of 10
    ngram+medusa       float32    8      1.63          0.63            0.98 (0.68-1.70)  10 of 10
    medusa_bf16        bfloat16   6      1.43          0.43            1.34 (0.89-1.58)  6 of 10
    ngram+medusa_bf16  bfloat16   9      1.70          0.70            1.49 (0.92-2.09)  8 of 10

Over float32's baseline the last two are at 1.27 (0.85-1.64) and 1.54. An earlier run that day: 0.87, 1.06, 1.27 and
1.38 (0.83-2.50).
"""

from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts


def get_config() -> DecodeExperiment:
    heads = "smollm2-135m-instruct"
    return DecodeExperiment(
        name="smollm2_medusa",
        model="smollm2-135m-instruct",
        methods=(
            Method("autoregressive", dtype="float32"),
            Method("medusa", dtype="float32", heads=heads),
            Method(
                "ngram+medusa",
                dtype="float32",
                heads=heads,
                drafter="ngram+medusa",
                tree="chain:4+paths:0,1,0.0",
                options={"min_n": 2, "reach": ()},
            ),
            Method("autoregressive_bf16"),
            Method("medusa_bf16", heads=heads),
            Method(
                "ngram+medusa_bf16",
                heads=heads,
                drafter="ngram+medusa",
                tree="chain:4+paths:0,1,2,0.0",
                options={"reach": (1,)},
            ),
        ),
        prompts=Prompts(per_category=2),
        decoding=Decoding(max_new_tokens=64),
        tree_sizes=(4, 6, 8),
    )
