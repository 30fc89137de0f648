"""A queue in front of a session, in the session's own process: requests come due on a schedule, whether or not earlier
ones are done, and are run one at a time, first come, first served."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

# A sleep ends late by tens of microseconds, more on a busy machine; the rest is waited for by looking at the clock.
_SPIN_NS = 200_000


class Ticker(Protocol):
    """Time in nanoseconds from a schedule's start, and whether the schedule is to end before its time."""

    def now_ns(self) -> int: ...

    def wait_until(self, due_ns: int) -> bool:
        """Return at that time, at once where it is past: True, or False where the schedule is to end."""
        ...


class PipeTicker:
    """The process's clock. Whatever comes on `pipe` ends the schedule."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._start_ns = time.perf_counter_ns()

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._start_ns

    def wait_until(self, due_ns: int) -> bool:
        sleep_s = max(0, due_ns - _SPIN_NS - self.now_ns()) / 1e9
        if select.select([self._pipe], [], [], sleep_s)[0]:
            return False
        while self.now_ns() < due_ns:
            pass
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What became of each request, from the schedule's start. begun_ns, ended_ns: (n,), of its call; -1 where it was
    not run. interrupted: by Ctrl-C; else what was not run was given up."""

    begun_ns: Integers
    ended_ns: Integers
    interrupted: bool

    def lag_ns(self, due_ns: Integers) -> Integers:
        """(run,): how much later a call began than it was due and the one before it was done."""
        ran = self.begun_ns >= 0
        free = np.concatenate([np.zeros(1, np.int64), self.ended_ns[ran]])[:-1]
        return np.asarray(self.begun_ns[ran] - np.maximum(due_ns[ran], free), np.int64)


def keep_schedule(call: Callable[[], object], due_ns: Integers, *, give_up_ns: int, ticker: Ticker) -> Kept:
    """Run `call` once for each request. due_ns: (n,), ascending. What has not begun by give_up_ns is not run."""
    begun, ended = (np.full(len(due_ns), -1, np.int64) for _ in range(2))
    interrupted = False
    for index, due in enumerate(due_ns.tolist()):
        if not ticker.wait_until(due):
            interrupted = True
            break
        begin = ticker.now_ns()
        if begin > give_up_ns:
            break
        call()
        begun[index], ended[index] = begin, ticker.now_ns()
    return Kept(begun_ns=begun, ended_ns=ended, interrupted=interrupted)
