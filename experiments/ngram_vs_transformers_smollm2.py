"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

    specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

10 prompts of 128 tokens, each side against its own decoding without lookup; some minutes. Expect the same texts, 1.6
to 1.8 tokens per forward on both sides, and speed-ups of 1.2 to 1.3 for ours in float32.
"""

from specjax.studies.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
