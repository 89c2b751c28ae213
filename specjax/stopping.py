"""SIGINT and SIGTERM: the first asks a run to end at its next good place, the second ends it where it stands."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked: signal.Signals | None = None  # signals are the process's own, and so is what they asked for


class Stopped(BaseException):  # as KeyboardInterrupt: no `except Exception` is to swallow it
    """A run was asked to stop; the message says by what, and how far it came.

    Attributes:
      signal: that asked for it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.signal = _asked


@contextmanager
def on_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM ask first (`asked`), and raise KeyboardInterrupt when they come once more.

    Outside the main thread, where Python takes no signals, it changes nothing.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked is not None:
            raise KeyboardInterrupt
        _asked = signal.Signals(number)
        # Past Python's buffers, which what was interrupted may be writing to.
        os.write(2, f"\n{_asked.name}: ending at the next good place; once more ends at once.\n".encode())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


def asked() -> signal.Signals | None:
    """The signal that asked to stop, or None."""
    return _asked


def check(done: str) -> None:
    """Raises Stopped if that was asked for; `done` says how far the run came."""
    if _asked is not None:
        raise Stopped(reason(done))


def reason(done: str) -> str:
    """How a result says that it is partial."""
    return f"{_asked.name if _asked else 'stopped'}: {done}"
