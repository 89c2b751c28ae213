"""The Medusa-1 training step beside a plain PyTorch one: SmolLM2's width, four heads, 8,192 rows of its LM head.

    specjax run experiments/torch_step_smollm2.py   (needs torch: `make test` installs it)

A step is 1,024 positions: forward, backward, clipping and AdamW. Record (2 CPU cores with AVX2, shared with other work,
jax 0.10.2, torch 2.13, float32): 342 positions/s (303-415) against 235 (209-282), ratio 1.47 (1.08-1.99) over 7
alternating repeats; losses equal to 4e-7. Bound to one core, in CPU time, which other work does not disturb: 1.04 s a
step against 1.35 s, ratio 1.29 in each of 3 repeats. Products in bfloat16 are emulated on that machine: torch then
takes tens of seconds a step, ours longer than in float32.
"""

from specjax.analysis.torch_step import TorchStep


def get_config() -> TorchStep:
    return TorchStep(name="torch_step_smollm2", model="smollm2-135m-instruct")
