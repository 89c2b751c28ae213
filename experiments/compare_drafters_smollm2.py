"""Every drafter in one run: no drafter, a draft model (vanilla speculative decoding), n-grams, Medusa heads, hybrids.

    specjax run experiments/compare_drafters_smollm2.py

Record (2 CPU cores, AMD EPYC Zen 4, jax 0.10.2, float32, beside a text search for some of the time, otherwise nothing
else running; the result is in `records`): 20 prompts of 64 tokens, four of each category, 14 minutes. Tokens per round
(accepted: one less) and speed-up, median (min-max over prompts); all greedy outputs are the same as without a drafter
(20 of 20 each):

    drafter        nodes   T = 0                    T = 0.7                  T = 1
    vanilla        3       1.43  0.99 (0.75-1.44)   1.40  0.96 (0.62-1.28)   1.38  0.92 (0.64-1.26)
    draft tree     7       1.64  1.01 (0.68-1.38)   1.57  0.90 (0.56-1.09)   1.50  0.90 (0.54-1.17)
    ngram          8       1.28  1.01 (0.72-2.45)   1.20  0.99 (0.80-1.34)   1.10  0.91 (0.77-1.32)
    medusa         4       1.40  1.01 (0.77-1.38)   1.32  1.06 (0.64-1.40)   1.19  0.88 (0.72-1.27)
    ngram+medusa   8       1.61  1.12 (0.80-1.98)   1.44  1.02 (0.63-1.39)   1.24  0.90 (0.69-1.21)
    medusa+draft   8       1.68  0.97 (0.73-1.28)   1.52  0.82 (0.54-1.24)   1.50  0.83 (0.57-1.07)

The draft model's first token is accepted in 31% of the rounds at T = 0, 30% at 0.7 and 27% at 1 (vanilla); one of its
three first drafts in 46, 41 and 38% (draft tree). At T = 0 by category (chat, code, translation, long context, maths),
tokens per round and speed-up, medians of four prompts:

    vanilla        1.57 1.10   1.52 1.05   1.27 0.87   1.22 0.86   1.55 1.14
    draft tree     1.87 1.14   1.79 1.02   1.40 0.91   1.38 0.78   1.75 1.09
    ngram          1.22 1.07   1.15 0.97   1.03 0.99   1.81 1.48   1.24 1.00
    medusa         1.48 1.16   1.47 1.02   1.08 0.88   1.28 0.94   1.59 1.08
    ngram+medusa   1.64 1.23   1.51 1.05   1.08 0.86   2.00 1.35   1.71 1.22
    medusa+draft   1.85 1.11   1.88 1.04   1.36 0.91   1.41 0.83   1.84 1.14

A round of eight nodes costs 1.7 float32 steps here (`round_time_smollm2.py`), and the draft model some more: the hybrid
of n-grams and Medusa, whose rounds are of four nodes where no two tokens repeat, is the only one above 1.1. Its tree
was chosen by counting on ten prompts that are among these. N-grams pay on long contexts and lose little elsewhere. The
warmer the sampling, the less is accepted; at T = 1 nothing pays.
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
