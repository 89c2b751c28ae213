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
# # From loss to acceptance: training Medusa heads
#
# Medusa heads are small: each reads the target's last hidden state and guesses one token further ahead. They are trained
# on the target's **own** text, because that is what they will have to predict. Here the target is the 5-million-parameter
# Qwen2 that ships with specjax (usually the draft model of a larger one), so that everything takes seconds.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import specjax as sj
from specjax.lab import CachedMedusa, CachedMedusaConfig, answer, dataset, distinct, init_heads, seed_prompts, train

target, token_map = sj.load_draft("smollm2-draft")
print(target.config.family, "of", sum(leaf.size for leaf in jax.tree.leaves(target.params)), "parameters")

# %% [markdown]
# ## Text of its own
#
# We let the model answer templated questions, at temperature 0.7. `answer` decodes a batch by `vmap` and keeps the hidden
# state that predicted every token, so that no second pass over the text is needed. A second batch is held out. The model
# speaks SmolLM2's 8,191 most frequent tokens; the last of its rows stands for all others. So small a model rambles, but
# heads need not judge a text: they have to predict what their target says, whatever that is.

# %%
tokenizer = sj.load_model("smollm2-135m-instruct", dtype="bfloat16").tokenizer
row_of = {int(token): row for row, token in enumerate(token_map)}
SAMPLING = sj.Sample(0.7)


def questions(count, seed):
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": q}]) for q in seed_prompts(count, seed)]
    return [[row_of.get(token, len(token_map) - 1) for token in chat] for chat in chats]


def write(count, seed):
    return distinct(
        answer(target, questions(count, seed), acceptance=SAMPLING, max_new_tokens=48, key=jax.random.key(seed))
    )


text, held_out = write(96, 0), write(24, 1)
print(len(text.tokens), "tokens to train on,", len(held_out.tokens), "held out")
print(tokenizer.decode([int(token_map[row]) for row in text.tokens[:60]]))

# %% [markdown]
# ## Labels
#
# Feature *j* predicted token *j*. The LM head has that token already, so head 1 is to give token *j + 1*, head 2 token
# *j + 2*, and so on. One position off, and trained heads accept nothing: the most common way to get this wrong.

# %%
heads = init_heads(
    sj.MedusaConfig(3, target.config.hidden_size, target.config.vocab_size, projection="shared"), target.params
)
data = dataset(text, heads)
print("tokens:            ", text.tokens[:8].tolist())
print("labels at feature 0:", data.labels[0].tolist())

# %% [markdown]
# ## Train
#
# Only the heads have gradients. The heads start as copies of the LM head, so the first loss is that of guessing the next
# token in place of later ones. Checkpoints hold the optimiser and the position in the data: a killed run goes on where it
# stopped, with the same losses.

# %%
folder = Path(tempfile.mkdtemp())
settings = CachedMedusaConfig(epochs=3, batch_size=512, learning_rate=4e-3)
objective = CachedMedusa(
    heads=heads, target=target.params, data=data, held_out=dataset(held_out, heads), settings=settings
)
trained, log = train(objective, folder)

steps = [record for record in log if "losses" in record]
evaluations = [record for record in log if "eval" in record]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for head in range(3):
    left.plot([r["step"] for r in steps], [r["losses"][head] for r in steps], label=f"head {head + 1}")
    top1 = [r["eval"]["accuracy"]["top1"][head] for r in evaluations]
    right.plot([r["step"] for r in evaluations], top1, marker="o", label=f"head {head + 1}")
left.set_title("loss, nats", loc="left", size=10)
right.set_title("top-1 accuracy on held-out text", loc="left", size=10)
for axes in (left, right):
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What it is worth
#
# Accuracy is not the aim: accepted drafts are. The same tree, before and after training, on new questions, sampled without
# changing the target's distribution.

# %%
tree = sj.Tree.cartesian((3, 2, 1))


def tokens_per_round(candidate):
    outs = sj.generate_batch(
        target,
        questions(12, seed=2),
        drafter=sj.MedusaDrafter(candidate, tree),
        acceptance=SAMPLING,
        max_new_tokens=48,
        keys=jax.random.split(jax.random.key(3), 12),
    )
    return sum(int((out.accepted_lengths + 1).sum()) for out in outs) / sum(out.rounds for out in outs)


before, after = tokens_per_round(heads), tokens_per_round(trained)
print(f"tokens per round: {before:.2f} before, {after:.2f} after training")
assert after > before

# %% [markdown]
# Real heads want more text: those for SmolLM2 saw 1.6 million tokens (`experiments/train_smollm2_medusa.py` has the learning
# curve of the first million, `continue_smollm2_medusa.py` the rest). What they are worth on which text is the next notebook's
# subject.

# %%
sj.save_heads(folder / "heads.safetensors", trained)
again = sj.load_heads(folder / "heads.safetensors", target.config)
assert jnp.array_equal(again.params["kernel_0"], trained.params["kernel_0"])
