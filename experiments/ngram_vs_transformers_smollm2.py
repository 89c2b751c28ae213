"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, torch 2.13, transformers 5.23, float32, nothing else running): 10
prompts, 128 tokens, each against its own decoding without lookup, median (min-max over prompts):

    method                          tokens per forward   speed-up           same text
    n-grams, chain of 10            1.854                0.74 (0.61-1.55)   10 of 10
    n-grams, chain of 7             1.817                1.03 (0.90-2.16)   10 of 10
    n-grams, chain of 3             1.667                1.22 (1.06-1.98)   10 of 10
    transformers, lookup of 10      1.814                0.91 (0.71-2.14)   10 of 10

The chain of 7 matches transformers' lookup of 10 in tokens per forward (589 against 590 forwards) and has the better
median speed-up; drafting 10 on both sides, ours has the better tokens per forward and theirs the better speed-up.
transformers was timed with 10 alone here (`--lookups 10`); its other lengths have not been measured yet.
"""

from specjax.analysis.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
