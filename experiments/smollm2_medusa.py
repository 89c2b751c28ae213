"""SmolLM2-135M-Instruct with and without Medusa heads: the demo.

    make demo
    specjax run experiments/smollm2_medusa.py   (10 prompts of 64 tokens)
    specjax run experiments/smollm2_medusa.py --prompts.per-category None --decoding.max-new-tokens 128
    specjax run experiments/smollm2_medusa.py --prompts FILE   (Spec-Bench JSONL)

In float32 the output is the same, token for token; its Medusa tree is the one that this machine decodes fastest,
chosen by timing rounds of several sizes. `ngram+medusa` adds a chain of three drafts copied from the text to four
Medusa nodes; in bfloat16 it has not been measured yet.

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2), --prompts.per-category 3: 15 prompts of 64 tokens, median
(min-max over prompts), against autoregressive decoding in the same dtype:

    method         dtype      nodes  tokens/round  accepted/round  speed-up          same output
    medusa         float32    4      1.39          0.39            1.04 (0.78-1.28)  15 of 15
    ngram+medusa   float32    8      1.70          0.70            0.98 (0.65-1.68)  15 of 15
    medusa_bf16    bfloat16   6      1.46          0.46            1.07 (0.81-1.34)  13 of 15

Against float32, the faster baseline there, medusa_bf16 is at 0.80 (0.55-0.95): float32 decodes 42.9 tokens a second
autoregressively, bfloat16 32.4, whose products are slow without AVX-512. A round of 2, 4, 8 and 16 nodes costs 1.52,
1.56, 2.02 and 2.80 float32 steps (19.8 ms, in which the weights are read at 27 GB/s), so that 1.7 tokens per round
are not worth 8 nodes there. The aim of a speed-up above 1.2 is not reached on this machine.

`make demo` itself there (10 prompts, trees of 4 and 8 nodes timed; the record's run timed 2 too): 2:57 without
installation; float32 Medusa 1.36 tokens per round, 0.97 (0.60-1.12), ngram+medusa 1.72, 0.94 (0.53-1.65), 10 of 10 the
same; medusa_bf16 1.41, 1.00 (0.78-1.30), 8 of 10.

Earlier record (AMD EPYC Zen 5, AVX-512 bf16), with heads trained on 436,000 tokens and weights in another layout, 50
prompts of 128 tokens: medusa in bfloat16 with 6 nodes 1.46 tokens per round, speed-up 1.22 (0.83-1.57), 34 of 50 the
same.
"""

from specjax.experiment import DecodeExperiment, Decoding, Method, Prompts


def get_config() -> DecodeExperiment:
    heads = "smollm2-135m-instruct"
    return DecodeExperiment(
        name="smollm2_medusa",
        model="smollm2-135m-instruct",
        methods=(
            Method("autoregressive", dtype="float32"),
            Method("medusa", dtype="float32", heads=heads),
            Method(
                "ngram+medusa", dtype="float32", heads=heads, drafter="ngram+medusa", tree="chain:3+paths:0,1,2,0.0"
            ),
            Method("autoregressive_bf16"),
            Method("medusa_bf16", heads=heads, tree="paths:0,1,2,0.0,0.1"),
            Method("ngram+medusa_bf16", heads=heads, drafter="ngram+medusa", tree="chain:3+paths:0,1,2,0.0"),
        ),
        prompts=Prompts(per_category=2),
        decoding=Decoding(max_new_tokens=64),
        tree_sizes=(4, 8),
    )
