# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Acceptance: what heads know, and where
#
# Whether a draft is accepted depends on one thing: the **rank** that a head gave to the token the target then said. A rank
# table records that for every position of some text. Everything about greedy acceptance follows from it.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import specjax as sj
from specjax.analysis import rank_plots
from specjax.analysis.ranks import RankTable, measure
from specjax.analysis.simulate import simulate
from specjax.analysis.texts import greedy_answers
from specjax.loading.heads import packaged_ranks
from specjax.prompts import load_prompts

name = "smollm2-135m-instruct"
model = sj.load_model(name, dtype="bfloat16")
heads = sj.load_heads(name, model.config, dtype="bfloat16")

# %% [markdown]
# ## Two kinds of text
#
# Beside the heads lies the table of *distilled* text: the model's answers to templated questions, held out from training.
# A second one is measured here, on prompts of five kinds that are nothing like the training text.

# %%
distilled = RankTable.load(packaged_ranks(name))
prompts = [p for i, p in enumerate(load_prompts()) if i % 10 in (0, 5)]
fresh = measure(model, heads, greedy_answers(model, prompts, max_new_tokens=64))
for label, table in (("distilled", distilled), ("prompts", fresh)):
    accuracy = " ".join(f"{share:.2f}" for share in table.accuracy(1))
    print(f"{label:10s} {len(table.tokens):6d} tokens; top-1 accuracy of heads 1 to 4: {accuracy}")

# %%
display(rank_plots.accuracy_by_head(distilled), rank_plots.accuracy_by_category(fresh))

# %% [markdown]
# The gap between the two lines of numbers is the most important thing here: heads that were measured on text like their
# training text look better than they will be. Always measure on what you will decode.

# %% [markdown]
# ## Ranks
#
# Rank 0 is the head's best guess. A second or third guess is often right where the first is not: that is why trees beat
# chains. The further the head looks, the flatter the row.

# %%
display(rank_plots.rank_heatmap(distilled))

# %% [markdown]
# ## Heads are not independent
#
# Tree searches usually multiply the heads' accuracies. But where head 1 is right, the text is easy, and head 2 is right
# more often than on average. The first row is what independence assumes, the others are what happens.

# %%
print("head 2's rank 0, 1, 2:")
print("  on average        ", np.round(distilled.hits()[1][:3], 3))
for rank in range(3):
    print(f"  where head 1 had {rank}", np.round(distilled.conditional((rank,))[:3], 3))

# %% [markdown]
# ## Are heads right as often as they think?

# %%
display(rank_plots.calibration(distilled))

# %% [markdown]
# ## Along a text
#
# Drafts are accepted in stretches. Darker tokens are those from which a round would have gone further, with a tree of 29
# nodes: fixed phrases and the ends of words are easy, the beginnings of new thoughts are not.

# %%
tree = sj.Tree.cartesian((4, 3, 1))
paths, start, length = set(tree.rank_paths), fresh.starts[0], min(int(fresh.lengths[0]), 64)
reach = np.full(length, -1)
for j in range(length - 1):
    ranks = tuple(int(r) for r in fresh.ranks[start + j][: tree.max_depth])
    reach[j] = max((d for d in range(1, tree.max_depth + 1) if ranks[:d] in paths), default=0)
pieces = [model.tokenizer.decode([int(t)]) for t in fresh.tokens[start : start + length]]
display(rank_plots.text_acceptance(pieces, reach))

# %% [markdown]
# ## By category
#
# The table answers for any tree at once, without decoding: here how many tokens a round commits on each kind of text.

# %%
for category in sorted(set(fresh.categories)):
    found = simulate(fresh.category(category), [tree])[0]
    print(
        f"{category:14s} {found.tokens_per_round:.2f} tokens per round, {found.accepted_per_round:.2f} of them drafts"
    )
plt.close("all")
