"""Rounds on the terminal, for `generate` and `chat`: text as it comes, accepted drafts coloured, counts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from specjax.decode import Round
from specjax.errors import SpecJaxError
from specjax.loading.text_stream import TextStream
from specjax.loading.tokenizer import Tokenizer

DRAFTED, OWN = "green", "default"


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


@dataclass
class Shown:
    """What `show` has printed so far: after an interruption it holds what was said until then."""

    text: str = ""
    tally: Tally = field(default_factory=Tally)


def show(
    rounds: Iterable[Round],
    tokenizer: Tokenizer,
    console: Console,
    shown: Shown,
    *,
    colour: bool,
    stop: Sequence[str] = (),
) -> None:
    """Prints rounds as they come, accepted drafts apart from the target's own tokens; `shown` keeps text and counts.

    No further round is asked for once a stop string has been said; it is not part of the text.
    """
    stream = TextStream(tokenizer, stop)
    try:
        _show(rounds, stream, console, shown, colour)
    except SpecJaxError:  # its message begins a line
        _print(console, "\n", "")
        raise
    rest = stream.finish()
    shown.text += rest
    _print(console, rest + "\n", "")


def _show(rounds: Iterable[Round], stream: TextStream, console: Console, shown: Shown, colour: bool) -> None:
    for item in rounds:
        shown.tally.add(item)
        for piece, style in (
            (stream.push(item.tokens[: item.accepted]), DRAFTED),
            (stream.push(item.tokens[item.accepted :]), OWN),
        ):
            shown.text += piece
            _print(console, piece, style if colour else "")
        if stream.stopped:
            break


def _print(console: Console, text: str, style: str) -> None:
    # A segment as it is: rich's own texts would lose tabs and carriage returns, of which a Makefile or a table is made.
    console.print(Segments([Segment(text, Style.parse(style))]), end="", soft_wrap=True)


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
