"""Text as it is decoded: streaming detokenisation and stop strings."""

from collections.abc import Sequence

import numpy as np

from specjax.errors import PromptError
from specjax.loading.tokenizer import Tokenizer, common_beginning


class TextStream:
    """Turns tokens into text as they come; the pieces add up to what decoding all tokens at once gives.

    What later tokens may still change is held back: a character whose bytes are spread over several tokens, a run of
    byte tokens (in a byte-fallback tokenizer one bad byte turns the whole run into replacement characters), and what
    may be the beginning of a stop string. The text ends before the first stop string; then `stopped` is true.

        text = TextStream(model.tokenizer, stop=["\\n\\n"])
        for item in stream(model, prompt_ids, drafter=drafter):
            print(text.push(item.tokens), end="")
            if text.stopped:
                break
        print(text.finish())

    A stop string may also be a special token such as "<|im_end|>", which is never printed: the text ends where it
    comes.

    Raises:
      PromptError: an empty stop string, one string in place of a sequence of them, or one with a special token among
        other characters, which no text can hold.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(one, str) for one in stop):
            raise PromptError(f"stop is {stop!r}; expected a sequence of strings, such as ['\\n\\n'].")
        if "" in stop:
            raise PromptError("a stop string is empty; remove it.")
        special = tokenizer.special_ids
        for one in stop:
            if one not in special and (inside := next((token for token in special if token in one), None)):
                raise PromptError(
                    f"the stop string {one!r} holds the special token {inside!r}, which is never printed; use that by "
                    "itself."
                )
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_ids = {special[one] for one in stop if one in special}
        self._tokens: list[int] = []
        self._shown = ""
        self.stopped = False

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Takes tokens and gives the text that is certain now."""
        for token in map(int, tokens):
            if self.stopped:
                return ""
            if token in self._stop_ids:
                rest = self.finish()
                self.stopped = True
                return rest
            self._tokens.append(token)
        if self.stopped:
            return ""
        text = self._until_stop(self._tokenizer.decode_certain(self._tokens))
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
        # A decoder of a kind that nobody knew may rewrite what was shown; what comes after it is not lost.
        known = len(common_beginning(self._shown, text))
        piece, self._shown = text[known:], text
        return piece
