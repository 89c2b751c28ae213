"""The Medusa-1 training step beside a plain PyTorch step that does the same work, on SmolLM2's LM head.

    specjax run experiments/torch_step_smollm2.py   (needs torch: `make test` installs it)
    specjax run experiments/torch_step_smollm2.py --batch-size 2048 --repeats 9 --reduced-vocab-size 49152

Positions a second of both sides by turns, in float32 and bfloat16; minutes. Expect 0.96 to 1.16 of PyTorch's speed
with 1,024 positions over 8,192 rows, 1.1 to 1.3 with 2,048, 1.1 to 1.65 with 4,096, by the CPU.
"""

from specjax.studies.torch_step import TorchStep


def get_config() -> TorchStep:
    return TorchStep(name="torch_step_smollm2", model="smollm2-135m-instruct")
