"""Text on the terminal as it is decoded: streaming detokenisation, `generate` and `chat`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from specjax.decode import Round
from specjax.loading.tokenizer import Tokenizer

DRAFTED, OWN = "green", "default"


class TextStream:
    """Turns tokens into text as they come; the pieces add up to what decoding all tokens at once gives.

    A character whose bytes are spread over several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Takes tokens and gives the text that is certain now."""
        self._tokens += [int(t) for t in tokens]
        return self._advance(self._tokenizer.decode(self._tokens).rstrip("\ufffd"))

    def finish(self) -> str:
        """Gives what is left, an incomplete character as U+FFFD."""
        return self._advance(self._tokenizer.decode(self._tokens))

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


def show(rounds: Iterable[Round], tokenizer: Tokenizer, console: Console, *, colour: bool) -> tuple[str, Tally]:
    """Prints rounds as they come, accepted drafts apart from the target's own tokens; gives the text and the counts."""
    stream, tally, said = TextStream(tokenizer), Tally(), ""
    for item in rounds:
        tally.add(item)
        for piece, style in (
            (stream.push(item.tokens[: item.accepted]), DRAFTED),
            (stream.push(item.tokens[item.accepted :]), OWN),
        ):
            said += piece
            console.print(Text(piece, style if colour else ""), end="", soft_wrap=True)
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
