"""Made the heads that ship for the draft model: a trained Qwen2 with heads of its own.

    specjax run experiments/train_smollm2_draft_medusa.py --output-dir results/train_smollm2_draft_medusa

Record (2 CPU cores, AMD EPYC Zen 3, jax 0.10.2; experiments/records has its result.json and curves): the draft model's
greedy answers to 1,024 seed prompts, 96,274 distinct training tokens; four epochs, less than six minutes in all beside
other work. Held out: 4,970 tokens of conversations that are not in the training text, to prompts of the same kind.
Accuracy of heads 1 to 4, and tokens per round of the tree cartesian:3,2,1,1 (22 nodes) walked over the held-out text:

    epoch   top-1                     top-3                     tokens per round
    0       0.047 0.076 0.104 0.084   0.150 0.142 0.173 0.130   1.14
    1       0.460 0.329 0.288 0.250   0.645 0.504 0.442 0.391   2.01
    2       0.524 0.387 0.328 0.292   0.692 0.555 0.498 0.426   2.17
    3       0.535 0.405 0.340 0.297   0.709 0.569 0.514 0.442   2.21
    4       0.538 0.408 0.344 0.298   0.711 0.570 0.512 0.444   2.22

A model this small repeats itself, which makes it easy to foresee; the figures say nothing about larger targets.
"""

from specjax.studies.train_draft_heads import TrainDraftHeads
from specjax.training.cached_medusa import CachedMedusaConfig


def get_config() -> TrainDraftHeads:
    return TrainDraftHeads(
        name="train_smollm2_draft_medusa",
        draft="smollm2-draft",
        tokenizer="smollm2-135m-instruct",
        reduced_vocab_size=2048,
        batch_size=64,
        training=CachedMedusaConfig(epochs=4, batch_size=1024, learning_rate=2e-3, compute="float32", select="best"),
    )
