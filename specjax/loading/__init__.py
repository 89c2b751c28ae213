"""Checkpoints, GGUF files, heads in every layout and tokenizers, from disk and to it."""
