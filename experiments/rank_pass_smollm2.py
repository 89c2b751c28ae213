"""How fast, and in how much memory, 200,000 tokens are measured, and a thousand trees of 64 nodes simulated over them.

    specjax run experiments/rank_pass_smollm2.py
    specjax run experiments/rank_pass_smollm2.py --tokens 20000     (a tenth, for a first look)

It should fit in 2 GB, the model's weights included, and the simulation should take less than 10 s on 2 CPU cores.
Expect a quarter of an hour with AVX-512, an hour without.
"""

from specjax.studies.rank_pass import RankPass


def get_config() -> RankPass:
    return RankPass(name="rank_pass_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
