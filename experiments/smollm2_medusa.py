"""SmolLM2-135M-Instruct with and without Medusa heads: the demo.

    make demo
    specjax run experiments/smollm2_medusa.py   (10 prompts of 64 tokens)
    specjax run experiments/smollm2_medusa.py --prompts.per-category None --decoding.max-new-tokens 128
    specjax run experiments/smollm2_medusa.py --prompts FILE   (Spec-Bench JSONL)

In float32 the output is the same, token for token; its Medusa tree is the one that this machine decodes fastest,
chosen by timing rounds of several sizes. `ngram+medusa` adds a chain of three drafts copied from the text to four
Medusa nodes.

Record (2 CPU cores, AMD EPYC Zen 4 with AVX-512 bf16, jax 0.10.2, nothing else running), --prompts.per-category 3: 15
prompts of 64 tokens, median (min-max over prompts), against autoregressive decoding in the same dtype:

    method             dtype      nodes  tokens/round  accepted/round  speed-up          same output
    medusa             float32    4      1.39          0.39            1.12 (0.78-1.40)  15 of 15
    ngram+medusa       float32    8      1.70          0.70            1.08 (0.65-1.73)  15 of 15
    medusa_bf16        bfloat16   6      1.47          0.47            1.15 (0.82-1.42)  11 of 15
    ngram+medusa_bf16  bfloat16   8      1.69          0.69            1.18 (0.74-1.95)  12 of 15

Bfloat16 is the faster dtype (47.1 tokens a second autoregressively, float32 43.4): against it the float32 methods are
at 1.03 (0.73-1.32) and 1.01 (0.61-1.61).

`make demo` itself there, 10 prompts, 2:46 without installation: ngram+medusa_bf16 1.72 tokens per round and 1.23
(0.77-2.06) against bfloat16's baseline, the fastest, 8 of 10 the same; medusa_bf16 1.43, 1.12 (0.84-1.37), 7 of 10;
float32 Medusa with 4 nodes 1.36, 0.92 (0.80-1.18), ngram+medusa 1.72, 1.01 (0.69-1.76), 10 of 10 each.

Other hybrids in bfloat16 on the same prompts, in one run before attention read only the filled part of the cache and
before bfloat16 copied no weights: the demo's had 1.11 (0.75-1.79) there, 3 copied drafts beside 2 Medusa nodes 1.59
tokens per round and 1.20 (0.78-2.20), 7 beside 8 nodes 1.87 and 0.93 (0.59-2.03).

Without AVX-512 (Zen 3, an earlier state): Medusa in float32 with 4 nodes 1.39 tokens per round, 1.04 (0.78-1.28),
ngram+medusa 1.70, 0.98 (0.65-1.68); medusa_bf16 1.46, 1.07 (0.81-1.34), 0.80 (0.55-0.95) against float32's baseline. On
a Zen 5, with heads trained on 436,000 tokens, 50 prompts of 128 tokens: medusa in bfloat16 with 6 nodes 1.46, 1.22
(0.83-1.57).
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
                "ngram+medusa",
                dtype="float32",
                heads=heads,
                drafter="ngram+medusa",
                tree="chain:4+paths:0,1,0.0",
                min_n=2,
                reach=(),
            ),
            Method("autoregressive_bf16"),
            Method("medusa_bf16", heads=heads, tree="paths:0,1,2,0.0,0.1"),
            Method(
                "ngram+medusa_bf16", heads=heads, drafter="ngram+medusa", tree="chain:4+paths:0,1,2,0.0", reach=(1,)
            ),
        ),
        prompts=Prompts(per_category=2),
        decoding=Decoding(max_new_tokens=64),
        tree_sizes=(4, 8),
    )
