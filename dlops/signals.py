"""Ctrl-C and SIGTERM, turned into exceptions that end a command with a status of its own."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Interrupted(KeyboardInterrupt):
    """Ctrl-C.

    A type of its own, because CPython 3.11 notes a plain KeyboardInterrupt that leaves code run from a string (every
    dataclass and named tuple is made so, while modules are imported) and then kills the process when it ends, whatever
    status it asked for.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: what keeps its work on Ctrl-C keeps it here too, as when a batch job reaches its time limit."""


_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Long enough for the finalizer that swallowed a signal to be over, too short for a person to notice.
_AGAIN_S = 0.02
_received: list[int] = []


def raise_on_signals() -> None:
    """From here on SIGINT raises Interrupted and SIGTERM Terminated, in the main thread."""
    signal.signal(signal.SIGINT, _raise)
    signal.signal(signal.SIGTERM, _raise)
    sys.unraisablehook = _raise_again


def die_on_signals() -> None:
    """From here on a signal ends the process at once: what could be saved is saved."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def shielded() -> Iterator[None]:
    """While what was measured is put together and written, Ctrl-C and SIGTERM do nothing: impatience must not lose it.

    In the main thread; elsewhere no signal arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _pass_over) for number in _STATUS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_over(number: int, frame: FrameType | None) -> None:
    return


def received_status() -> int | None:
    """130 or 143 where a signal came, whatever became of its exception; else None.

    An extension module whose import a signal cuts short raises ImportError, which tells nothing of the cause.
    """
    return _STATUS[signal.Signals(_received[0])] if _received else None


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise Interrupted if number == signal.SIGINT else Terminated


def _raise_again(unraisable: sys.UnraisableHookArgs) -> None:
    """A signal that came in a finalizer or a callback of C code, where exceptions are printed and forgotten."""
    if not isinstance(unraisable.exc_value, Interrupted | Terminated):
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(_AGAIN_S, signal.pthread_kill, [threading.main_thread().ident, _received[-1]])
    again.daemon = True
    again.start()
