"""Text as it is decoded: streaming detokenisation and stop strings."""

from collections.abc import Sequence

import numpy as np

from specjax.errors import PromptError
from specjax.loading.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as they come; the pieces add up to what decoding all tokens at once gives.

    A character whose bytes are spread over several tokens is held back until it is complete, and so is what may be the
    beginning of a stop string. The text ends before the first stop string; then `stopped` is true.

        text = TextStream(model.tokenizer, stop=["\\n\\n"])
        for item in stream(model, prompt_ids, drafter=drafter):
            print(text.push(item.tokens), end="")
            if text.stopped:
                break
        print(text.finish())

    Raises:
      PromptError: an empty stop string, or one string in place of a sequence of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(one, str) for one in stop):
            raise PromptError(f"stop is {stop!r}; expected a sequence of strings, such as ['\\n\\n'].")
        if "" in stop:
            raise PromptError("a stop string is empty; remove it.")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._shown = ""
        self.stopped = False

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Takes tokens and gives the text that is certain now."""
        if self.stopped:
            return ""
        self._tokens += [int(t) for t in tokens]
        text = self._until_stop(self._tokenizer.decode(self._tokens).rstrip("\ufffd"))
        return self._advance(text if self.stopped else text[: len(text) - self._begun(text)])

    def finish(self) -> str:
        """Gives what is left, an incomplete character as U+FFFD."""
        return "" if self.stopped else self._advance(self._until_stop(self._tokenizer.decode(self._tokens)))

    def _until_stop(self, text: str) -> str:
        # The one that ends first, as token by token: which it is must not depend on how rounds cut the text.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        return text[: min(found)[1]] if found else text

    def _begun(self, text: str) -> int:
        # The length of the longest end of the text that begins a stop string.
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def _advance(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""  # a decoder that rewrites its end: wait for more
        piece, self._shown = text[len(self._shown) :], text
        return piece
