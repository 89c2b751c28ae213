"""Every drafter in one run: no drafter, a draft model (vanilla speculative decoding), n-grams, Medusa heads, hybrids.

    specjax run experiments/compare_drafters_smollm2.py

Record of an earlier state, whose attention read free slots of the cache and drew with one PRNG key for all prompts
(2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, float32, nothing else running): 20 prompts of 64 tokens, four of each
category, 15 minutes. Tokens per round (accepted: one less) and speed-up, median (min-max over prompts); all greedy
outputs are the same as without a drafter (20 of 20 each):

    drafter        nodes   T = 0                    T = 0.7                  T = 1
    vanilla        3       1.43  0.96 (0.77-1.28)   1.43  0.89 (0.73-1.20)   1.31  0.81 (0.71-0.97)
    draft tree     7       1.64  0.83 (0.59-0.99)   1.67  0.73 (0.59-0.98)   1.57  0.67 (0.61-0.88)
    ngram          4       1.26  1.00 (0.84-1.84)   1.16  0.92 (0.83-1.30)   1.10  0.92 (0.83-1.10)
    medusa         6       1.48  0.78 (0.56-0.93)   1.41  0.72 (0.55-0.88)   1.25  0.65 (0.52-0.82)
    ngram+medusa   8       1.69  0.93 (0.61-1.30)   1.60  0.85 (0.58-1.32)   1.32  0.70 (0.55-0.95)
    medusa+draft   8       1.68  0.88 (0.63-1.15)   1.61  0.73 (0.57-1.00)   1.53  0.75 (0.60-0.91)

The draft model's first token is accepted in 31% of the rounds at T = 0, 31% at 0.7 and 24% at 1 (vanilla); one of its
three first drafts in 46, 47 and 42% (draft tree). At T = 0 by category (chat, code, translation, long context, maths),
tokens per round and speed-up, medians of four prompts:

    vanilla        1.57 1.02   1.52 1.04   1.27 0.83   1.22 0.80   1.55 1.03
    ngram          1.20 0.99   1.15 1.00   1.03 0.96   1.68 1.35   1.24 1.01
    ngram+medusa   1.75 0.94   1.67 0.92   1.14 0.65   1.92 1.05   1.79 1.00
    medusa+draft   1.85 0.90   1.88 0.96   1.36 0.71   1.41 0.68   1.84 0.98

Without AVX-512 a round of eight nodes costs two steps, and no median over all prompts is
above 1. N-grams pay on long contexts, and lose little elsewhere (0.96 at least at T = 0; 0.92 over all prompts at 0.7
and 1): a round in which they find nothing is an autoregressive step.
"""

from typing import Any

from specjax.experiment import DecodeExperiment, Decoding, Method, Prompts

HEADS, DRAFT = "smollm2-135m-instruct", "smollm2-draft"
DRAFTERS: dict[str, dict[str, Any]] = {
    "vanilla": {"drafter": "draft", "tree": "chain:2"},
    "draft tree": {"drafter": "draft", "tree": "cartesian:3,1"},
    "ngram": {"drafter": "ngram", "tree": "chain:7"},
    "medusa": {"drafter": "medusa", "tree": "paths:0,1,0.0"},
    "ngram+medusa": {"drafter": "ngram+medusa", "tree": "chain:4+paths:0,1,0.0", "min_n": 2, "reach": ()},
    "medusa+draft": {"drafter": "medusa+draft", "tree": "paths:0,1,0.0+cartesian:2,1"},
}


def get_config() -> DecodeExperiment:
    methods = []
    for temperature in (0.0, 0.7, 1.0):
        suffix = f"_T{temperature:g}" if temperature else ""
        common: dict[str, Any] = {"dtype": "float32", "temperature": temperature}
        methods.append(Method("autoregressive" + suffix, **common))
        files = {"heads": HEADS, "draft_model": DRAFT}
        methods += [Method(name + suffix, **files, **drafter, **common) for name, drafter in DRAFTERS.items()]
    return DecodeExperiment(
        name="compare_drafters_smollm2",
        model="smollm2-135m-instruct",
        methods=tuple(methods),
        prompts=Prompts(per_category=4),
        decoding=Decoding(max_new_tokens=64),
    )
