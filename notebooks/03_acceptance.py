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
# %matplotlib inline
import numpy as np
from IPython.display import display

import specjax as sj
from specjax import lab

name = "smollm2-135m-instruct"
model = sj.load_model(name)
heads = sj.load_heads(name, model.config, dtype="float32")

# %% [markdown]
# ## Two kinds of text
#
# Beside the heads lies the table of *distilled* text: the model's answers to templated questions, held out from training (but
# for some of the prompts, which an earlier training had seen).
# A second one is measured here, on prompts of five kinds that are nothing like the training text.

# %%
distilled = lab.RankTable.load(lab.packaged_ranks(name)).check(model, heads, any_dtype=True)  # of these very weights
prompts = lab.load_prompts()
prompts = [prompts[i] for i in lab.per_category([p.category for p in prompts], 2)]
fresh = lab.measure(model, heads, lab.greedy_answers(model, prompts, max_new_tokens=64, batch_size=5))
for label, table in (("distilled", distilled), ("prompts", fresh)):
    accuracy = " ".join(f"{share:.2f}" for share in table.accuracy(1))
    print(f"{label:10s} {len(table.tokens):6d} tokens; top-1 accuracy of heads 1 to 4: {accuracy}")

# %%
display(lab.rank_figures.accuracy_by_head(distilled), lab.rank_figures.accuracy_by_category(fresh))

# %% [markdown]
# The gap between the two lines of numbers is the most important thing here: heads that were measured on text like their
# training text look better than they will be. Always measure on what you will decode.

# %% [markdown]
# ## Ranks
#
# Rank 0 is the head's best guess. A second or third guess is often right where the first is not: that is why trees beat
# chains. The further the head looks, the flatter the row.

# %%
display(lab.rank_figures.rank_heatmap(distilled))

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
#
# On the dashed line they would be. Below it a head is overconfident: right less often than it believes. A draft's own
# probability therefore says which drafts are better than others, but not how often they will be accepted: that is counted.

# %%
display(lab.rank_figures.calibration(distilled))
for head in range(distilled.num_heads):
    believed, right = distilled.confidence[distilled.rooted, head].mean(), distilled.accuracy(1)[head]
    print(f"head {head + 1} gives its best token {believed:.2f} on average, and is right {right:.2f} of the time")

# %% [markdown]
# ## Where the target is sure
#
# Entropy says how open a choice is. A draft's own choice is the one that the target makes where the draft would stand: for
# head 1 one token after the root, for head 2 two tokens after. Where that law is sharp, every head is right far more
# often; where it is flat, there is little to guess. The bins hold as many drafts each.

# %%
display(lab.rank_figures.accuracy_by_entropy(distilled))
edges, index = distilled.entropy_bins(4)
for quarter in range(4):
    inside = index == quarter
    print(
        f"entropy {edges[quarter]:.2f} to {edges[quarter + 1]:.2f} nats: top-1 accuracy by head",
        np.round(distilled.accuracy(1, inside), 2),
    )

# %% [markdown]
# ## Along a text
#
# Drafts are accepted in stretches. Decoding with a tree of 29 nodes would commit the shaded tokens as drafts, the darker
# the further ahead they were drafted. The shading runs on where the text can hardly go on otherwise, in set phrases and
# in words that stood in the question or just before, and breaks off where it could have gone several ways.

# %%
tree = sj.Tree.cartesian((4, 3, 1))
first = fresh.select(lambda i: i == 0)
pieces = [model.tokenizer.decode([int(t)]) for t in first.tokens]
display(lab.rank_figures.text_acceptance(pieces, lab.drafted(first, tree)))

# %% [markdown]
# ## By category
#
# The table answers for any tree at once, without decoding: here how many tokens a round commits on each kind of text.

# %%
for category in sorted(set(fresh.categories)):
    (found,) = lab.simulate(fresh.category(category), [tree])
    print(
        f"{category:14s} {found.tokens_per_round:.2f} tokens per round, {found.accepted_per_round:.2f} of them drafts"
    )
