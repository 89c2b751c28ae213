"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)
"""

from specjax.analysis.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
