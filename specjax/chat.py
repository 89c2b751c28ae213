"""Text on the terminal as it is decoded: streaming detokenisation, `generate` and `chat`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from specjax.decode import Round
from specjax.errors import PromptError
from specjax.loading.tokenizer import Tokenizer

DRAFTED, OWN = "green", "default"


class TextStream:
    """Turns tokens into text as they come; the pieces add up to what decoding all tokens at once gives.

    A character whose bytes are spread over several tokens is held back until it is complete, and so is what may be the
    beginning of a stop string. The text ends before the first stop string; then `stopped` is true.

    Raises:
      PromptError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
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
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        self.stopped = bool(found)
        return text[: min(found)] if found else text

    def _begun(self, text: str) -> int:
        # The length of the longest end of the text that begins a stop string.
        return max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def _advance(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""  # a decoder that rewrites its end: wait for more
        piece, self._shown = text[len(self._shown) :], text
        return piece


@dataclass
class Tally:
    """Counts over streamed rounds; the first item of a stream is the prefill's token."""

    tokens: int = 0
    rounds: int = -1

    def add(self, item: Round) -> None:
        """Counts a round."""
        self.tokens += len(item.tokens)
        self.rounds += 1

    def __str__(self) -> str:
        if self.rounds < 1:
            return f"{self.tokens} tokens, no rounds"
        rate = (self.tokens - 1) / self.rounds
        return (
            f"{self.tokens} tokens, {self.rounds} rounds after the prefill: {rate:.2f} tokens per round "
            f"({rate - 1:.2f} of them drafts)"
        )


def show(
    rounds: Iterable[Round], tokenizer: Tokenizer, console: Console, *, colour: bool, stop: Sequence[str] = ()
) -> tuple[str, Tally]:
    """Prints rounds as they come, accepted drafts apart from the target's own tokens; gives the text and the counts.

    No further round is asked for once a stop string has been said; it is not part of the text.
    """
    stream, tally, said = TextStream(tokenizer, stop), Tally(), ""
    for item in rounds:
        tally.add(item)
        for piece, style in (
            (stream.push(item.tokens[: item.accepted]), DRAFTED),
            (stream.push(item.tokens[item.accepted :]), OWN),
        ):
            said += piece
            console.print(Text(piece, style if colour else ""), end="", soft_wrap=True)
        if stream.stopped:
            break
    rest = stream.finish()
    console.print(Text(rest), soft_wrap=True)
    return said + rest, tally


def read_lines(console: Console) -> Iterator[str]:
    """What the user types, until the end of input or /exit."""
    while True:
        try:
            line = console.input("[bold]you> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line:
            yield line
