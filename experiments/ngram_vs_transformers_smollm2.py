"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, torch 2.13, transformers 5.23, float32): 10 prompts, 128 tokens,
each against its own decoding without lookup, median (min-max over prompts); other work ran during the last prompts:

    method                          tokens per forward   speed-up           same text
    n-grams, chain of 10            1.854                0.66 (0.36-1.55)   10 of 10
    n-grams, chain of 3             1.667                1.16 (0.73-1.99)   10 of 10
    transformers, lookup of 10      1.814                0.82 (0.21-3.59)   10 of 10

The long chain has more tokens per forward than transformers, the short one the better speed-up; neither has both.
"""

from specjax.analysis.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
