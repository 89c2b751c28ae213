"""specjax: a functional JAX laboratory for speculative decoding.

A target model is a pure function, a draft is a static tree, a round is one jitted step, and losslessness is a test.
"""

from specjax.acceptance import Greedy, Sample, Typical
from specjax.config import ModelConfig
from specjax.decode import Generation, Round, generate, generate_batch, stream
from specjax.drafters.base import Context, Drafter
from specjax.drafters.draft_model import DraftModelDrafter
from specjax.drafters.hybrid import HybridDrafter
from specjax.drafters.medusa import MedusaDrafter
from specjax.drafters.ngram import NgramDrafter
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
from specjax.loading.load import Model, load_draft, load_model
from specjax.proposal import NO_DRAFT, Proposal, Verdict
from specjax.text import TextStream
from specjax.tree import Tree

__version__ = "0.1.0"

__all__ = [
    "NO_DRAFT",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "DraftModelDrafter",
    "Drafter",
    "Generation",
    "Greedy",
    "Heads",
    "HybridDrafter",
    "MedusaConfig",
    "MedusaDrafter",
    "Model",
    "ModelConfig",
    "NgramDrafter",
    "PromptError",
    "Proposal",
    "Round",
    "Sample",
    "SpecJaxError",
    "TextStream",
    "Tree",
    "TreeError",
    "Typical",
    "Verdict",
    "generate",
    "generate_batch",
    "load_draft",
    "load_heads",
    "load_model",
    "save_heads",
    "stream",
]
