"""What a command says while it works: to stderr, so that stdout holds results alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class _Output(Console):
    """Where nobody reads any more, as in `dlops list | head`, the command goes on without saying it: what it has yet to
    write, and its exit status, are not for who was reading."""

    def on_broken_pipe(self) -> None:
        self.let_go()

    def let_go(self) -> None:
        """Write no more: what Python still holds would fail once more when it ends."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def write(self, text: str) -> None:
        """As it is, to stdout. Raises OSError."""
        if self.quiet:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.on_broken_pipe()


log = Console(stderr=True, highlight=False)
out = _Output(highlight=False)
# A log file gets a line this often instead of a bar that redraws itself.
_PLAIN_INTERVAL_S = 5.0
_instead: Callable[[str], None] | None = None


class Bar(Protocol):
    def advance(self, steps: int = 1, *, note: str | None = None) -> None: ...


def say(message: str) -> None:
    """One line of progress."""
    if _instead is not None:
        _instead(message)
        return
    log.print(message, markup=False, emoji=False, soft_wrap=True)


def tell_instead(write: Callable[[str], None] | None) -> None:
    """Let `write` have what this process says; None for stderr again."""
    global _instead
    _instead = write


def to_fraction(bar: Bar, total: int) -> Callable[[float], None]:
    """What moves the bar, by `total` steps in all, to the fraction that it is called with."""
    done = 0

    def advance(fraction: float) -> None:
        nonlocal done
        steps = round(fraction * total) - done
        done += steps
        bar.advance(steps)

    return advance


@contextmanager
def progress_bar(title: str, *, total: int, shown: bool = True) -> Iterator[Bar]:
    """A bar on a terminal; a line every few seconds elsewhere. `advance` moves it and may set a note.

    shown: False in the processes beside the one that tells.
    """
    if not shown:
        yield _NoBar()
        return
    if not log.is_terminal:
        yield _PlainBar(title, total)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=log, transient=True) as progress:
        yield _RichBar(progress, progress.add_task(title, total=total, note=""))


class _NoBar:
    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        pass


class _RichBar:
    def __init__(self, progress: Progress, task: object) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=steps, **fields)  # type: ignore[arg-type]


class _PlainBar:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._note = title, total, 0, ""
        self._next = time.monotonic() + _PLAIN_INTERVAL_S

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        self._done += steps
        self._note = self._note if note is None else note
        if time.monotonic() >= self._next:
            say(f"{self._title}: {self._done}/{self._total} {self._note}".rstrip())
            self._next = time.monotonic() + _PLAIN_INTERVAL_S
