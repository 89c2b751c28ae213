"""The Medusa-1 training step beside a plain PyTorch one: SmolLM2's width, four heads, 8,192 rows of its LM head.

specjax run experiments/torch_step_smollm2.py   (needs torch: `make test` installs it)
"""

from specjax.analysis.torch_step import TorchStep


def get_config() -> TorchStep:
    return TorchStep(name="torch_step_smollm2", model="smollm2-135m-instruct")
