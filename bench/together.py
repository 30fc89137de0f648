"""Calls in flight on one target of this machine: threads that share its session, as those of a server's process do."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dlops.timing import Clock, Local, SystemClock, Turn, WarmUp, settle, steady

_WINDOW_S = 0.1
_FEWEST_CALLS = 5
# Of each caller: the first call of a turn finds the others just begun, and is dropped.
_CALLS_A_TURN = 20


class Together:
    """An arm (see dlops.timing) of several others, whose calls are made at the same time, each after its own last one.

    A caller whose turn is over goes on calling until that of the last one is: no call that counts has fewer beside it.
    What a call raises goes through when the turn of all has ended.
    """

    def __init__(self, callers: Sequence[Local], clock: Clock | None = None) -> None:
        self._callers, self._clock = callers, clock or SystemClock()
        self._threads = ThreadPoolExecutor(len(callers))
        self._counting = 0
        self._lock = threading.Lock()
        self._typical_s = 0.0

    def warm_up(self, limit_s: float) -> WarmUp:
        """Until three windows in a row show no drift, all callers taken together, or the limit is reached."""
        began = self._clock.now_ns()
        calls, settled, windows = 0, False, []
        while not calls or (not settled and (self._clock.now_ns() - began) / 1e9 < limit_s):
            window = self._calls_for(_WINDOW_S).latencies_ns
            calls += len(window)
            self._typical_s = float(np.median(window)) / 1e9
            if len(window) >= _FEWEST_CALLS:
                windows.append(window)
            settled = steady(windows)
        settle(self._clock)
        return WarmUp(calls=calls, settled=settled)

    def take_turn(self, turn_s: float) -> Turn:
        """The calls of all, by when they began; longer than asked where calls are long."""
        turn = self._calls_for(max(turn_s, _CALLS_A_TURN * self._typical_s))
        gc.collect(0)
        settle(self._clock)
        return turn

    def _calls_for(self, seconds: float) -> Turn:
        self._counting = len(self._callers)

        def one(caller: Local) -> Turn:
            try:
                turn = caller.calls_for(seconds)
            finally:
                with self._lock:
                    self._counting -= 1
            while self._counting:
                caller.calls_for(0.0)
            return turn

        turns = list(self._threads.map(one, self._callers))
        starts = np.concatenate([turn.starts_ns for turn in turns])
        order = np.argsort(starts, kind="stable")
        return Turn(starts_ns=starts[order], latencies_ns=np.concatenate([turn.latencies_ns for turn in turns])[order])
