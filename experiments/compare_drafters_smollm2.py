"""Every drafter in one run: no drafter, a draft model (vanilla speculative decoding), n-grams, Medusa heads, hybrids.

    specjax run experiments/compare_drafters_smollm2.py

Record (2 CPU cores, AMD EPYC Zen 3, jax 0.10.2, float32, nothing else running but for some editing in the first three
minutes; the result is in `records`): 20 prompts of 64 tokens, four of each category, 29 minutes. Tokens per round
(accepted: one less) and speed-up, median (min-max over prompts); all greedy outputs are the same as without a drafter
(20 of 20 each):

    drafter        nodes   T = 0                    T = 0.7                  T = 1
    vanilla        3       1.43  0.93 (0.67-1.23)   1.40  0.84 (0.57-1.17)   1.38  0.86 (0.54-1.02)
    draft tree     7       1.64  0.95 (0.66-1.27)   1.57  0.80 (0.52-1.06)   1.50  0.78 (0.65-1.15)
    ngram          8       1.28  0.99 (0.79-2.26)   1.20  0.93 (0.72-1.37)   1.10  0.89 (0.75-1.15)
    medusa         4       1.43  1.02 (0.79-1.47)   1.33  0.89 (0.64-1.17)   1.19  0.82 (0.69-1.03)
    ngram+medusa   8       1.64  1.08 (0.73-1.71)   1.48  0.92 (0.60-1.36)   1.23  0.81 (0.68-1.19)
    medusa+draft   8       1.69  0.94 (0.68-1.22)   1.60  0.78 (0.42-1.09)   1.48  0.74 (0.57-1.05)

The draft model's first token is accepted in 31% of the rounds at T = 0, 30% at 0.7 and 27% at 1 (vanilla); one of its
three first drafts in 46, 41 and 38% (draft tree). At T = 0 by category (chat, code, translation, long context, maths),
tokens per round and the median speed-up of four prompts:

    vanilla        1.57 0.95   1.52 1.06   1.27 0.93   1.22 0.79   1.55 1.02
    draft tree     1.87 1.04   1.79 1.00   1.40 0.89   1.38 0.75   1.75 1.06
    ngram          1.22 0.96   1.15 0.95   1.03 1.00   1.81 1.39   1.24 1.01
    medusa         1.47 1.03   1.56 1.14   1.10 0.88   1.31 0.94   1.58 1.19
    ngram+medusa   1.61 1.04   1.62 1.21   1.10 0.90   2.03 1.44   1.68 1.09
    medusa+draft   1.84 0.92   1.89 1.06   1.38 0.89   1.42 0.75   1.83 0.98

The draft model costs more than it saves here, and n-grams pay on long contexts and lose little elsewhere. The hybrid of
n-grams and Medusa, whose rounds are of four nodes where no two tokens repeat, is the fastest at T = 0; its tree was
chosen by counting, with the first heads, on ten prompts that are among these. The warmer the sampling, the less is
accepted: above T = 0 nothing pays.

With the first heads (`train_smollm2_medusa.py`) on a Zen 4 with AVX-512 bf16 (`result_first_heads_zen4.json`; beside a
text search for some of the time; 14 minutes), in the same order at T = 0: 0.99, 1.01, 1.01, 1.01 (1.40 tokens per
round), 1.12 (1.61) and 0.97 (1.68); at T = 0.7 Medusa 1.06 and the hybrid 1.02; at T = 1 nothing pays.
"""

from typing import Any

from specjax.studies.decode import DecodeExperiment, Decoding, Method, Prompts

HEADS, DRAFT = "smollm2-135m-instruct", "smollm2-draft"
DRAFTERS: dict[str, dict[str, Any]] = {
    "vanilla": {"drafter": "draft", "tree": "chain:2"},
    "draft tree": {"drafter": "draft", "tree": "cartesian:3,1"},
    "ngram": {"drafter": "ngram", "tree": "chain:7"},
    "medusa": {"drafter": "medusa", "tree": "paths:0,1,0.0"},
    "ngram+medusa": {"drafter": "ngram+medusa", "tree": "chain:4+paths:0,1,0.0", "options": {"min_n": 2, "reach": ()}},
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
