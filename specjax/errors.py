"""Every error specjax raises on purpose. Each message names the value, what was expected, and the remedy."""


class SpecJaxError(Exception):
    """Base of all deliberate errors; catch this to catch them all."""


class ConfigError(SpecJaxError, ValueError):
    """A model, heads, acceptance or experiment configuration that cannot be honoured."""


class CheckpointError(SpecJaxError, ValueError):
    """A checkpoint whose files, tensors or metadata do not fit what they should hold."""


class TreeError(SpecJaxError, ValueError):
    """A draft tree that is not a tree, or does not fit the drafter that should fill it."""


class PromptError(SpecJaxError, ValueError):
    """A prompt or token budget that cannot be decoded (empty, out of vocabulary, too long)."""


class DataError(SpecJaxError, ValueError):
    """Training or evaluation data that is empty, malformed or made for another model."""
