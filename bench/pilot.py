"""How long a row takes to measure: what a pilot shows of how well its quantiles are known. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dlops.bench import stats
from dlops.bench.stats import Integers
from dlops.errors import UsageError
from dlops.report import Interval, Latency

# Of a row in seconds: the pilot's, and the most that is given where no duration is named.
PILOT_S, LONGEST_S = 3.0, 30.0
# How far from the quantile an end of its interval may lie, as a share of it.
WANTED = {0.5: 0.01, 0.99: 0.05}
# The pilot's interval has an error of its own: what is a little too short would mostly have to be repeated.
_MARGIN = 1.1
# More than this is no advice.
_FAR = 1000
# Where a pilot certifies no quantile, it is taken again with twice the samples that certify one if none is unlucky.
_CERTIFYING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """first_s seconds a row, and where its quantiles are not known well enough then, up to longest_s in all.

    is_named: the seconds were, and they are kept whatever is known then. parts: how many like this make a row.
    """

    first_s: float
    longest_s: float
    is_named: bool = False
    parts: int = 1

    @property
    def is_piloted(self) -> bool:
        return self.longest_s > self.first_s

    def __str__(self) -> str:
        return f"{self.first_s:g} to {self.longest_s:g} s" if self.is_piloted else f"{self.first_s:g} s"

    def stretch(self, most: float) -> float:
        """How many times first_s a row that has too few requests by then may last: `most`, or up to longest_s."""
        return most if self.is_named else min(most, self.longest_s / self.first_s)

    def after(self, samples: Integers, *, turns: Integers, spent_s: float) -> float:
        """How long the row is to last in all; spent_s where that is long enough. samples, turns: (n,)."""
        if not self.is_piloted or spent_s >= self.longest_s:
            return spent_s
        return min(self.longest_s, seconds_wanted(samples, turns=turns, spent_s=spent_s, parts=self.parts))

    def part(self, parts: int) -> Length:
        """Of each of so many that make a row together."""
        return replace(self, first_s=self.first_s / parts, longest_s=self.longest_s / parts, parts=parts)


def length(duration_s: float | None, longest_s: float = LONGEST_S) -> Length:
    """`duration_s` and no more, or where it is None a pilot's and up to `longest_s`.

    Raises UsageError for what is no time above zero, and for a duration without end.
    """
    if duration_s is not None:
        if not 0 < duration_s < math.inf:
            raise UsageError(f"a duration of {duration_s:g} s")
        return Length(first_s=duration_s, longest_s=duration_s, is_named=True)
    if not longest_s > 0:
        raise UsageError(f"at most {longest_s:g} s a row")
    return Length(first_s=min(PILOT_S, longest_s), longest_s=longest_s)


def half_width(interval: Interval | None) -> float | None:
    """Half the interval as a share of what it is of; None where there is none."""
    if interval is None or interval.low is None or interval.high is None or interval.value <= 0:
        return None
    return (interval.high - interval.low) / 2 / interval.value


def seconds_wanted(samples: Integers, *, turns: Integers, spent_s: float, parts: int = 1) -> float:
    """How long a row must last in all, by the `spent_s` measured so far, for p50 to be known to 1 % and p99 to 5 %,
    and both certified.

    samples, turns: (n,). parts: how many like this one make the row, which know it better together. It is spent_s
    itself where they are. An interval's width falls with the square root of the time, as long as what comes resembles
    what was.
    """
    factor = 1.0
    for q, wanted in WANTED.items():
        known = half_width(stats.quantile_interval(samples, q, turns=turns))
        needs, wanted = stats.certifying_samples(q) / parts, wanted * math.sqrt(parts)
        have = stats.effective_samples(samples, q, turns=turns)
        if known is None or have < needs:
            factor = max(factor, _CERTIFYING * needs / have)
        if known is not None and known > wanted:
            factor = max(factor, (known / wanted) ** 2)
    return spent_s if factor == 1.0 else _MARGIN * factor * spent_s


def shortfalls(latency: Latency, *, spent_s: float, processes: int = 1) -> tuple[str, ...]:
    """In words, the quantiles that have an interval wider than wanted. spent_s: on all processes together."""
    said = []
    intervals = {0.5: latency.p50_ns, 0.99: latency.p99_ns}
    for q, wanted in WANTED.items():
        known = half_width(intervals[q])
        if known is not None and known > wanted:
            times = (known / wanted) ** 2
            takes = f"about {spent_s * times:,.0f} s, {spent_s:.0f} s were spent"
            if processes > 1:
                takes = f"about {math.ceil(processes * times):,} processes, {processes} were measured"
            if times > _FAR:
                takes = f"more than {_FAR:,} times as much"
            said.append(
                f"under-sampled: p{q * 100:.0f} is known to ±{known:.1%} where ±{wanted:.0%} is wanted: that takes "
                f"{takes}"
            )
    return tuple(said)
