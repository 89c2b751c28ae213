"""SmolLM2-135M-Instruct with and without Medusa heads: the demo.

    make demo
    specjax run experiments/smollm2_medusa.py   (10 prompts of 64 tokens)
    specjax run experiments/smollm2_medusa.py --prompts.per-category None --decoding.max-new-tokens 128

In float32 the output is the same, token for token. The Medusa trees are of the size, of 4, 6 and 8 nodes, that this
machine decodes fastest in each dtype; the hybrids put drafts copied from the text beside Medusa's, in trees that were
chosen on other prompts. Three minutes on 2 cores with AVX-512, six without. Expect 1.4 tokens a round with 4 nodes
and 1.7 with the bfloat16 hybrid, whose speed-up is 1.1 to 1.5, by the CPU.
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
