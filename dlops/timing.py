"""Paired, interleaved timing of callables: they take turns in one run, so that what drifts hits all of them alike.

A round gives each callable one turn of equal length, in an order drawn anew each round. Before a turn the process is
left alone until its CPU use is gone: the thread pools of ONNX Runtime and OpenMP spin for tens of milliseconds after a
call, and on few cores that would be charged to whoever comes next.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]

# 368 samples are the fewest whose order statistics bound the 99th percentile from both sides at 95 %.
MIN_SAMPLES = 368
# Six pairs are the fewest whose order statistics bound a median from both sides at 95 %.
MIN_ROUNDS = 6
# A run that has too few samples when its time is up may take this much longer, no more.
STRETCH = 2.0
DRIFT_TOLERANCE = 0.02
_WARMUP_WINDOW_S = 0.05
_WARMUP_WINDOW_CALLS = 5
_WARMUP_WINDOWS = 3
_SETTLE_STEP_S = 0.001
_SETTLE_LIMIT_S = 0.15
_BUSY_SHARE = 0.3
# Calls in this first part of a turn refill the caches that the others' turns emptied: they are not kept.
_LEAD_IN = 0.1


class Clock(Protocol):
    """now_ns: monotonic. busy_ns: CPU time that all threads of this process have used."""

    def now_ns(self) -> int: ...
    def busy_ns(self) -> int: ...
    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def busy_ns(self) -> int:
        return time.process_time_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One callable's calls, in order. latencies_ns, starts_ns (from the run's start), turns (its round): (n,) each.

    warmup_calls were made before and are not among them. warmed_up: latency had settled when the warm-up ended.
    """

    latencies_ns: Samples
    starts_ns: Samples
    turns: Samples
    warmup_calls: int
    warmed_up: bool

    def by_turn(self) -> list[Samples]:
        """The latencies of each turn, in order."""
        return by_turn(self.latencies_ns, self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved:
    """Turn i of one callable and turn i of another were made in the same round: they are a pair."""

    runs: Mapping[str, Timed]
    rounds: int


class TimingInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle; `partial` holds the whole rounds made until then, at least one."""

    def __init__(self, partial: Interleaved) -> None:
        super().__init__()
        self.partial = partial


@dataclass(slots=True)
class _Arm:
    name: str
    call: Callable[[], object]
    latencies: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    warmup_calls: int = 0
    warmed_up: bool = False
    typical_ns: float = 0.0

    def cut_to(self, rounds: int) -> Timed:
        kept = sum(1 for turn in self.turns if turn < rounds)
        return Timed(
            latencies_ns=np.array(self.latencies[:kept], np.int64),
            starts_ns=np.array(self.starts[:kept], np.int64),
            turns=np.array(self.turns[:kept], np.int64),
            warmup_calls=self.warmup_calls,
            warmed_up=self.warmed_up,
        )


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    min_samples: int = MIN_SAMPLES,
    turn_s: float = 0.05,
    max_warmup_s: float = 5.0,
    seed: int = 0,
    clock: Clock | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Interleaved:
    """Every callable's latencies, made in turns within one run.

    budget_s: for all together, after the warm-up. The run ends once it is spent and each callable has `min_samples`;
    where samples are too few it goes on to at most twice the budget, and in any case to six rounds. max_warmup_s: for
    each callable. on_progress: told the fraction done after each round. The garbage collector is off during turns.
    Raises TimingInterrupted on Ctrl-C once a round is whole, plain KeyboardInterrupt before; what a callable raises
    goes through, with a note that names it.
    """
    if not runs:
        raise ValueError("nothing to time")
    clock = clock or SystemClock()
    arms = [_Arm(name, call) for name, call in runs.items()]
    order = random.Random(seed)  # noqa: S311 — an order to defeat systematic effects, not a secret
    rounds = 0
    with _collector_off():
        for arm in arms:
            _warm_up(arm, clock, max_warmup_s)
        began = clock.now_ns()
        try:
            while not _done(arms, rounds, (clock.now_ns() - began) / 1e9, budget_s, min_samples):
                for arm in order.sample(arms, len(arms)):
                    _settle(clock)
                    _take_turn(arm, clock, began=began, turn=rounds, turn_s=turn_s)
                rounds += 1
                gc.collect(0)
                if on_progress is not None:
                    on_progress(min(1.0, (clock.now_ns() - began) / 1e9 / budget_s) if budget_s > 0 else 1.0)
        except KeyboardInterrupt:
            if rounds == 0:
                raise
            raise TimingInterrupted(_result(arms, rounds)) from None
    return _result(arms, rounds)


def by_turn(samples: Samples, turns: Samples) -> list[Samples]:
    """samples, turns: (n,), turns ascending. The samples of each turn, in order."""
    if not len(turns):
        return []
    return list(np.split(samples, np.flatnonzero(np.diff(turns)) + 1))


def drifted(before: Samples, after: Samples, *, tolerance: float = DRIFT_TOLERANCE) -> bool:
    """Whether the median moved by more than `tolerance` of itself and by more than three of its standard errors."""
    first, second = float(np.median(before)), float(np.median(after))
    error = math.hypot(_median_error(before), _median_error(after))
    return abs(second - first) > max(tolerance * first, 3 * error)


def steady(windows: list[Samples], *, tolerance: float = DRIFT_TOLERANCE) -> bool:
    """Whether the last three windows show no drift, each against the one before and the last against the first."""
    if len(windows) < _WARMUP_WINDOWS:
        return False
    first, second, third = windows[-_WARMUP_WINDOWS:]
    pairs = ((first, second), (second, third), (first, third))
    return not any(drifted(before, after, tolerance=tolerance) for before, after in pairs)


def _median_error(samples: Samples) -> float:
    deviation = 1.4826 * float(np.median(np.abs(samples - np.median(samples))))
    return 1.2533 * deviation / math.sqrt(len(samples))


def _warm_up(arm: _Arm, clock: Clock, limit_s: float) -> None:
    """Call until three windows in a row show no drift, or the limit is reached.

    The very first call is in no window: it allocates, compiles and pages in.
    """
    began = clock.now_ns()
    _timed(arm, clock)
    arm.warmup_calls = 1
    windows: list[Samples] = []
    while True:
        window: list[int] = []
        opened = clock.now_ns()
        while len(window) < _WARMUP_WINDOW_CALLS or clock.now_ns() - opened < _WARMUP_WINDOW_S * 1e9:
            window.append(_timed(arm, clock))
            if (clock.now_ns() - began) / 1e9 >= limit_s:
                break
        arm.warmup_calls += len(window)
        arm.typical_ns = float(np.median(window))
        if len(window) >= _WARMUP_WINDOW_CALLS:
            windows.append(np.array(window, np.int64))
        arm.warmed_up = steady(windows)
        if arm.warmed_up or (clock.now_ns() - began) / 1e9 >= limit_s:
            return


def _take_turn(arm: _Arm, clock: Clock, *, began: int, turn: int, turn_s: float) -> None:
    """Calls for `turn_s`, at least one kept; a call longer than the lead-in needs none and drops none."""
    opened = clock.now_ns()
    lead_ns = turn_s * _LEAD_IN * 1e9
    if arm.typical_ns > lead_ns:
        lead_ns = 0.0
    kept = 0
    while kept == 0 or clock.now_ns() - opened < turn_s * 1e9:
        start = clock.now_ns()
        latency = _timed(arm, clock)
        if start - opened >= lead_ns:
            arm.latencies.append(latency)
            arm.starts.append(start - began)
            arm.turns.append(turn)
            kept += 1


def _timed(arm: _Arm, clock: Clock) -> int:
    try:
        start = clock.now_ns()
        arm.call()
        return clock.now_ns() - start
    except Exception as error:
        error.add_note(f"while timing {arm.name}")
        raise


def _settle(clock: Clock) -> None:
    """Wait until this process uses next to no CPU, for at most 0.15 s."""
    began = clock.now_ns()
    while clock.now_ns() - began < _SETTLE_LIMIT_S * 1e9:
        wall, busy = clock.now_ns(), clock.busy_ns()
        clock.sleep(_SETTLE_STEP_S)
        if clock.busy_ns() - busy < _BUSY_SHARE * (clock.now_ns() - wall):
            return


def _done(arms: list[_Arm], rounds: int, elapsed_s: float, budget_s: float, min_samples: int) -> bool:
    if rounds < MIN_ROUNDS or elapsed_s < budget_s:
        return False
    return elapsed_s >= STRETCH * budget_s or all(len(arm.latencies) >= min_samples for arm in arms)


def _result(arms: list[_Arm], rounds: int) -> Interleaved:
    return Interleaved(runs={arm.name: arm.cut_to(rounds) for arm in arms}, rounds=rounds)


@contextmanager
def _collector_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    # Frozen, the heap made until now costs nothing in the collections between rounds.
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
