"""Makes text of SmolLM2-135M-Instruct's own, with features, for heads and draft models to be trained on.

    specjax run experiments/distill_smollm2.py --output-dir results/distill_smollm2

User turns by the model itself and seed prompts, in turn shard by shard; greedy answers of up to 192 tokens. The
shards and their manifest go to `data.directory`, where `train_smollm2_medusa.py` and `distill_draft_smollm2.py` look
for them too, given the same `data`. The command can be stopped at any time and run again: it goes on with the next
shard. Evaluation text is a fiftieth of the prompts, by hash.

Record: none yet; result.json and the manifest hold what a run made.
"""

from specjax.corpus.build import Corpus
from specjax.studies.make_text import MakeText


def get_config() -> MakeText:
    return MakeText(name="distill_smollm2", model="smollm2-135m-instruct", data=Corpus(shards=90))
