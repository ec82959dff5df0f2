"""Ctrl-C and signals: clean up, say what is left and how to go on, and end with 128 + the signal's number."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
STARTS_ANEW = "unfinished files were removed and older ones are unchanged; run the same command again"


class Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C's, raised in its place, so that all that cleans up after one does after the other."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated for SIGTERM and SIGHUP within the block; signals that are ignored (nohup) stay so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] is signal.SIG_DFL:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in SIGNALS:
            if before[number] is signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def left_behind(sentence: Callable[[], str]) -> Iterator[None]:
    """Say what an interruption of the block leaves, and how to go on; of nested blocks the outermost says it."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.args = (sentence(),)
        raise


def message_and_exit_code(interruption: KeyboardInterrupt) -> tuple[str, int]:
    """What to print, and the exit code that shells know."""
    number = interruption.number if isinstance(interruption, Terminated) else signal.SIGINT
    (sentence,) = interruption.args or (STARTS_ANEW,)
    return f"Interrupted by {signal.Signals(number).name}: {sentence}", 128 + number


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)
