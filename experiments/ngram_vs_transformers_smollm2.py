"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, torch 2.13, transformers 5.23, float32, nothing else running),
--trees chain:10 chain:7 --lookups 10 7: 10 prompts, 128 tokens, each against its own decoding without lookup, median
(min-max over prompts):

    drafts   forwards for 1,070 tokens     tokens per forward    speed-up
             n-grams   transformers        n-grams   theirs      n-grams            theirs
    10       577       590                 1.854     1.814       0.77 (0.60-1.59)   0.90 (0.71-2.11)
    7        589       604                 1.817     1.772       1.08 (0.84-2.08)   1.06 (0.85-2.29)

All texts are the same as without lookup. At equal length our tokens per forward are the better ones; our speed-up is
better with 7 drafts, by less than the spread, and worse with 10, where the root and its drafts make 11 rows. In another
run a chain of 3 had 1.667 tokens per forward and 1.22 (1.06-1.98); transformers' lookup of 3 has not been measured. The
lengths 7 and 3 were tried on these prompts.
"""

from specjax.analysis.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
