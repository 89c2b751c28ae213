"""How fast, and in how much memory, 200,000 tokens are measured, and a thousand trees of 64 nodes simulated over them.

specjax run experiments/rank_pass_smollm2.py
specjax run experiments/rank_pass_smollm2.py --tokens 20000     (a tenth, for a first look)

It should fit in 2 GB, the model's weights included, and the simulation should take less than 10 s on 2 CPU cores.

Record (2 CPU cores, AMD EPYC Zen 4, jax 0.10.2, bfloat16, nothing else running; the result is in `records`): 200,124
tokens at 263 a second, each read after its prompt, compilation included; 2.005e9 bytes (1.87 GiB) at most in the pass,
weights included, 2.33e9 before it, when the process answered the prompts. The table takes 1.9 MB on disk; a thousand
trees of 64 nodes over it 1.4 s. With --tokens 10000: 242 tokens a second, 1.74e9 bytes, 2.25e9 before.

On an AMD EPYC Zen 3, --dtype float32, three to five other processes at work on the same cores: 200,064 tokens at 60 a
second. The table takes 1.9 MB on disk; a thousand trees of 64 nodes over it 2.9 s. In the pass at most 1.92 GB, over
3,046 tokens (1.96 GB when looked at during the run of 200,064, whose own peak was not recorded); 2.14 GB before it.
"""

from specjax.analysis.rank_pass import RankPass


def get_config() -> RankPass:
    return RankPass(name="rank_pass_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
