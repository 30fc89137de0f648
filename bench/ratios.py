"""By what factor one run of calls is slower or faster than another, and how sure that is.

Pure functions over arrays. Calls near in time resemble one another, so no call counts as evidence by itself: a run is
cut into a dozen stretches, or where several processes made it into those, each says what it finds, and Student's t over
the stretches says how sure that is. It holds where stretches differ in their spread (Ibragimov and Müller 2010), and
the error is widened where neighbours agree. Processes do not follow from one another, but one of eight may have had the
machine against it from its start to its end: of their medians the lowest and the highest eighth are set aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dlops.bench.dependence import resemblance

# More stretches would resemble their neighbours, fewer would cost a wide t.
STRETCHES = 12
# Of fewer, the spread says nothing.
MIN_STRETCHES = 5
# Of so many processes one on each side is set aside.
_ONE_IN = 8
# A factor beyond this is no change of one program: an interval's end that lies further out is not given.
_FURTHEST = math.log(100)
# Halvings of that range: the end is right to a millionth.
_STEPS = 23

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """One run. latencies_ns: (n,), positive. durations_s: (turns,), the time that each turn's calls are counted over.

    turns: (n,), ascending, the place in `durations_s` of the turn (or stretch of time) that each call was made in.
    processes: (turns,), which of several made the calls of each turn, counted from 0: each is a stretch then; None
    where one made all. answered: (n,), which calls did not fail; None where none did.
    """

    latencies_ns: Integers
    turns: Integers
    durations_s: Floats
    processes: Integers | None = None
    answered: NDArray[np.bool_] | None = None

    @property
    def most_failed(self) -> float:
        """The largest share of failed calls in a stretch."""
        if self.answered is None:
            return 0.0
        stretch = self.stretch_of_turn[self.turns]
        made = np.bincount(stretch, minlength=self.stretches)
        failed = np.bincount(stretch, weights=~self.answered, minlength=self.stretches)
        return float((failed / np.maximum(made, 1)).max())

    @property
    def stretch_of_turn(self) -> Integers:
        """(turns,), ascending: the process that made it, else one of a dozen stretches of whole turns."""
        if self.processes is not None:
            return self.processes
        turns = len(self.durations_s)
        return np.asarray(np.arange(turns) * min(STRETCHES, turns) // turns, np.int64)

    @property
    def stretches(self) -> int:
        return int(self.stretch_of_turn[-1]) + 1 if len(self.durations_s) else 0


@dataclass(frozen=True, slots=True)
class Ratio:
    """NEW over BASE. p_value: two-sided, of no change. interval: its two ends at a confidence, null where unbounded."""

    value: float
    p_value: float
    interval: Callable[[float], tuple[float | None, float | None]]


@dataclass(frozen=True, slots=True)
class _Error:
    """Of an estimate. degrees: of freedom, whole."""

    deviation: float
    degrees: int


def median_ratio(base: Calls, new: Calls, *, paired: bool) -> Ratio | None:
    """Of the medians. paired: turn i of one and turn i of the other were made in one round, so what slows both cancels.

    Paired, a stretch says the median of its rounds' ratios, else the median of its calls; the mean over stretches, or
    the trimmed mean over processes, is the estimate. None below five stretches.
    """
    if min(base.stretches, new.stretches) < MIN_STRETCHES:
        return None
    if paired:
        found = np.log(_medians(new.latencies_ns, new.turns)) - np.log(_medians(base.latencies_ns, base.turns))
        said = _medians(found, new.stretch_of_turn)
        if _apart(base, new):
            return _from_means(trimmed_mean(said))
        return _from_parts(float(said.mean()), _parts(said))
    said_of = [np.log(_medians(calls.latencies_ns, calls.stretch_of_turn[calls.turns])) for calls in (base, new)]
    if min(map(len, said_of)) < MIN_STRETCHES:  # a stretch in which nothing was answered says nothing
        return None
    if _apart(base, new):
        return _from_means(*map(trimmed_mean, reversed(said_of)))
    return _from_parts(float(said_of[1].mean() - said_of[0].mean()), *map(_parts, said_of))


def rate_ratio(base: Calls, new: Calls, *, paired: bool) -> Ratio | None:
    """Of the calls a second, over the whole of each run. Cochran 1977, 6.13, linearized. None below five stretches."""
    if min(base.stretches, new.stretches) < MIN_STRETCHES or min(base.durations_s.sum(), new.durations_s.sum()) <= 0:
        return None
    rates, parts = [], []
    for calls in (base, new):
        stretch = calls.stretch_of_turn
        lasted = np.bincount(stretch, weights=calls.durations_s)
        counted = np.bincount(stretch[calls.turns], weights=calls.answered, minlength=calls.stretches)
        if not counted.sum():
            return None
        rates.append(float(counted.sum()) / float(lasted.sum()))
        parts.append((counted - rates[-1] * lasted) / float(counted.sum()))
    parts = [parts[1] - parts[0]] if paired else parts
    return _from_parts(math.log(rates[1] / rates[0]), *parts, apart=_apart(base, new))


def quantile_ratio(base: Calls, new: Calls, q: float, *, paired: bool) -> Ratio | None:
    """Of the q-quantiles of all calls, for a q far out, where a turn has too few calls to have one of its own.

    A factor is in the interval where BASE's calls times it, and NEW's, exceed the quantile of both together about
    equally often: the difference of the two shares, over its error from the stretches, is within Student's t. No
    density is estimated. None below five stretches.
    """
    if min(base.stretches, new.stretches) < MIN_STRETCHES:
        return None
    tails = [_Tail.of(calls, q) for calls in (base, new)]

    def score(shift: float) -> tuple[float, int]:
        """How many errors more often NEW exceeds than BASE times exp(shift), and the degrees of freedom."""
        threshold = _threshold(tails[0].logs + shift, tails[1].logs, tails[0].calls, tails[1].calls, q)
        parts = [tails[0].excess(threshold - shift, q), tails[1].excess(threshold, q)]
        error = _error(*([parts[1] - parts[0]] if paired else parts), apart=_apart(base, new))
        # Calls exceed a quantile at least as unevenly as independent ones would.
        least = math.sqrt(q * (1 - q) * (1 / tails[0].calls + 1 / tails[1].calls))
        return float(parts[1].sum() - parts[0].sum()) / max(error.deviation, least), error.degrees

    estimate = tails[1].quantile - tails[0].quantile
    at_none, degrees = score(0.0)

    def interval(confidence: float) -> tuple[float | None, float | None]:
        ends = [_furthest(score, estimate, direction, confidence) for direction in (-1, 1)]
        return None if ends[0] is None else math.exp(ends[0]), None if ends[1] is None else math.exp(ends[1])

    return Ratio(math.exp(estimate), two_sided_p(at_none, degrees), interval)


@dataclass(frozen=True, slots=True)
class _Tail:
    """The longest calls of a run, no more than can exceed the quantile of two runs together; times are logarithms.

    logs, stretch: (k,), longest last. sizes: calls of each stretch. calls: of the whole run.
    """

    logs: Floats
    stretch: Integers
    sizes: Floats
    calls: int
    quantile: float

    @classmethod
    def of(cls, run: Calls, q: float) -> _Tail:
        n = len(run.latencies_ns)
        kept = min(n, math.ceil(2 * (1 - q) * n) + 2)
        order = np.argsort(run.latencies_ns, kind="stable")
        longest, stretch = order[n - kept :], run.stretch_of_turn[run.turns]
        logs = np.log(run.latencies_ns[longest])
        return cls(
            logs=logs,
            stretch=stretch[longest],
            sizes=np.bincount(stretch, minlength=run.stretches).astype(np.float64),
            calls=n,
            quantile=float(np.log(run.latencies_ns[order[math.ceil(q * n) - 1]])),
        )

    def excess(self, threshold: float, q: float) -> Floats:
        """By stretch, the calls beyond the threshold less those expected, as a share of all calls."""
        beyond = np.bincount(self.stretch[self.logs > threshold], minlength=len(self.sizes))
        return np.asarray((beyond - (1 - q) * self.sizes) / self.calls)


def _threshold(base: Floats, new: Floats, base_calls: int, new_calls: int, q: float) -> float:
    """The q-quantile of two runs together, each with the same weight however many calls it has."""
    values = np.concatenate([base, new])
    weights = np.concatenate([np.full(len(base), 1 / base_calls), np.full(len(new), 1 / new_calls)])
    order = np.argsort(-values, kind="stable")
    beyond = np.cumsum(weights[order])
    return float(values[order[min(len(order) - 1, int(np.searchsorted(beyond, 2 * (1 - q), side="right")))]])


def _furthest(
    score: Callable[[float], tuple[float, int]], estimate: float, direction: int, confidence: float
) -> float | None:
    """The last log factor in that direction that the runs do not contradict; None where they contradict none."""

    def contradicted(shift: float) -> bool:
        value, degrees = score(shift)
        # A larger factor makes BASE exceed more often: the score falls.
        return -direction * value > student_t(confidence, degrees)

    inside, outside = estimate, estimate + direction * _FURTHEST
    if not contradicted(outside):
        return None
    for _ in range(_STEPS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if contradicted(middle) else (middle, outside)
    return outside


def _medians(values: NDArray[np.number], blocks: Integers) -> Floats:
    """The median of each block, in order; `blocks` ascends."""
    edges = np.flatnonzero(np.diff(blocks)) + 1
    return np.array([float(np.median(part)) for part in np.split(values, edges)])


def _parts(said: Floats) -> Floats:
    return np.asarray((said - said.mean()) / len(said))


def _apart(base: Calls, new: Calls) -> bool:
    """Whether the stretches are processes: those do not follow from the ones before."""
    return base.processes is not None and new.processes is not None


def _from_parts(log_ratio: float, *parts: Floats, apart: bool = False) -> Ratio:
    return _from_error(log_ratio, _error(*parts, apart=apart))


def _from_means(new: Mean, base: Mean | None = None) -> Ratio:
    """Of log ratios, or of logs of two runs."""
    means = [new] if base is None else [new, base]
    error = _together([one.deviation**2 for one in means], [one.degrees for one in means])
    return _from_error(new.value - (base.value if base is not None else 0.0), error)


def _from_error(log_ratio: float, error: _Error) -> Ratio:
    def interval(confidence: float) -> tuple[float | None, float | None]:
        half = student_t(confidence, error.degrees) * error.deviation
        return math.exp(log_ratio - half), math.exp(log_ratio + half)

    if error.deviation == 0:  # constant samples: a clock that ticks too slowly, or made up
        return Ratio(math.exp(log_ratio), float(log_ratio == 0), interval)
    return Ratio(math.exp(log_ratio), two_sided_p(log_ratio / error.deviation, error.degrees), interval)


def _error(*parts: Floats, apart: bool) -> _Error:
    """Of the sum of every run's parts, one a stretch."""
    return _together([_variance_of_sum(one, apart=apart) for one in parts], [len(one) - 1 for one in parts])


def _together(variances: list[float], degrees: list[int]) -> _Error:
    """Of a sum of one or two: Welch's degrees of freedom, rounded down."""
    total = sum(variances)
    if total == 0:
        return _Error(0.0, sum(degrees))
    welch = total**2 / sum(variance**2 / of for variance, of in zip(variances, degrees, strict=True))
    # The quotient of two equal numbers may come out just below a whole one.
    return _Error(math.sqrt(total), max(1, math.floor(welch + 1e-9)))


@dataclass(frozen=True, slots=True)
class Mean:
    """value: the trimmed mean. deviation: its standard error. degrees: of freedom of Student's t for it."""

    value: float
    deviation: float
    degrees: int

    def interval(self, confidence: float) -> tuple[float, float]:
        half = student_t(confidence, self.degrees) * self.deviation
        return self.value - half, self.value + half


def trimmed_mean(values: Floats) -> Mean:
    """Of independent values, two or more: an eighth of them on each side is set aside, below eight none.

    Its error is from the values as if those set aside were at the nearest that was kept. Tukey and McLaughlin 1963;
    for two samples Yuen 1974.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    aside = n // _ONE_IN
    kept = n - 2 * aside
    winsorized = np.clip(ordered, ordered[aside], ordered[n - 1 - aside])
    squares = float(np.sum((winsorized - winsorized.mean()) ** 2))
    return Mean(float(ordered[aside : n - aside].mean()), math.sqrt(squares / (kept * (kept - 1))), kept - 1)


def _variance_of_sum(parts: Floats, *, apart: bool) -> float:
    n = len(parts)
    centred = parts - parts.mean()
    squares = float(np.sum(centred**2))
    if squares == 0:
        return 0.0
    return n / (n - 1) * squares * (1.0 if apart else resemblance(centred)[1])


def two_sided_p(t: float, degrees: int) -> float:
    """P(|T| ≥ |t|) for Student's t with a whole number of degrees. Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - within))


@lru_cache(maxsize=256)
def student_t(confidence: float, degrees: int) -> float:
    """The t that |T| does not exceed with that probability."""
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 1 - confidence else (low, middle)
    return high
