"""Typical acceptance from a rank table: which drafts the target would find plausible, judged after the table's text.

Medusa's candidates for a depth do not depend on the node above, so that a node is accepted when every rank on its path
passes. Whether head i's candidate passes was recorded under the law after the text's tokens; after other tokens, which
typical acceptance lets in, the target might judge otherwise. The walk goes on along the text, too. Hence an error:
`on_text` says where there is none in the judgements.

Seen (tests/real/test_typical.py: the small Qwen2 that ships as a draft, its heads, 12 answers of 48 tokens, T 0.7, a
tree of 22 nodes): with the paper's epsilon and delta 57% of the rounds are judged rightly, and tokens per round come
out 9.9% below the decoder's; with stricter rules 69%, and 7.3% below or right.
"""

import numpy as np
from jaxtyping import Bool, Int

from specjax.acceptance import Typical
from specjax.errors import DataError, TreeError
from specjax.ranks.table import RankTable
from specjax.tree import Tree


def typical_reach(table: RankTable, tree: Tree, rule: Typical) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """How many drafts a round that begins at each position would accept, and whether all judgements there are right.

    A judgement is right while the drafts above it are the text's own tokens. `epsilon`, `delta` and the rule are free;
    the temperature is the one that was measured.

    Raises:
      DataError: a table without the columns for it, or of another temperature.
      TreeError: a tree deeper than the table has heads, or with a rank beyond the recorded candidates.
    """
    if table.draft_log_p is None or table.typical_entropy is None:
        raise DataError(
            "the rank table does not hold what typical acceptance depends on; measure with typical_temperature "
            "(`specjax tree measure --typical-temperature T`)."
        )
    if table.manifest.get("temperature") != rule.temperature:
        raise DataError(
            f"the rank table was measured for typical acceptance at temperature {table.manifest.get('temperature')}, "
            f"the rule has {rule.temperature}; measure again."
        )
    candidates = table.draft_log_p.shape[2]
    if tree.max_depth > table.num_heads or max(tree.ranks) >= candidates:
        raise TreeError(
            f"the tree is {tree.max_depth} deep with ranks up to {max(tree.ranks)}; for typical acceptance the table "
            f"knows {table.num_heads} heads and ranks below {candidates}."
        )
    n = len(table.ranks)
    bar = rule.delta * np.exp(-table.typical_entropy)
    bar = np.minimum(rule.epsilon, bar) if rule.rule == "paper" else np.maximum(rule.epsilon, bar)
    accepted, true = np.ones((tree.size, n), bool), np.ones((tree.size, n), bool)
    depth, on_text = np.zeros(n, np.int32), np.ones(n, bool)
    rows = np.arange(n)
    for node in range(1, tree.size):
        parent, head, rank = tree.parents[node], int(tree.depths[node]) - 1, tree.ranks[node]
        law = np.minimum(rows + 1 + head, n - 1)  # past the sequence's end the probability is 0
        p = np.exp(table.draft_log_p[:, head, rank])
        passes = p > bar[law] if rule.rule == "paper" else p >= bar[law]
        on_text &= true[parent] | ~accepted[parent]
        accepted[node] = accepted[parent] & passes & (table.draft_log_p[:, head, rank] > -np.inf)
        true[node] = true[parent] & (table.ranks[:, head] == rank)
        depth = np.where(accepted[node], head + 1, depth)  # nodes are in breadth-first order
    return depth, on_text
