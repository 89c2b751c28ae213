"""The n-gram drafter beside transformers' prompt lookup, on long contexts (the prompts of that category that ship).

specjax run experiments/ngram_vs_transformers_smollm2.py   (needs torch and transformers: `make test` installs them)

Record (2 CPU cores, AMD EPYC Zen 4, jax 0.10.2, torch 2.13, transformers 5.23, float32, nothing else running; the
result is in `records`): 10 prompts, 128 tokens, each against its own decoding without lookup, speed-ups median (min-max
over prompts):

    drafts   tokens per forward    speed-up
             n-grams   theirs      n-grams            theirs
    10       1.817     1.814       1.24 (0.97-2.37)   0.98 (0.77-1.91)
    7        1.798     1.772       1.27 (0.90-2.50)   1.18 (0.84-2.22)
    5        1.734     1.720       1.19 (0.99-2.10)   1.06 (0.76-1.87)
    3        1.667     1.631       1.31 (1.04-1.98)   1.09 (0.89-1.63)

All texts are the same as without lookup. At equal length our tokens per forward and our median speed-up are the better
ones. (Ours drafts at most so many tokens: 3 after a match of one token, 7 after two, then all; these two numbers were
chosen on these prompts.) The lengths that five of the prompts choose are 3 for ours and 7 for theirs; on the other five
these give 1.37 (1.04-1.90) and 1.28 (0.84-2.22), with 1.704 and 1.810 tokens per forward.

Medians vary by a tenth between runs: in a second one, beside some editing, ours were 1.31, 1.25, 1.21 and 1.28, theirs
0.85, 1.11, 1.01 and 1.15. In an earlier state, without reach (`--reach` with nothing behind it), ours were 0.95 (10,
1.854 tokens per forward), 1.21 (7, 1.817), 1.17 (5, 1.754) and 1.32 (3), theirs 1.07, 1.30, 1.15 and 1.24. What the
reach is worth within one run of ours alone: a chain of 7 drafted whole after any match 1.16 (0.92-2.52), with reach
1.31 (0.98-2.62).

In bfloat16, drafts of 10 and 7, in a run of an earlier state without reach: ours 1.14 (0.81-4.83) and 1.24 (0.89-2.78),
theirs 1.41 (1.02-3.30) and 1.81 (0.92-3.59). These are ratios to each side's own step, and transformers warns that it
casts in every product there. 5 and 4 of our 10 texts are as without lookup, 1 of theirs.
"""

from specjax.studies.prompt_lookup import PromptLookup


def get_config() -> PromptLookup:
    return PromptLookup(name="ngram_vs_transformers_smollm2", model="smollm2-135m-instruct")
