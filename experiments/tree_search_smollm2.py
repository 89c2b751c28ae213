"""From rank tables to the tree that the demo uses, and a check by decoding.

    specjax run experiments/tree_search_smollm2.py

Record (2 CPU cores, AMD EPYC Zen 3, AVX2, jax 0.10.2, float32). Searched on the table beside the heads (19,966
held-out tokens), checked on the model's answers to the 50 shipped prompts (5,300 tokens), timed on 10 of these
prompts, 128 tokens each, two runs: all outputs as without a drafter. Trees of the walk search, medians:

    nodes   tokens per round                 round   tokens per second, 10 prompts             speed-up
            searched  50 prompts  10 prompts  ms     predicted   predicted   measured         (min-max over prompts)
            text                                     on other    on these    (min-max)
    2       1.392     1.273       1.260       31.5   44.1        39.9        40.1 (32.8-48.8)  0.87 (0.71-1.04)
    4       1.627     1.427       1.415       32.2   50.5        43.9        42.7 (30.5-58.1)  0.94 (0.68-1.24)
    6       1.730     1.510       1.491       41.8   41.4        35.7        33.1 (24.4-42.4)  0.73 (0.54-0.91)
    8       1.814     1.568       1.571       42.0   43.2        37.4        37.4 (26.8-52.0)  0.82 (0.60-1.11)
    12      1.921     1.651       1.668       62.9   30.5        26.5        26.3 (17.5-34.7)  0.58 (0.38-0.75)
    16      1.989     1.708       1.722       57.3   34.7        30.1        29.9 (20.0-40.6)  0.66 (0.43-0.87)

The chosen tree, 4 nodes, is also the fastest measured one (45.9 tokens per second without a drafter: no tree pays on
this machine). Tokens per round decoded on the 10 prompts equal the simulated ones to every digit. On other text than
searched, the shipped prompts, they are 13.4% below the prediction on average, 14.9% at most; on text of the same kind,
searched on one half of the held-out conversations and simulated on the other, both ways, 0.1% on average, 2.3% at most
(8 nodes). The searches differ little: at 64 nodes all give 1.929 on the shipped prompts, at 48 nodes walk 1.900, joint
1.883, independent and Sequoia 1.889: on text of another kind than searched the joint search can lose, there by 0.3%.
Any tree of depth 4 with ranks below 32 would give 2.50. Rounds of 6 nodes cost as much as of 8, of 12 more than of 16:
XLA:CPU's products like powers of two.
"""

from specjax.analysis.tree_search import TreeSearch


def get_config() -> TreeSearch:
    return TreeSearch(
        name="tree_search_smollm2",
        model="smollm2-135m-instruct",
        heads="smollm2-135m-instruct",
        dtype="float32",  # what the demo's tree is chosen in
    )
