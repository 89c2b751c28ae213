"""How fast, and in how much memory, 200,000 tokens are measured, and a thousand trees of 64 nodes simulated over them.

specjax run experiments/rank_pass_smollm2.py
specjax run experiments/rank_pass_smollm2.py --tokens 20000     (a tenth, for a first look)

It should fit in 2 GB, the model's weights included, and the simulation should take less than 10 s on 2 CPU cores.

Record (2 CPU cores, AMD EPYC Zen 3, jax 0.10.2, bfloat16, with the first heads (`train_smollm2_medusa.py`), tests and
compilations beside it for most of the time; the result is in `records`): 200,046 tokens, each read after its prompt, at
59 a second; 1.65e9 bytes at most in the pass, weights included, and 1.63e9 before it, when the process answered the
prompts. The table takes 1.9 MB on disk; a thousand trees of 64 nodes over it 2.5 s.

A tenth of it with the heads that ship, on the same kind of machine with nothing else running (`result_20000.json`):
20,092 tokens at 81 a second; 1.59e9 bytes at most in the pass and 1.50e9 before it.

On an AMD EPYC Zen 4 with AVX-512 bf16, nothing else running, prompts answered 16 at a time in place of 4
(`result_zen4.json`): 200,124 tokens at 263 a second, compilation included; 2.005e9 bytes at most in the pass, 2.33e9
before it; a thousand trees 1.4 s. With batches of 4 it has not been run there.

The table repeats the answers to 50 prompts, which speeds up the simulation: every pattern of ranks is looked up once.
Over 200,000 random ranks a thousand trees take less than 10 s of CPU time (tests/real/test_simulation_speed.py).
"""

from specjax.studies.rank_pass import RankPass


def get_config() -> RankPass:
    return RankPass(name="rank_pass_smollm2", model="smollm2-135m-instruct", heads="smollm2-135m-instruct")
