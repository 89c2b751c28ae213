"""Every drafter in one run: no drafter, a draft model (vanilla speculative decoding), n-grams, Medusa heads, hybrids.

    specjax run experiments/compare_drafters_smollm2.py

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, float32), --prompts.per-category 1: 5 prompts of 64 tokens, one
of each category. Tokens per round (accepted: one less) and speed-up, median (min-max over prompts); all greedy
outputs are the same as without a drafter (5 of 5 each):

    drafter        nodes   T = 0                    T = 0.7                  T = 1
    vanilla        3       1.40  0.93 (0.72-1.31)   1.50  0.97 (0.83-1.09)   1.32  0.83 (0.80-0.85)
    draft tree     7       1.59  0.80 (0.53-1.06)   1.71  0.83 (0.64-0.96)   1.49  0.68 (0.62-0.79)
    ngram          4       1.39  1.00 (0.65-1.89)   1.33  0.90 (0.73-1.28)   1.13  0.84 (0.72-0.86)
    medusa         6       1.41  0.71 (0.49-0.99)   1.39  0.68 (0.61-0.91)   1.32  0.66 (0.61-0.81)
    ngram+medusa   8       1.72  0.91 (0.53-1.39)   1.78  0.85 (0.80-1.38)   1.44  0.77 (0.72-0.92)
    medusa+draft   8       1.59  0.86 (0.54-1.14)   1.57  0.73 (0.65-1.04)   1.56  0.77 (0.63-0.82)

At T = 0 by category (chat, code, translation, long context, maths): ngram 1.54 1.12 1.00 2.52 1.26, ngram+medusa 1.75
1.66 1.06 2.42 1.85, draft tree 1.85 1.70 1.21 1.31 1.97. Without AVX-512 a round of eight nodes costs two steps, and
no drafter pays on average; n-grams do on long contexts (1.89).
"""

from specjax.experiment import DecodeExperiment, Decoding, Method, Prompts

HEADS, DRAFT = "smollm2-135m-instruct", "smollm2-draft"
DRAFTERS = {  # name -> (drafter, tree)
    "vanilla": ("draft", "chain:2"),
    "draft tree": ("draft", "cartesian:3,1"),
    "ngram": ("ngram", "chain:3"),
    "medusa": ("medusa", "paths:0,1,2,0.0,0.1"),
    "ngram+medusa": ("ngram+medusa", "chain:2+paths:0,1,2,0.0,0.1"),
    "medusa+draft": ("medusa+draft", "paths:0,1,0.0+cartesian:2,1"),
}


def get_config() -> DecodeExperiment:
    methods = []
    for temperature in (0.0, 0.7, 1.0):
        suffix = f"_T{temperature:g}" if temperature else ""
        settings = {"dtype": "float32", "temperature": temperature}
        methods.append(Method("autoregressive" + suffix, **settings))
        methods += [
            Method(name + suffix, heads=HEADS, tree=tree, drafter=kind, draft_model=DRAFT, **settings)
            for name, (kind, tree) in DRAFTERS.items()
        ]
    return DecodeExperiment(
        name="compare_drafters_smollm2",
        model="smollm2-135m-instruct",
        methods=tuple(methods),
        prompts=Prompts(per_category=4),
        decoding=Decoding(max_new_tokens=64),
    )
