"""How sure a measured number is: order-statistic intervals, corrected for calls that resemble their neighbours.

Pure functions over arrays. `turns` gives each sample its block: calls of one turn (or of one stretch of time) are not
independent, blocks are taken as such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from dlops.bench.dependence import STRETCHES, effective_pairs, joined, resemblance
from dlops.bench.ratios import student_t, trimmed_mean
from dlops.report import Interval, Latency

CONFIDENCE = 0.95
# Below this many blocks their spread says nothing about dependence: each turn then counts as one sample.
_MIN_BLOCKS = 5
# 368 samples bound p99 by nothing but the largest of them; MLPerf's LoadGen asks for so many before it is quoted.
CERTIFIES_P99 = 662
# Stands for a median of nothing, which a coarse clock may show: it has no logarithm.
_LEAST = 1e-9
# A run whose median moved by more than this is not quoted; chance alone does it in one run of a hundred.
MAX_DRIFT = 0.05
_DRIFT_SIGNIFICANCE = 0.01
# Quartiles of the medians of turns further apart than this mean that something else used the machine.
MAX_SPREAD = 0.25

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """change: of the median from the first turn to the last, as a fraction. p_value: of no trend (Mann-Kendall)."""

    change: float
    p_value: float

    @property
    def matters(self) -> bool:
        return abs(self.change) > MAX_DRIFT and self.p_value < _DRIFT_SIGNIFICANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """1-based ranks of the order statistics that bound a quantile; None where the sample has none that far out."""

    low: int | None
    high: int | None


def fewest_samples(q: float, *, confidence: float = CONFIDENCE) -> int:
    """How many independent samples bound the q-quantile from both sides: 6 at p50, 36 at p90, 368 at p99."""
    tail = (1 - confidence) / 2
    return math.ceil(math.log(tail) / math.log(max(q, 1 - q)))


def certifying_samples(q: float) -> int:
    """From how many effective samples on a quantile is certified: 662 at p99, elsewhere as many as bound it."""
    return max(CERTIFIES_P99 if q == 0.99 else 0, fewest_samples(q))


@lru_cache(maxsize=256)
def interval_ranks(n: int, q: float, confidence: float = CONFIDENCE) -> Ranks:
    """The two-sided equal-tailed interval for the q-quantile of n independent samples, whatever their distribution.

    low: the largest l with P(B < l) ≤ tail; high: the smallest u with P(B < u) ≥ 1 - tail; B is binomial(n, q).
    """
    tail = (1 - confidence) / 2
    first, below = _binomial_cdf(n, q)  # below[i] = P(B <= first + i)
    # P(B < l) = P(B <= l - 1)
    low = first + int(np.searchsorted(below, tail, side="right"))
    high = first + int(np.searchsorted(below, 1 - tail, side="left")) + 1
    return Ranks(low=low if low >= 1 else None, high=high if high <= n else None)


def quantile_interval(
    samples: NDArray[np.number], q: float, *, turns: Integers | None = None, confidence: float = CONFIDENCE
) -> Interval | None:
    """The q-quantile with its interval, or None where the sample is too small to bound it from both sides."""
    ordered = np.sort(np.asarray(samples, np.float64))
    n = len(ordered)
    if n == 0:
        return None
    independent = effective_samples(samples, q, turns=turns)
    ranks = interval_ranks(independent, q, confidence)
    if ranks.low is None or ranks.high is None:
        return None
    low, high = _laid_over(ordered, ranks.low, ranks.high, independent)
    return Interval(value=_quantile(ordered, q), low=low, high=high)


def effective_samples(samples: NDArray[np.number], q: float, *, turns: Integers | None = None) -> int:
    """How many independent samples would give the q-quantile the same precision, from 1 to len(samples).

    The variance of "is at most the quantile" over blocks against the binomial one (the design effect of a cluster
    sample), widened where neighbouring blocks resemble one another. More than 30 turns are joined into at most 30
    blocks, for slow spells last many turns; without `turns` the samples are cut into 30. Fewer than five turns cannot
    show how alike their calls are: then it is the number of turns.
    """
    values = np.asarray(samples, np.float64)
    n = len(values)
    if n == 0:
        return 0
    blocks = np.arange(n) * min(STRETCHES, n) // n if turns is None else turns
    inside = (values <= _quantile(np.sort(values), q)).astype(np.float64)
    return effective_share_samples(inside, blocks)


def effective_share_samples(inside: NDArray[np.number] | NDArray[np.bool_], turns: Integers) -> int:
    """How many independent samples would give the share of ones in `inside` the same precision, from 1 to len(inside).

    inside, turns: (n,). The same correction as effective_samples. Where all are alike none shows dependence: it is n.
    """
    n = len(inside)
    _, turn = np.unique(turns, return_inverse=True)
    count = int(turn.max()) + 1
    if count < _MIN_BLOCKS:
        return count
    share = float(np.mean(inside))
    if share in (0.0, 1.0):
        return n
    sizes = np.bincount(turn, minlength=count).astype(np.float64)
    deviations = np.bincount(turn, weights=np.asarray(inside, np.float64), minlength=count) - share * sizes
    effect = (_half_width(deviations) / _z(CONFIDENCE)) ** 2 / (share * (1 - share) * n)
    return max(1, math.floor(n / max(1.0, effect)))


def stretches(times_ns: Integers, duration_ns: int) -> Integers:
    """For each time from a run's begin the stretch that it falls into, the last one for what comes later: (n,)."""
    return np.asarray(np.minimum(times_ns * STRETCHES // max(1, duration_ns), STRETCHES - 1), np.int64)


def share_bounds(share: float, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Lower and upper bound of a proportion that was `share` of n independent samples, each one-sided. Clopper and
    Pearson 1934; share * n is rounded against whichever bound is asked for."""
    tail = 1 - confidence
    # A share that is a whole number of n must not be rounded for the last bit of its division.
    few, many = math.floor(share * n + 1e-9), math.ceil(share * n - 1e-9)

    def solve(holds: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return (low + high) / 2

    # P(B >= few) grows with the proportion, P(B <= many) falls.
    lower = 0.0 if few == 0 else solve(lambda p: 1 - _at_most(n, p, few - 1) < tail)
    upper = 1.0 if many == n else solve(lambda p: _at_most(n, p, many) > tail)
    return lower, upper


def summarize(latencies_ns: Integers, *, turns: Integers | None = None, apart: bool = False) -> Latency:
    """p50, p90 and p99 with their intervals, each null where the sample does not certify it.

    apart: what `turns` numbers was made apart, as processes are, and has a median of its own: p50 and its
    interval are the trimmed mean's over those.
    """
    assert turns is not None or not apart
    median = _median_apart(latencies_ns, turns) if apart and turns is not None else None
    return Latency(
        samples=len(latencies_ns),
        effective_samples=effective_samples(latencies_ns, 0.5, turns=turns),
        p50_ns=median if apart else quantile_interval(latencies_ns, 0.5, turns=turns),
        p90_ns=quantile_interval(latencies_ns, 0.9, turns=turns),
        p99_ns=quantile_interval(latencies_ns, 0.99, turns=turns),
        mean_ns=float(np.mean(latencies_ns)),
        min_ns=float(np.min(latencies_ns)),
        max_ns=float(np.max(latencies_ns)),
    )


def _median_apart(latencies_ns: Integers, blocks: Integers) -> Interval | None:
    """The trimmed geometric mean of the blocks' medians with its interval; None below six blocks.

    Few blocks that differ by more than their calls do leave order statistics nothing but the range of all calls.
    """
    medians = [float(np.median(latencies_ns[blocks == block])) for block in np.unique(blocks)]
    if len(medians) < fewest_samples(0.5):
        return None
    mean = trimmed_mean(np.log(np.maximum(medians, _LEAST)))
    low, high = mean.interval(CONFIDENCE)
    return Interval(value=math.exp(mean.value), low=math.exp(low), high=math.exp(high))


def ratio_interval(numerator: Sequence[Integers], denominator: Sequence[Integers]) -> Interval | None:
    """The median over pairs of turns of median(numerator) / median(denominator), with its order-statistic interval.

    Turn i of one and turn i of the other were made in the same round, so a slow spell of the machine cancels out. Where
    ratios resemble their neighbours all the same they count for fewer, at the least for six: then it is their range.
    None below six pairs, which have no such interval: a ratio that nobody can say how sure it is invites quoting.
    """
    pairs = list(zip(numerator, denominator, strict=True))
    if len(pairs) < fewest_samples(0.5):
        return None
    ratios = np.array([float(np.median(top)) / float(np.median(bottom)) for top, bottom in pairs])
    independent = max(fewest_samples(0.5), effective_pairs(ratios))
    ranks = interval_ranks(independent, 0.5)
    assert ranks.low is not None
    assert ranks.high is not None
    low, high = _laid_over(np.sort(ratios), ranks.low, ranks.high, independent)
    return Interval(value=float(np.median(ratios)), low=low, high=high)


def median_interval(values: Sequence[float]) -> Interval | None:
    """The median of independent values with its order-statistic interval; None below six, which have none."""
    ranks = interval_ranks(len(values), 0.5)
    if ranks.low is None or ranks.high is None:
        return None
    ordered = sorted(values)
    return Interval(value=float(np.median(ordered)), low=ordered[ranks.low - 1], high=ordered[ranks.high - 1])


def overlap(one: Interval | None, other: Interval | None) -> bool:
    """Whether two intervals have a value in common, as far as is known."""
    (low, high), (other_low, other_high) = _ends(one), _ends(other)
    return low <= other_high and other_low <= high


def _ends(interval: Interval | None) -> tuple[float, float]:
    """An end that is not known is as far away as can be."""
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return -math.inf if low is None else low, math.inf if high is None else high


def rate_interval(counts: NDArray[np.number], durations_s: Floats) -> Interval:
    """Sum of counts over sum of durations, one of each a block, with the ratio estimator's t interval.

    The ends are null below five blocks. Cochran 1977, eq. 6.13, the blocks as clusters, at most 30 of them, and widened
    where neighbours resemble one another.
    """
    counted, lasted = np.asarray(counts, np.float64), np.asarray(durations_s, np.float64)
    total = float(lasted.sum())
    rate = float(counted.sum()) / total if total > 0 else 0.0
    blocks = len(counted)
    if blocks < _MIN_BLOCKS or total <= 0:
        return Interval(value=rate, low=None, high=None)
    half = _half_width(counted - rate * lasted) / total
    return Interval(value=rate, low=max(0.0, rate - half), high=rate + half)


def drift(medians: Sequence[float]) -> Drift:
    """The trend in medians taken in order: Theil-Sen's slope over the run, and Mann-Kendall's test of no trend.

    The slope is of their logarithms: nothing falls by more than all of itself.
    """
    values = np.log(np.maximum(np.asarray(medians, np.float64), _LEAST))
    n = len(values)
    if n < _MIN_BLOCKS:
        return Drift(change=0.0, p_value=1.0)
    earlier, later = np.triu_indices(n, k=1)
    rises = values[later] - values[earlier]
    slope = float(np.median(rises / (later - earlier)))
    score = float(np.sign(rises).sum())
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    z = max(0.0, abs(score) - 1) / deviation
    return Drift(change=math.expm1(slope * (n - 1)), p_value=2 * (1 - NormalDist().cdf(z)))


def spread(medians: Sequence[float]) -> float:
    """Distance between the quartiles of the medians, as a fraction of their median."""
    quarter, half, three = np.quantile(np.asarray(medians, np.float64), [0.25, 0.5, 0.75])
    return float((three - quarter) / half)


def proportion_interval(share: float, n: int) -> Interval:
    """A proportion of n samples with Wilson's 95 % interval."""
    z = _z(CONFIDENCE)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def _half_width(deviations: Floats) -> float:
    """Half the 95 % interval of a sum, from what each of five or more turns in order adds to it, less what it should.

    The wider of two: of the turns, as if each stood alone, which is the more exact; and of the turns joined into
    blocks, which sees spells that last many turns. Blocks that resemble one another also say less of their own spread:
    Student's t gets fewer degrees of freedom.
    """
    alone = _t_times_deviation(deviations, effect=1.0, degrees=len(deviations) - 1)
    blocks = joined(deviations)
    seen, effect = resemblance(blocks)
    degrees = (len(blocks) - 1) * (1 - max(0.0, seen)) / (1 + max(0.0, seen))
    return max(alone, _t_times_deviation(blocks, effect=effect, degrees=degrees))


def _t_times_deviation(blocks: Floats, *, effect: float, degrees: float) -> float:
    variance = len(blocks) / (len(blocks) - 1) * float(np.sum(blocks**2)) * effect
    return student_t(CONFIDENCE, max(1, math.floor(degrees + 1e-9))) * math.sqrt(variance)


@lru_cache(maxsize=8)
def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _laid_over(ordered: Floats, low: int, high: int, independent: int) -> tuple[float, float]:
    """The samples at two ranks, which hold for `independent` samples: laid over all, they are rounded outwards."""
    n = len(ordered)
    first = max(1, math.floor((low - 1) * n / independent) + 1)
    last = min(n, math.ceil(high * n / independent))
    return float(ordered[first - 1]), float(ordered[last - 1])


def _quantile(ordered: Floats, q: float) -> float:
    """The smallest sample that at least a share q of all samples do not exceed; at p50 the usual median."""
    if q == 0.5:
        return float(np.median(ordered))
    return float(ordered[max(0, math.ceil(q * len(ordered)) - 1)])


def _at_most(n: int, p: float, k: int) -> float:
    """P(B <= k) for a binomial B(n, p), p strictly between 0 and 1."""
    first, below = _binomial_cdf(n, p)
    if k < first:
        return 0.0
    return float(below[min(k - first, len(below) - 1)])


def _binomial_cdf(n: int, q: float) -> tuple[int, Floats]:
    """P(B <= k) for k from the returned first one on, over the ten standard deviations that matter."""
    centre, reach = n * q, 10 * math.sqrt(n * q * (1 - q)) + 10
    first, last = max(0, math.floor(centre - reach)), min(n, math.ceil(centre + reach))
    ks = range(first, last + 1)
    log_n = math.lgamma(n + 1)
    logs = [
        log_n - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(q) + (n - k) * math.log1p(-q) for k in ks
    ]
    return first, np.cumsum(np.exp(logs))
