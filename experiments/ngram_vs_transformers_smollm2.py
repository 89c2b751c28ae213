"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

Record (2 CPU cores, AMD EPYC Zen 4, jax 0.10.2, torch 2.13, transformers 5.23, float32, nothing else running; the
result is in `records`): 10 prompts, 128 tokens, each against its own decoding without lookup, speed-ups median (min-max
over prompts):

    drafts   tokens per forward    speed-up
             n-grams   theirs      n-grams            theirs
    10       1.854     1.814       0.95 (0.75-1.91)   1.07 (0.66-2.43)
    7        1.817     1.772       1.21 (0.97-2.30)   1.30 (0.86-2.65)
    5        1.754     1.720       1.17 (0.89-2.03)   1.15 (0.71-2.29)
    3        1.667     1.631       1.32 (1.11-2.07)   1.24 (0.85-1.97)

All texts are the same as without lookup. At equal length our tokens per forward are the better ones. The lengths that
five of the prompts choose are 3 for ours and 7 for theirs; on the other five these give 1.38 (1.21-1.90) and 1.32
(0.86-2.13), with 1.704 and 1.810 tokens per forward. So with each side at its best ours gains a little more, by less
than the spread, but commits fewer tokens per forward; at lengths of 7 and 10 theirs gains more. A round of 8 rows costs
1.67 float32 steps here, of 16 rows 2.23 (`round_time_smollm2.py`, with heads).

In bfloat16, drafts of 10 and 7, in an earlier run: ours 1.14 (0.81-4.83) and 1.24 (0.89-2.78), theirs 1.41 (1.02-3.30)
and 1.81 (0.92-3.59). These are ratios to each side's own step, and transformers warns that it casts in every product
there. 5 and 4 of our 10 texts are as without lookup, 1 of theirs.
"""

from specjax.analysis.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
