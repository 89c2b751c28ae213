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
# %matplotlib inline
import time

import numpy as np
from IPython.display import display

import specjax as sj
from specjax import lab

name = "smollm2-135m-instruct"
model = sj.load_model(name)
heads = sj.load_heads(name, model.config, dtype="float32")
table = lab.RankTable.load(lab.packaged_ranks(name)).check(model, heads, any_dtype=True)  # of these very weights
chosen_on, checked_on = (table.select(lambda i, side=side: i % 2 == side) for side in (0, 1))

# %% [markdown]
# ## Search
#
# Every search wants the tree of M nodes whose rank paths are right most often.
#
# - `independent` (Medusa's) and `sequoia` multiply the heads' accuracies, as if heads were independent.
# - `joint` counts how often each path really occurred, and leans on independence where it counted little.
# - `walk` counts only the positions where a round would begin. After a long accepted path, the next root stands where
#   drafts have just failed: harder than the average position.
#
# The last two could fit the accidents of a text. So they are tried on parts of it that they have not seen, and give the
# independent tree unless they are better there beyond doubt. What counts is the other half of the text. The dashed lines
# are the most that any tree of that depth could give with the ranks that the table tells apart.
#
# The four curves all but coincide: often the joint searches find nothing better than the independent tree, and keep it.
# What the tree's size and the text are worth is far more.

# %%
sizes = (4, 8, 16, 32, 64)
curves = {}
for search in lab.SEARCHES:
    found = lab.search_trees(chosen_on, sizes, search=search)
    other = lab.simulate(checked_on, [one.tree for one in found])
    curves[search] = [(one.tree.size, one.tokens_per_round) for one in other]
bounds = {
    f"any tree of depth {depth}, ranks below {checked_on.cap}": lab.upper_bound(checked_on, depth)
    for depth in (1, 2, 4)
}
display(lab.rank_figures.tokens_against_nodes(curves, bounds))
for size, walk, independent in zip(sizes, curves["walk"], curves["independent"], strict=True):
    print(f"{size:3d} nodes: walk {walk[1]:.3f}, independent {independent[1]:.3f}")

# %% [markdown]
# ## The tree itself
#
# Edges show how often the child is right where its parent is. The best tree here is wide at its root, shallow, and lopsided. The
# line below the drawing says which law won: the walk is tried first, and where it is not better beyond doubt, the tree is the
# independent one.

# %%
(sixteen,) = lab.search_trees(chosen_on, [16])
display(lab.draw_tree(sixteen.tree, edge_values=lab.rank_figures.edge_acceptance(chosen_on, sixteen.tree)).figure)
print(sixteen.tree.provenance["search"])

# %% [markdown]
# ## Cost
#
# The time of a round, in the real decoding loop, against the number of nodes. The weights are read once a round, however
# many nodes share them; the arithmetic grows with every node. Where reading is what takes the time, as on a GPU, the line
# stays flat for long; on a CPU, and in float32 above all, the arithmetic shows early. Here, in float32:

# %%
prompts = lab.load_prompts()
prompts = [prompts[i] for i in lab.per_category([p.category for p in prompts], 1)]
prompts = [prompt for prompt in prompts if len(prompt.turns[0]) < 600]  # short ones decode fast
ids = [model.tokenizer.apply_chat_template([{"role": "user", "content": p.turns[0]}]) for p in prompts]
timed = (1, 4, 8, 16)
found = lab.search_trees(chosen_on, timed[1:])
family = [sj.Tree.chain(0), *(one.tree for one in found)]
taken = lab.time_rounds(model, heads, family, ids[0], rounds=6, repeats=3, capacity=512)
times = lab.RoundTimes(timed, tuple(row["median"] for row in taken))
for size, row in zip(timed, taken, strict=True):
    low, median, high = (row[key] / taken[0]["median"] for key in ("min", "median", "max"))
    print(f"{size:3d} nodes: {median:.2f} autoregressive steps ({low:.2f}-{high:.2f})")

# %% [markdown]
# ## Choose
#
# Tokens per round over the time of a round is the predicted speed. The text that a tree was searched on may flatter it; the
# other half does not. Here that half happens to be the easier one, and its curve lies above.
#
# A tree is worth its cost only above the black line, autoregressive decoding. In float32 on a CPU, two tokens at once may
# cost nearly twice as much as one: then no tree helps, and the honest choice is none. Where several tokens share the
# reading of the weights (bfloat16 with hardware for it, a GPU), the same trees gain. Repeated times differ by more
# than a few percent, as the ranges above show: so small a gain is none yet.

# %%
other = lab.simulate(checked_on, family[1:])
speed = {
    "on the half it was chosen on": [
        (one.tree.size, times.tokens_per_second(one.tree.size, one.tokens_per_round)) for one in found
    ],
    "on the other half": [
        (one.tree.size, times.tokens_per_second(one.tree.size, one.tokens_per_round)) for one in other
    ],
}
display(lab.rank_figures.speed_against_nodes(speed, times.tokens_per_second(1, 1.0)))
best = times.fastest(found).tree
promised = {one.tree: one.tokens_per_round for one in other}[best]
print(f"chosen: {best.size} nodes, which promises {promised:.2f} tokens per round on text of this kind,")
print(f"{times.speedup(best.size, promised):.2f} times the speed of autoregressive decoding in this dtype")

# %% [markdown]
# ## Check
#
# Now the decoder itself, on prompts unlike the table's text: fewer tokens per round are to be expected, and less speed. A
# rank table of these very answers, on the other hand, must say exactly what was decoded (in float32: in bfloat16 near-ties
# can flip). A tree of the root alone is autoregressive decoding. Both decode every prompt twice, in turn, and nothing stops
# early, as when the rounds were timed. A request for one token is the prefill, which drafts do not shorten: its time is
# deducted.

# %%
trees = {"autoregressive": family[0], "chosen tree": best}
outs, seconds = {}, dict.fromkeys(trees, 0.0)


def clock(tree, tokens, ids=ids):
    request = {"max_new_tokens": tokens, "capacity": 512, "eos_token_ids": ()}
    begin = time.perf_counter()
    made = [sj.generate(model, i, drafter=sj.MedusaDrafter(heads, tree), **request) for i in ids]
    return made, time.perf_counter() - begin


for tree in trees.values():
    clock(tree, 2, ids[:1])  # compiles what is not yet
for _ in range(2):
    for label, tree in trees.items():
        _, prefill = clock(tree, 1)
        outs[label], whole = clock(tree, 16)
        seconds[label] += (whole - prefill) / 2

for label in trees:
    rounds = sum(out.rounds for out in outs[label])
    committed = sum(int((out.accepted_lengths + 1).sum()) for out in outs[label])
    print(f"{label:15s} {committed / rounds:.2f} tokens per round, {committed / seconds[label]:.1f} tokens/s")
for plain, fast in zip(*outs.values(), strict=True):
    assert plain.tokens.tolist() == fast.tokens.tolist()

answers = [lab.Text(i, out.tokens, p.category) for i, out, p in zip(ids, outs["chosen tree"], prompts, strict=True)]
(simulated,) = lab.simulate(lab.measure(model, heads, answers), [best])
decoded = committed / rounds
print(f"promised by the table's other half {promised:.2f}, decoded {decoded:.2f}: {decoded / promised - 1:+.0%};")
print(f"simulated on these very answers {simulated.tokens_per_round:.2f}")
assert np.isclose(simulated.tokens_per_round, decoded)
gain = seconds["autoregressive"] / seconds["chosen tree"]
print(
    f"speed-up: {times.speedup(best.size, decoded):.2f} by these tokens and the round times, {gain:.2f} on the clock:"
)
print("the tree pays on this text" if gain > 1 else "no tree pays here, on this text and in this dtype")

# %% [markdown]
# If the tree lost, nothing was wrong with it: in this dtype, on this machine, the text is too hard for what a round costs,
# and the honest answer is to decode without. So: measure on the text that you will decode. `specjax tree measure` does it
# for your prompts, `specjax bench` times your machine, and `specjax tree optimise` puts both together.
