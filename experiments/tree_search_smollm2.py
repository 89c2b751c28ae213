"""From rank tables to the tree that the demo uses, and a check by decoding.

specjax run experiments/tree_search_smollm2.py
"""

from specjax.analysis.tree_search import TreeSearch


def get_config() -> TreeSearch:
    return TreeSearch(
        name="tree_search_smollm2",
        model="smollm2-135m-instruct",
        heads="smollm2-135m-instruct",
    )
