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
# # A round, taken apart
#
# Speculative decoding commits several tokens per forward pass of the target and still says exactly what the target would
# have said. This notebook opens one round on a real model: what is drafted, what the target sees, what it accepts, and
# what is committed.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import specjax as sj
from specjax import lab

model = sj.load_model("smollm2-135m-instruct")
heads = sj.load_heads("smollm2-135m-instruct", model.config, dtype="float32")
tree = sj.Tree.cartesian((3, 2, 1))
drafter = sj.MedusaDrafter(heads, tree)

prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "Why do leaves change colour in autumn?"}])


def text(token):
    return model.tokenizer.decode([int(token)]).replace("\n", "\\n")


# Not every round is worth looking at: we take the first that accepts two drafts, or else the one that accepts the most.
rounds = list(lab.take_apart(model, prompt, drafter=drafter, max_new_tokens=48))
one = next((r for r in rounds if len(r.accepted) >= 2), max(rounds, key=lambda r: len(r.accepted)))

print("so far the target has said:", repr(model.tokenizer.decode(one.before[len(prompt) :].tolist())))
print("the root, its newest token:", repr(text(one.before[-1])))

# %% [markdown]
# ## Draft
#
# The rounds before left two things: the **root**, the newest committed token, which the target has not read yet, and the
# hidden state that predicted it. Medusa heads read that state and guess the tokens after the root, one head for each level
# of the tree. The static tree says which combinations are proposed: here the first head's three best, below each the second
# head's two best, and so on.

# %%
axes = lab.draw_tree(tree, labels=[repr(text(token)) for token in one.drafts])
display(axes.figure)

# %% [markdown]
# ## Verify
#
# All nodes go through the target **together**: one forward. Two things make that possible. A node's position is that of
# the root plus its depth, so siblings share one. And a node sees the prefix and its own ancestors, nothing else: the mask
# below. Each row is a token that reads; each column one that is read.

# %%
figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
axes.imshow(tree.ancestors, cmap="Greens")
names = [text(token) for token in one.drafts]
axes.set_xticks(range(tree.size), names, rotation=90, size=7)
axes.set_yticks(range(tree.size), names, size=7)
axes.set_title("who sees whom, beside the prefix", loc="left", size=10)
plt.show()

# %%
for node in range(tree.size):
    path = " ".join(repr(text(one.drafts[n])) for n in np.flatnonzero(tree.ancestors[node]))
    print(f"after {path:45s} the target says {text(one.choices[node])!r}")

# %% [markdown]
# ## Accept
#
# A draft is right if it is what the target says after its parent. The longest path on which every draft is right wins,
# and after its last node the target's own choice comes for free. So a round commits at least one token, always.

# %%
print("accepted drafts:", [text(one.drafts[n]) for n in one.accepted])
print("the target's own token:", repr(text(one.choices[(0, *one.accepted)[-1]])))

# %% [markdown]
# ## Commit
#
# The accepted nodes' keys and values move into the cache; the rejected ones are simply not copied. Then the next round
# begins. `stream` runs the same rounds, one at a time.

# %%
streamed = list(sj.stream(model, prompt, drafter=drafter, max_new_tokens=48))
for number, item in enumerate(streamed[1:13], 1):
    drafted, own = item.tokens[: item.accepted], item.tokens[item.accepted :]
    drafted, own = (model.tokenizer.decode(list(map(int, part))) for part in (drafted, own))
    print(f"round {number:2d}: {drafted!r:>24} accepted, then {own!r}")

# %% [markdown]
# ## What it adds up to
#
# The output is the one that decoding token by token gives. Two numbers say how far each target forward got:
# `tokens_per_round` counts every committed token, `accepted_per_round` the drafts alone.

# %%
fast = sj.generate(model, prompt, drafter=drafter, max_new_tokens=48)
slow = sj.generate(model, prompt, max_new_tokens=48)
assert fast.tokens.tolist() == slow.tokens.tolist()
print(model.tokenizer.decode(fast.tokens.tolist()))
print()
print(f"{slow.rounds} rounds without drafts, {fast.rounds} with: {fast.tokens_per_round:.2f} tokens per round, ")
print(f"of which {fast.accepted_per_round:.2f} drafts")

figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
axes.bar(range(1, fast.rounds + 1), fast.accepted_lengths + 1, color="#2f6db3")
axes.axhline(1, color="black", lw=0.8)
axes.set_xlabel("round")
axes.set_ylabel("tokens committed")
axes.spines[["top", "right"]].set_visible(False)
plt.show()
