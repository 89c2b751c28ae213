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
# # Choosing a tree: which one, and how large
#
# A larger tree accepts more and costs more. How much more it accepts follows from a rank table, exactly and without
# decoding; how much more it costs must be measured on the machine at hand. Both together choose the tree.

# %%
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import specjax as sj
from specjax.analysis import rank_plots
from specjax.analysis.ranks import RankTable
from specjax.analysis.round_time import RoundTimes, time_rounds
from specjax.analysis.search import SEARCHES, Limits, joint_tree
from specjax.analysis.simulate import simulate, upper_bound
from specjax.analysis.tree_plot import draw_tree
from specjax.loading.heads import packaged_ranks
from specjax.prompts import load_prompts

name = "smollm2-135m-instruct"
table = RankTable.load(packaged_ranks(name))
halves = [table.select(lambda i, part=part: i % 2 == part) for part in (0, 1)]  # to search on, and to check on

# %% [markdown]
# ## Search
#
# Every search wants the tree of M nodes whose rank paths are right most often. `independent` (Medusa's) and `sequoia`
# multiply the heads' accuracies; `joint` counts how often each path really occurred. What counts is the other half of the
# text. The dashed lines are infinite trees: what heads of that depth could give at most.

# %%
sizes = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
curves = {}
for search, find in SEARCHES.items():
    found = simulate(halves[1], [find(halves[0], size, Limits()) for size in sizes])
    curves[search] = [(one.tree.size, one.tokens_per_round) for one in found]
bounds = {f"any tree of depth {depth}": upper_bound(halves[1], depth) for depth in (1, 2, 4)}
display(rank_plots.tokens_against_nodes(curves, bounds))
for size, joint, independent in zip(sizes, curves["joint"], curves["independent"], strict=True):
    print(f"{size:3d} nodes: joint {joint[1]:.3f}, independent {independent[1]:.3f}")

# %% [markdown]
# ## The tree itself
#
# Edges show how often the child is right where its parent is. The best tree is narrow and not symmetric.

# %%
tree = joint_tree(table, 16)
draw_tree(tree, edge_values=rank_plots.edge_acceptance(table, tree).tolist())
plt.show()

# %% [markdown]
# ## Cost
#
# The time of a round, in the real decoding loop, against the number of nodes. On a GPU this line stays flat for long; on a
# CPU it rises at once, which is why small trees win there.

# %%
model = sj.load_model(name, dtype="bfloat16")
heads = sj.load_heads(name, model.config, dtype="bfloat16")
prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": load_prompts()[0].turns[0]}])
timed = (1, 2, 4, 8, 16)
family = [sj.Tree.chain(0), *(joint_tree(table, size) for size in timed[1:])]
taken = time_rounds(model, heads, family, prompt, rounds=8, repeats=3)
times = RoundTimes(timed, tuple(row["median"] for row in taken))
for size, row in zip(timed, taken, strict=True):
    print(f"{size:3d} nodes: {row['median'] / taken[0]['median']:.2f} autoregressive steps")

# %% [markdown]
# ## Choose
#
# Tokens per round over the cost of a round is the predicted speed-up over autoregressive decoding.

# %%
simulated = {one.tree.size: one.tokens_per_round for one in simulate(table, family[1:])}
predicted = {size: times.speedup(size, tokens) for size, tokens in simulated.items()}
best = max(predicted, key=predicted.get)
display(rank_plots.speedup_against_nodes({"predicted": sorted(predicted.items())}))
print(f"the best of {timed[1:]} nodes here: {best}, predicted {predicted[best]:.2f} times as fast on text of this kind")

# %% [markdown]
# ## Check
#
# The simulator is exact on the text that it saw, so the check is a decoder on other prompts. These are unlike the text of
# the table: expect fewer tokens per round than simulated, and the same order of trees.

# %%
drafter = sj.MedusaDrafter(heads, joint_tree(table, best))
rounds = committed = 0
for entry in load_prompts()[::12]:
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": entry.turns[0]}])
    out = sj.generate(model, ids, drafter=drafter, max_new_tokens=48, capacity=512)
    rounds, committed = rounds + out.rounds, committed + int((out.accepted_lengths + 1).sum())
print(f"simulated on the table's text: {simulated[best]:.2f}; decoded on other prompts: {committed / rounds:.2f}")
assert np.isfinite(committed / rounds)
