"""From rank tables to the tree that the demo uses, and a check by decoding.

    specjax run experiments/tree_search_smollm2.py --dtype float32   (bfloat16 without it)

Searched on the table beside the heads, checked on the model's answers to the 50 shipped prompts, timed on 10 of them.
An hour on 2 cores without AVX-512. Expect decoded tokens per round to equal the simulated ones in float32, 1.45, 1.61
and 1.76 with 4, 8 and 16 nodes, some 9% below those on the searched text.
"""

from specjax.studies.tree_search import TreeSearch


def get_config() -> TreeSearch:
    return TreeSearch(
        name="tree_search_smollm2",
        model="smollm2-135m-instruct",
        heads="smollm2-135m-instruct",
        dtype="bfloat16",  # --dtype float32: decoding then equals the simulation, token for token
    )
