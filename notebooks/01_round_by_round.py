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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import specjax as sj
from specjax import decode
from specjax.analysis.tree_plot import draw_tree
from specjax.model import forward, unembed

model = sj.load_model("smollm2-135m-instruct")
heads = sj.load_heads("smollm2-135m-instruct", model.config, dtype=jnp.float32)
tree = sj.Tree.cartesian((3, 2, 1))
drafter = sj.MedusaDrafter(heads, tree)

prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "Why do leaves change colour in autumn?"}])
state = decode.prefill(model, prompt, drafter=drafter, max_new_tokens=64)


def text(token):
    return model.tokenizer.decode([int(token)]).replace("\n", "\\n")


# Not every round is worth looking at: we go on to the first that will accept two drafts.
step = jax.jit(decode.round_, static_argnames=("config", "acceptance"))
while int((after := step(model.params, model.config, drafter, sj.Greedy(), (), state)).confirmed) < 2:
    state = after

said = state.tokens[len(prompt) : int(state.length)].tolist()
print("so far the target has said:", repr(model.tokenizer.decode(said)))
print("the root, its newest token:", repr(text(state.context.root)))

# %% [markdown]
# ## Draft
#
# The rounds before left two things: the **root**, the newest committed token, which the target has not read yet, and the
# hidden state that predicted it. Four Medusa heads read that state and guess the tokens after the root. The static tree says
# which combinations are proposed: here the first head's three best, below each the second head's two best, and so on.

# %%
proposal = drafter.propose(model.params, state.draft, state.context, jax.random.key(0))
axes = draw_tree(tree, labels=[repr(text(token)) for token in proposal.tokens])
plt.show()

# %% [markdown]
# ## Verify
#
# All nodes go through the target **together**: one forward. Two things make that possible. A node's position is that of
# the root plus its depth, so siblings share one. And a node sees the prefix and its own ancestors, nothing else: the mask
# below. Each row is a token that reads; each column one that is read.

# %%
figure, axes = plt.subplots(figsize=(5, 4.6), layout="constrained")
axes.imshow(tree.ancestors, cmap="Greens")
names = [text(token) for token in proposal.tokens]
axes.set_xticks(range(tree.size), names, rotation=90, size=7)
axes.set_yticks(range(tree.size), names, size=7)
axes.set_title("who sees whom, beside the prefix", loc="left", size=10)
plt.show()

# %%
out = forward(
    model.params,
    model.config,
    proposal.tokens,
    cache=state.cache,
    positions=state.cache.length + tree.depths,
    mask=tree.ancestors,
)
logits = unembed(model.params, out.features)
choice = np.asarray(logits.argmax(-1))
for node in range(tree.size):
    path = " ".join(repr(text(proposal.tokens[n])) for n in np.flatnonzero(tree.ancestors[node]))
    print(f"after {path:45s} the target says {text(choice[node])!r}")

# %% [markdown]
# ## Accept
#
# A draft is right if it is what the target says after its parent. The longest path on which every draft is right wins,
# and after its last node the target's own choice comes for free. So a round commits at least one token, always.

# %%
verdict = sj.Greedy()(logits, proposal, tree, jax.random.key(0))
path = tree.node_paths[int(verdict.node)][: int(verdict.accepted) + 1]
print("accepted drafts:", [text(proposal.tokens[n]) for n in path[1:]])
print("the target's own token:", repr(text(verdict.next_token)))

# %% [markdown]
# ## Commit
#
# The accepted nodes' keys and values move into the cache; the rejected ones are simply not copied. Then the next round
# begins. `stream` runs the same rounds, one at a time.

# %%
rounds = list(sj.stream(model, prompt, drafter=drafter, max_new_tokens=64))
for number, item in enumerate(rounds[1:13], 1):
    drafted, own = item.tokens[: item.accepted], item.tokens[item.accepted :]
    drafted, own = (model.tokenizer.decode(list(map(int, part))) for part in (drafted, own))
    print(f"round {number:2d}: {drafted!r:>24} accepted, then {own!r}")

# %% [markdown]
# ## What it adds up to
#
# The output is the one that decoding token by token gives. Two numbers say how far each target forward got:
# `tokens_per_round` counts every committed token, `accepted_per_round` the drafts alone.

# %%
fast = sj.generate(model, prompt, drafter=drafter, max_new_tokens=64)
slow = sj.generate(model, prompt, max_new_tokens=64)
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
