"""Models from Hugging Face directories and repositories, GGUF files, and the packaged name."""

from specjax.loading.load import PACKAGED, Model, load_model
from specjax.loading.tokenizer import Tokenizer

__all__ = ["PACKAGED", "Model", "Tokenizer", "load_model"]
