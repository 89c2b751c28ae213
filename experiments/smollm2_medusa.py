"""SmolLM2-135M-Instruct with and without Medusa heads: the demo.

    make demo
    specjax run experiments/smollm2_medusa.py   (20 prompts of 64 tokens)
    specjax run experiments/smollm2_medusa.py --prompts.per-category None --decoding.max-new-tokens 128
    specjax run experiments/smollm2_medusa.py --prompts FILE   (Spec-Bench JSONL)

The tree is the one that this machine decodes fastest, chosen by timing rounds of several sizes (heads' accuracies on
held-out text against measured cost). bfloat16 is what one would decode with; float32 shows that the output is the same,
for which any tree will do.
"""

from specjax.experiment import DecodeExperiment, Decoding, Method, Prompts


def get_config() -> DecodeExperiment:
    heads = "smollm2-135m-instruct"
    return DecodeExperiment(
        name="smollm2_medusa",
        model="smollm2-135m-instruct",
        methods=(
            Method("autoregressive"),
            Method("medusa", heads=heads),
            Method("autoregressive_f32", dtype="float32"),
            Method("medusa_f32", dtype="float32", heads=heads, tree="cartesian:2,1"),
        ),
        prompts=Prompts(per_category=4),
        decoding=Decoding(max_new_tokens=64),
        tree_sizes=(2, 4, 6, 8, 12),
    )
