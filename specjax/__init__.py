"""specjax: a functional JAX laboratory for speculative decoding.

A target model is a pure function, a draft is a static tree, a round is one jitted step, and losslessness is a test.
"""

from specjax.acceptance import Greedy, Sample, Typical
from specjax.config import ModelConfig
from specjax.decode import Generation, Round, generate, stream
from specjax.drafters.medusa import MedusaDrafter
from specjax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PromptError,
    SpecJaxError,
    TreeError,
)
from specjax.heads import Heads, MedusaConfig
from specjax.loading.heads import load_heads, save_heads
from specjax.loading.load import Model, load_model
from specjax.tree import Tree

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Generation",
    "Greedy",
    "Heads",
    "MedusaConfig",
    "MedusaDrafter",
    "Model",
    "ModelConfig",
    "PromptError",
    "Round",
    "Sample",
    "SpecJaxError",
    "Tree",
    "TreeError",
    "Typical",
    "generate",
    "load_heads",
    "load_model",
    "save_heads",
    "stream",
]
