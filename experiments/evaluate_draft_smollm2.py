"""How often SmolLM2 takes the tokens of the draft model that ships, on answers to prompts drawn with other seeds.

    specjax run experiments/evaluate_draft_smollm2.py

Record (2 CPU cores, jax 0.10.2; 4 minutes, nearly all of them for the text): 192 conversations with 26,877 tokens of
answers; averages over the answers' tokens among the first 256 of each conversation. At temperature 1 the draft's law
overlaps the target's by sum_x min(p(x), q(x)) = 0.451, which is how often one token drawn from it is accepted; both
prefer the same token in 49.7% of the places; the cross-entropy with the text is 2.29 nats. In decoding, first drafts
are accepted less often (31% at T = 0, `compare_drafters_smollm2.py`).
"""

from specjax.corpus.build import Corpus
from specjax.studies.train_draft import EvaluateDraft


def get_config() -> EvaluateDraft:
    return EvaluateDraft(
        name="evaluate_draft_smollm2",
        model="smollm2-135m-instruct",
        draft="smollm2-draft",
        data=Corpus("results/evaluate_draft_smollm2/text", shards=2, turn_seed=107, prompt_seed=50_000),
    )
