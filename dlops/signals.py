"""Ctrl-C and SIGTERM, turned into exceptions that end a command with a status of its own."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
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
# What was measured is written in a few seconds. Whoever waits that long and presses again means it.
_SAVING_S = 30.0
_received: list[int] = []
_deaf_until_s = 0.0


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
def heard_once() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM raises as ever. Those that follow within 30 s do nothing until the block is left, or
    `listen_again` is called: what was measured must not be lost to impatience on its way into a report.

    The handler itself sees to that, so no moment lies between the exception and what catches it. Within another such
    block, and in other threads, where no signal arrives, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or _is_in_force():
        yield
        return
    found = {number: signal.getsignal(number) for number in _STATUS}
    before = {number: handler for number, handler in found.items() if callable(handler)}
    for number, handler in before.items():
        signal.signal(number, _Once(handler))
    try:
        yield
    finally:
        listen_again()
        for number, handler in before.items():
            signal.signal(number, handler)


def pass_over() -> None:
    """A signal was heard by a handler other than that of `heard_once`: within its block, those that follow wait too."""
    global _deaf_until_s
    if _is_in_force():
        _deaf_until_s = time.monotonic() + _SAVING_S


def listen_again() -> None:
    """Within `heard_once`: the next signal raises."""
    global _deaf_until_s
    _deaf_until_s = 0.0


class _Once:
    """A handler that hands on no signal that comes while those are passed over."""

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _deaf_until_s
        if time.monotonic() >= _deaf_until_s:
            _deaf_until_s = time.monotonic() + _SAVING_S
            self._handler(number, frame)


def _is_in_force() -> bool:
    return isinstance(signal.getsignal(signal.SIGINT), _Once)


@contextmanager
def shielded() -> Iterator[None]:
    """While what was measured is written, Ctrl-C and SIGTERM do nothing, the first one included.

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
    listen_again()
    again = threading.Timer(_AGAIN_S, signal.pthread_kill, [threading.main_thread().ident, _received[-1]])
    again.daemon = True
    again.start()
