"""Made the draft model that ships for SmolLM2-135M-Instruct: a Qwen2 of 5 million parameters.

specjax run experiments/distill_draft_smollm2.py --output-dir results/distill_draft_smollm2

Record: the draft that ships was made on a CPU by an earlier state of this code, with these sizes and epochs; it is
that run's last checkpoint. The curves were not kept. On answers to other prompts its law overlaps SmolLM2's by 0.451,
and it prefers the same token in 49.7% of the places (`evaluate_draft_smollm2.py`). How often SmolLM2 takes its tokens
in decoding, and what that is worth in time, by temperature and category: `compare_drafters_smollm2.py`.
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_draft import TrainDraft
from specjax.training.draft import DraftConfig


def get_config() -> TrainDraft:
    return TrainDraft(
        name="distill_draft_smollm2",
        model="smollm2-135m-instruct",
        reduced_vocab_size=8192,
        data=Corpus(shards=90),
        training=DraftConfig(epochs=3, select="best"),
    )
