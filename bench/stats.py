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

from dlops.report import Interval, Latency

CONFIDENCE = 0.95
# Below this many blocks their spread says nothing about dependence: each turn then counts as one sample.
_MIN_BLOCKS = 5
# A run is cut into this many stretches of equal time, which are taken as independent of one another.
STRETCHES = 30
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
    # The ranks hold for `independent` samples: laid over all n, they are rounded outwards.
    low = max(1, math.floor((ranks.low - 1) * n / independent) + 1)
    high = min(n, math.ceil(ranks.high * n / independent))
    return Interval(value=_quantile(ordered, q), low=float(ordered[low - 1]), high=float(ordered[high - 1]))


def effective_samples(samples: NDArray[np.number], q: float, *, turns: Integers | None = None) -> int:
    """How many independent samples would give the q-quantile the same precision, from 1 to len(samples).

    The variance of "is at most the quantile" over blocks against the binomial one (the design effect of a cluster
    sample), with Student's correction for the number of blocks. Without `turns` the samples are cut into 30 stretches.
    Fewer than five turns cannot show how alike their calls are: then it is the number of turns.
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
    _, block = np.unique(turns, return_inverse=True)
    count = int(block.max()) + 1
    if count < _MIN_BLOCKS:
        return count
    share = float(np.mean(inside))
    if share in (0.0, 1.0):
        return n
    sizes = np.bincount(block, minlength=count).astype(np.float64)
    deviation = np.bincount(block, weights=np.asarray(inside, np.float64), minlength=count) - share * sizes
    variance = count / (count - 1) * float(np.sum(deviation**2)) / n**2
    effect = variance / (share * (1 - share) / n) * (student_t(count - 1) / _z(CONFIDENCE)) ** 2
    return max(1, math.floor(n / max(1.0, effect)))


def stretches(times_ns: Integers, duration_s: float) -> Integers:
    """For each time from a run's begin the stretch that it falls into, the last one for what comes later: (n,)."""
    return np.asarray(np.minimum(times_ns * STRETCHES // max(1, round(duration_s * 1e9)), STRETCHES - 1), np.int64)


def share_bounds(share: float, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Lower and upper bound of a proportion that was `share` of n independent samples, each one-sided. Clopper and
    Pearson 1934; share * n is rounded against whichever bound is asked for."""
    tail = 1 - confidence
    few, many = math.floor(share * n), math.ceil(share * n)

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


def summarize(latencies_ns: Integers, *, turns: Integers | None = None) -> Latency:
    """p50, p90 and p99 with their intervals, each null where the sample does not certify it."""
    return Latency(
        samples=len(latencies_ns),
        effective_samples=effective_samples(latencies_ns, 0.5, turns=turns),
        p50_ns=quantile_interval(latencies_ns, 0.5, turns=turns),
        p90_ns=quantile_interval(latencies_ns, 0.9, turns=turns),
        p99_ns=quantile_interval(latencies_ns, 0.99, turns=turns),
        mean_ns=float(np.mean(latencies_ns)),
        min_ns=float(np.min(latencies_ns)),
        max_ns=float(np.max(latencies_ns)),
    )


def ratio_interval(numerator: Sequence[Integers], denominator: Sequence[Integers]) -> Interval | None:
    """The median over pairs of turns of median(numerator) / median(denominator), with its order-statistic interval.

    Turn i of one and turn i of the other were made in the same round, so a slow spell of the machine cancels out.
    None below six pairs, which have no such interval: a ratio that nobody can say how sure it is invites quoting.
    """
    pairs = zip(numerator, denominator, strict=True)
    return median_interval([float(np.median(top)) / float(np.median(bottom)) for top, bottom in pairs])


def median_interval(values: Sequence[float]) -> Interval | None:
    """The median of independent values with its order-statistic interval; None below six, which have none."""
    ranks = interval_ranks(len(values), 0.5)
    if ranks.low is None or ranks.high is None:
        return None
    ordered = sorted(values)
    return Interval(value=float(np.median(ordered)), low=ordered[ranks.low - 1], high=ordered[ranks.high - 1])


def rate_interval(counts: NDArray[np.number], durations_s: Floats) -> Interval:
    """Sum of counts over sum of durations, one of each a block, with the ratio estimator's t interval.

    The ends are null below five blocks. Cochran 1977, eq. 6.13, the blocks as clusters.
    """
    counted, lasted = np.asarray(counts, np.float64), np.asarray(durations_s, np.float64)
    total = float(lasted.sum())
    rate = float(counted.sum()) / total if total > 0 else 0.0
    blocks = len(counted)
    if blocks < _MIN_BLOCKS or total <= 0:
        return Interval(value=rate, low=None, high=None)
    variance = blocks / (blocks - 1) * float(np.sum((counted - rate * lasted) ** 2)) / total**2
    half = student_t(blocks - 1) * math.sqrt(variance)
    return Interval(value=rate, low=max(0.0, rate - half), high=rate + half)


def drift(medians: Sequence[float]) -> Drift:
    """The trend in medians taken in order: Theil-Sen's slope over the run, and Mann-Kendall's test of no trend."""
    values = np.asarray(medians, np.float64)
    n = len(values)
    if n < _MIN_BLOCKS:
        return Drift(change=0.0, p_value=1.0)
    earlier, later = np.triu_indices(n, k=1)
    rises = values[later] - values[earlier]
    slope = float(np.median(rises / (later - earlier)))
    score = float(np.sign(rises).sum())
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    z = max(0.0, abs(score) - 1) / deviation
    return Drift(change=slope * (n - 1) / float(np.median(values)), p_value=2 * (1 - NormalDist().cdf(z)))


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


def student_t(degrees: int, *, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t, by Hill's expansion: within 0.1 % from 4 degrees of freedom on."""
    z, v = _z(confidence), float(degrees)
    terms = (
        z,
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4),
    )
    return sum(terms)


@lru_cache(maxsize=8)
def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


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
