"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

Record (2 CPU cores, AMD EPYC Zen 4, jax 0.10.2, torch 2.13, transformers 5.23, float32, nothing else running): 10
prompts, 128 tokens, each against its own decoding without lookup, speed-ups median (min-max over prompts):

    drafts   tokens per forward    speed-up
             n-grams   theirs      n-grams            theirs
    10       1.854     1.814       0.82 (0.63-1.68)   1.00 (0.69-1.89)
    7        1.817     1.772       1.15 (0.86-2.33)   1.18 (0.93-2.27)
    3        1.667     1.631       1.28 (0.92-2.09)   1.05 (0.87-1.78)

All texts are the same as without lookup. At equal length our tokens per forward are the better ones. The best speed-up
of ours, 1.28 with 3 drafts, is above the best of theirs, 1.18 with 7; against their usual length of 10, our 7 have as
many tokens per forward and 1.15 to 1.00. At 7 the two speed-ups differ by less than the spread, and 10 of ours are
slower than 10 of theirs: the root and its drafts make 11 rows, an expensive number for XLA:CPU's products. The lengths
7 and 3 were tried on these prompts.

On a Zen 3 (AVX2), 10 and 7 drafts: ours 0.77 (0.60-1.59) and 1.08 (0.84-2.08), theirs 0.90 (0.71-2.11) and 1.06
(0.85-2.29).
"""

from specjax.analysis.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
