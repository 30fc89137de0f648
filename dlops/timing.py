"""Paired, interleaved timing: what is measured takes turns in one run, so that what drifts hits all of it alike.

A round gives each arm one turn of equal length, in an order drawn anew each round. After a turn the arm's process is
left alone until its CPU use is gone: the thread pools of ONNX Runtime and OpenMP spin for tens of milliseconds after a
call, and on few cores that would be charged to whoever comes next.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
# How often a run may be made longer: each look at what was measured makes a lucky stop a little likelier.
_LOOKS = 4
# A run that has too few samples when its time is up may take this much longer, no more.
STRETCH = 2.0
DRIFT_TOLERANCE = 0.02
_WARMUP_WINDOW_S = 0.05
_WARMUP_WINDOW_CALLS = 5
_WARMUP_WINDOWS = 3
_SETTLE_STEP_S = 0.001
# Longer than the ticks (4 or 10 ms) in which many kernels count the CPU time of threads that are running: between two
# of them a spinning thread seems to rest.
_SETTLE_WINDOW_S = 0.012
# OpenMP of Intel's spins for 0.2 s.
_SETTLE_LIMIT_S = 0.3
_BUSY_SHARE = 0.3
# Calls in this first part of a turn refill the caches that the others' turns emptied: they are not kept.
_LEAD_IN = 0.1


class Clock(Protocol):
    """now_ns: monotonic, the same in every process. busy_ns: CPU time that all threads of this process have used."""

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
class WarmUp:
    """calls: made and not kept. settled: latency had stopped drifting when it ended."""

    calls: int
    settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The kept calls of one turn, in order. starts_ns (on the clock that all processes share), latencies_ns: (n,).

    parts_ns: by name, what else was timed of each call: (n,).
    """

    starts_ns: Samples
    latencies_ns: Samples
    parts_ns: Mapping[str, Samples] = field(default_factory=dict)


class Arm(Protocol):
    """What takes turns, in this process or another. Both methods return once its threads have come to rest."""

    def warm_up(self, limit_s: float) -> WarmUp:
        """Call until latency has stopped drifting or the limit is reached."""

    def take_turn(self, turn_s: float) -> Turn:
        """Calls for that long, at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One arm's calls, in order. latencies_ns, starts_ns (from the run's start), turns (its round), parts_ns: (n,).

    warmup_calls were made before and are not among them. warmed_up: latency had settled when the warm-up ended.
    """

    latencies_ns: Samples
    starts_ns: Samples
    turns: Samples
    warmup_calls: int
    warmed_up: bool
    parts_ns: Mapping[str, Samples] = field(default_factory=dict)

    def by_turn(self) -> list[Samples]:
        """The latencies of each turn, in order."""
        return by_turn(self.latencies_ns, self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interleaved:
    """Turn i of one arm and turn i of another were made in the same round: they are a pair.

    spent_s: what all the turns took together, with the waits between them. began_ns: when the first began, on the
    clock that it was timed by.
    """

    runs: Mapping[str, Timed]
    rounds: int
    spent_s: float
    began_ns: int


class TimingFailedError(Exception):
    """An arm raised in the middle: the cause is what it raised, `partial` the whole rounds made until then."""

    def __init__(self, partial: Interleaved) -> None:
        super().__init__()
        self.partial = partial


class TimingInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle; `partial` holds the whole rounds made until then, at least one."""

    def __init__(self, partial: Interleaved) -> None:
        super().__init__()
        self.partial = partial


class Local:
    """An arm that is a callable of this process. What it raises goes through, with a note that names it.

    before: made ahead of every call, outside its latency. parts: asked after a call for what else was timed of it, by
    names that are the same for every call.
    """

    def __init__(
        self, name: str, call: Callable[[], object], clock: Clock | None = None, *,
        before: Callable[[], object] | None = None, parts: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:  # fmt: skip
        self._name, self._call, self._clock = name, call, clock or SystemClock()
        self._before, self._parts = before, parts
        self._typical_ns = 0.0

    def warm_up(self, limit_s: float) -> WarmUp:
        """Until three windows in a row show no drift, or the limit is reached.

        The very first call is in no window: it allocates, compiles and pages in.
        """
        clock = self._clock
        began = clock.now_ns()
        self._timed()
        calls, settled = 1, False
        windows: list[Samples] = []
        while calls == 1 or (not settled and (clock.now_ns() - began) / 1e9 < limit_s):
            window: list[int] = []
            opened = clock.now_ns()
            while len(window) < _WARMUP_WINDOW_CALLS or clock.now_ns() - opened < _WARMUP_WINDOW_S * 1e9:
                window.append(self._timed()[1])
                if (clock.now_ns() - began) / 1e9 >= limit_s:
                    break
            calls += len(window)
            self._typical_ns = float(np.median(window))
            if len(window) >= _WARMUP_WINDOW_CALLS:
                windows.append(np.array(window, np.int64))
            settled = steady(windows)
        settle(clock)
        return WarmUp(calls=calls, settled=settled)

    def take_turn(self, turn_s: float) -> Turn:
        turn = self.calls_for(turn_s)
        gc.collect(0)
        settle(self._clock)
        return turn

    def calls_for(self, turn_s: float) -> Turn:
        """The calls of a turn, without the rest after it. One longer than the lead-in needs none and drops none."""
        clock = self._clock
        starts: list[int] = []
        latencies: list[int] = []
        parts: list[Mapping[str, int]] = []
        opened = clock.now_ns()
        lead_ns = turn_s * _LEAD_IN * 1e9
        if self._typical_ns > lead_ns:
            lead_ns = 0.0
        while not latencies or clock.now_ns() - opened < turn_s * 1e9:
            start, latency = self._timed()
            if start - opened >= lead_ns:
                latencies.append(latency)
                starts.append(start)
                if self._parts is not None:
                    parts.append(self._parts())
        return Turn(
            starts_ns=np.array(starts, np.int64),
            latencies_ns=np.array(latencies, np.int64),
            parts_ns={name: np.array([one[name] for one in parts], np.int64) for name in (parts[0] if parts else ())},
        )

    def _timed(self) -> tuple[int, int]:
        """When a call began, and its latency."""
        clock = self._clock
        try:
            if self._before is not None:
                self._before()
            start = clock.now_ns()
            self._call()
            return start, clock.now_ns() - start
        except Exception as error:
            error.add_note(f"while timing {self._name}")
            raise


def interleave(
    runs: Mapping[str, Callable[[], object] | Arm],
    *,
    budget_s: float,
    min_samples: int = MIN_SAMPLES,
    turn_s: float = 0.05,
    max_warmup_s: float = 5.0,
    seed: int = 0,
    clock: Clock | None = None,
    on_progress: Callable[[float], None] | None = None,
    longer: Callable[[Interleaved], float] | None = None,
) -> Interleaved:
    """Every arm's latencies, made in turns within one run; a callable is an arm of this process.

    budget_s: for all together, after the warm-up. The run ends once it is spent and each arm has `min_samples`; where
    samples are too few it goes on to at most twice the budget, and in any case to six rounds. max_warmup_s: for each
    arm. on_progress: told the fraction done after each round. longer: asked once the budget is spent, with what was
    measured so far, how many seconds the run is to last in all; and again then, up to four times. Where it raises the
    budget, the fraction done falls. The garbage collector is off during turns. Once a round is
    whole, raises TimingInterrupted on Ctrl-C and TimingFailedError for what an arm raises; either goes through before.
    """
    if not runs:
        raise ValueError("nothing to time")
    clock = clock or SystemClock()
    arms = [_Kept(Local(name, run, clock) if callable(run) else run) for name, run in runs.items()]
    order = random.Random(seed)  # noqa: S311 — an order to defeat systematic effects, not a secret
    rounds = 0
    with collector_off():
        for arm in arms:
            arm.warmth = arm.arm.warm_up(max_warmup_s)
        began = clock.now_ns()
        try:
            for _ in range(_LOOKS + 1):
                while not _done(arms, rounds, (clock.now_ns() - began) / 1e9, budget_s, min_samples):
                    for arm in order.sample(arms, len(arms)):
                        arm.turns.append(arm.arm.take_turn(turn_s))
                    rounds += 1
                    if on_progress is not None:
                        on_progress(min(1.0, (clock.now_ns() - began) / 1e9 / budget_s) if budget_s > 0 else 1.0)
                so_far = _result(runs, arms, rounds, began, clock)
                wanted_s = 0.0 if longer is None else longer(so_far)
                if wanted_s <= so_far.spent_s:
                    break
                budget_s = wanted_s
        except KeyboardInterrupt:
            if rounds == 0:
                raise
            raise TimingInterrupted(_result(runs, arms, rounds, began, clock)) from None
        except Exception as error:
            if rounds == 0:
                raise
            raise TimingFailedError(_result(runs, arms, rounds, began, clock)) from error
    return _result(runs, arms, rounds, began, clock)


@contextmanager
def collector_off() -> Iterator[None]:
    """The garbage collector does not come in between: it runs where timing says so."""
    was_on = gc.isenabled()
    # Into the oldest generation, which the collections between turns do not pass over.
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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


@dataclass(slots=True)
class _Kept:
    """An arm with what it has measured so far."""

    arm: Arm
    warmth: WarmUp = WarmUp(calls=0, settled=False)
    turns: list[Turn] = field(default_factory=list)

    def calls(self) -> int:
        return sum(len(turn.latencies_ns) for turn in self.turns)

    def cut_to(self, rounds: int, began: int) -> Timed:
        kept = self.turns[:rounds]
        return Timed(
            latencies_ns=np.concatenate([turn.latencies_ns for turn in kept]),
            starts_ns=np.concatenate([turn.starts_ns for turn in kept]) - began,
            turns=np.repeat(np.arange(len(kept)), [len(turn.latencies_ns) for turn in kept]),
            warmup_calls=self.warmth.calls,
            warmed_up=self.warmth.settled,
            parts_ns={name: np.concatenate([turn.parts_ns[name] for turn in kept]) for name in kept[0].parts_ns},
        )


def settle(clock: Clock) -> None:
    """Wait until this process has used next to no CPU for a while, for at most 0.3 s."""
    began = clock.now_ns()
    seen = deque([(began, clock.busy_ns())])
    while clock.now_ns() - began < _SETTLE_LIMIT_S * 1e9:
        clock.sleep(_SETTLE_STEP_S)
        seen.append((clock.now_ns(), clock.busy_ns()))
        # The latest look that lies a whole window back.
        while len(seen) > 1 and seen[-1][0] - seen[1][0] >= _SETTLE_WINDOW_S * 1e9:
            seen.popleft()
        (wall, busy), (now, used) = seen[0], seen[-1]
        if now - wall >= _SETTLE_WINDOW_S * 1e9 and used - busy < _BUSY_SHARE * (now - wall):
            return


def _done(arms: Sequence[_Kept], rounds: int, elapsed_s: float, budget_s: float, min_samples: int) -> bool:
    if rounds < MIN_ROUNDS or elapsed_s < budget_s:
        return False
    return elapsed_s >= STRETCH * budget_s or all(arm.calls() >= min_samples for arm in arms)


def _result(names: Iterable[str], arms: Sequence[_Kept], rounds: int, began: int, clock: Clock) -> Interleaved:
    runs = {name: arm.cut_to(rounds, began) for name, arm in zip(names, arms, strict=True)}
    return Interleaved(runs=runs, rounds=rounds, spent_s=(clock.now_ns() - began) / 1e9, began_ns=began)
