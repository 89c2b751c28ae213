"""From rank tables to the tree that the demo uses, and a check by decoding.

    specjax run experiments/tree_search_smollm2.py

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, float32, a reviewer reading files meanwhile; result and figures
are in `records`). Searched on the table beside the heads (19,966 held-out tokens), checked on the model's answers to
the 50 shipped prompts (5,300 tokens), timed on 10 of these prompts, 128 tokens each, two runs: all outputs as without
a drafter. Trees of the walk search, medians:

    nodes   tokens per round                 round   tokens per second, 10 prompts             speed-up
            searched  50 prompts  10 prompts  ms     predicted   predicted   measured         (min-max over prompts)
            text                                     on other    on these    (min-max)
    2       1.392     1.273       1.260       42.4   32.8        29.7        27.1 (22.6-34.6)  0.96 (0.73-1.16)
    4       1.627     1.427       1.415       42.0   38.7        33.7        30.2 (22.8-39.6)  0.99 (0.72-1.41)
    6       1.730     1.510       1.491       55.5   31.2        26.9        26.3 (19.3-33.1)  0.86 (0.60-1.15)
    8       1.814     1.568       1.571       51.2   35.4        30.7        28.1 (20.5-36.7)  0.91 (0.63-1.31)
    12      1.921     1.651       1.668       70.9   27.1        23.5        23.1 (15.8-29.7)  0.73 (0.49-1.06)
    16      1.989     1.708       1.722       69.3   28.7        24.9        23.2 (16.0-34.6)  0.76 (0.49-1.23)

The predicted best, 4 nodes, is also the fastest measured one (30.0 tokens per second without a drafter: no tree pays
in float32 on this machine). Measured speeds are 2 to 10% below the prediction on these texts. Tokens per round
decoded on the 10 prompts equal the simulated ones to every digit. On other text than searched, the shipped prompts,
they are 13.4% below the prediction on average, 14.9% at most; on text of the same kind, searched on one half of the
held-out conversations and simulated on the other, both ways, 0.1% on average, 2.3% at most (8 nodes). The searches
differ little: at 64 nodes all give 1.929 on the shipped prompts, at 48 nodes walk 1.900, joint 1.883, independent and
Sequoia 1.889: on text of another kind than searched the joint search can lose, there by 0.3%. Any tree of depth 4
with ranks below 32 would give 2.50. Rounds of 6 nodes cost about as much as of 8, of 12 as of 16: both take 8 and
16 rows (`model.fast_rows`).

Since then a joint law must beat independent heads by three standard errors, not by two, which changes two walk trees:
at 8 nodes to the independent one (1.800 on the searched text, 1.569 on the 50 prompts), at 24 nodes from 1.780 to
1.777 on the prompts. bfloat16 has not been timed here: this machine has no hardware for it.
"""

from specjax.analysis.tree_search import TreeSearch


def get_config() -> TreeSearch:
    return TreeSearch(
        name="tree_search_smollm2",
        model="smollm2-135m-instruct",
        heads="smollm2-135m-instruct",
        dtype="float32",  # what the demo's tree is chosen in
    )
