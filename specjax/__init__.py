"""specjax: a functional JAX laboratory for speculative decoding.

A target model is a pure function, a draft is a static tree, a round is one jitted step, and losslessness is a test.
Names are imported when they are first asked for: `import specjax` alone loads neither JAX nor a loader.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specjax.acceptance import Greedy, Sample, Typical
    from specjax.batch import generate_batch
    from specjax.decode import Generation, Round, generate, stream
    from specjax.drafters.base import Context, Drafter, DrafterBase
    from specjax.drafters.draft_model import DraftModelDrafter
    from specjax.drafters.hybrid import HybridDrafter
    from specjax.drafters.medusa import MedusaDrafter
    from specjax.drafters.ngram import NgramDrafter
    from specjax.drafters.registry import DrafterOption, Ingredients, register_drafter
    from specjax.errors import CheckpointError, ConfigError, DataError, PromptError, SpecJaxError, TreeError
    from specjax.heads import Heads, MedusaConfig
    from specjax.loading.head_files import load_heads, save_heads
    from specjax.loading.load import Model, load_draft, load_model
    from specjax.loading.text_stream import TextStream
    from specjax.proposal import NO_DRAFT, Proposal, Verdict
    from specjax.target.config import ModelConfig
    from specjax.tree import Tree

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "specjax.errors",
    "ConfigError": "specjax.errors",
    "Context": "specjax.drafters.base",
    "DataError": "specjax.errors",
    "DraftModelDrafter": "specjax.drafters.draft_model",
    "Drafter": "specjax.drafters.base",
    "DrafterBase": "specjax.drafters.base",
    "DrafterOption": "specjax.drafters.registry",
    "Generation": "specjax.decode",
    "Greedy": "specjax.acceptance",
    "Heads": "specjax.heads",
    "HybridDrafter": "specjax.drafters.hybrid",
    "MedusaConfig": "specjax.heads",
    "MedusaDrafter": "specjax.drafters.medusa",
    "Model": "specjax.loading.load",
    "ModelConfig": "specjax.target.config",
    "NO_DRAFT": "specjax.proposal",
    "NgramDrafter": "specjax.drafters.ngram",
    "PromptError": "specjax.errors",
    "Proposal": "specjax.proposal",
    "Round": "specjax.decode",
    "Sample": "specjax.acceptance",
    "SpecJaxError": "specjax.errors",
    "TextStream": "specjax.loading.text_stream",
    "Tree": "specjax.tree",
    "TreeError": "specjax.errors",
    "Typical": "specjax.acceptance",
    "Verdict": "specjax.proposal",
    "generate": "specjax.decode",
    "generate_batch": "specjax.batch",
    "load_draft": "specjax.loading.load",
    "load_heads": "specjax.loading.head_files",
    "load_model": "specjax.loading.load",
    "Ingredients": "specjax.drafters.registry",
    "register_drafter": "specjax.drafters.registry",
    "save_heads": "specjax.loading.head_files",
    "stream": "specjax.decode",
}
__all__ = [
    "NO_DRAFT",
    "CheckpointError",
    "ConfigError",
    "Context",
    "DataError",
    "DraftModelDrafter",
    "Drafter",
    "DrafterBase",
    "DrafterOption",
    "Generation",
    "Greedy",
    "Heads",
    "HybridDrafter",
    "Ingredients",
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
    "register_drafter",
    "save_heads",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
