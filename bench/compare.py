"""Whether NEW is slower or faster than BASE: a word on each quantity of the rows that belong together.

Pure functions over reports in memory. What a ratio is worth is in `dlops.bench.ratios`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import computed_field

from dlops.bench import cells
from dlops.bench.matching import ONLY_IN_BASE, environment_differences, match_rows, row_differences
from dlops.bench.ratios import STRETCHES, Calls, Ratio, median_ratio, quantile_ratio, rate_ratio
from dlops.bench.results import Measured
from dlops.errors import UsageError
from dlops.manifest import Record
from dlops.report import PROCESSES, SERVICE, STARTS, TURNS, Load, Measurement

Quantity = Literal["p50", "p99", "throughput"]
Word = Literal["REGRESSED", "SAME", "IMPROVED", "PASSED", "INCONCLUSIVE"]
QUANTITIES: tuple[Quantity, ...] = ("p50", "p99", "throughput")
# Two runs of one program in one process differ by a per cent or two on a shared machine; CI must not fail for that.
MARGIN = 0.05
# From here on a stretch's median says more of how many calls failed than of how long they took.
_MANY_FAILED = 0.25
# That any quantity of any row is called changed though none has.
FALSE_ALARMS = 0.05
WITHIN_RUNS = (
    "the intervals see only the spread within each run: two runs of one program can differ by more; "
    "comparing the artifacts themselves measures both in one run"
)
BETWEEN_TIMES = (
    "the two reports were made at different times: what slowed the machine in one of them looks like a change; "
    "comparing the artifacts themselves measures both in one run"
)
ONE_PROCESS = "one process of each: another of the same may be some per cent faster or slower, which no interval shows"


class RatioInterval(Record):
    """NEW/BASE with a two-sided interval at `confidence`; an end is null where the sample does not bound it."""

    value: float
    low: float | None
    high: float | None
    confidence: float


class Judged(Record):
    """One quantity of a row. base, new: nanoseconds, or items a second; null where the sample does not certify them.

    limit: the ratio from which it is worse than allowed. p_value: of no change, by Holm over all that were judged.
    because: why the word is INCONCLUSIVE, else null.
    """

    quantity: Quantity
    base: float | None
    new: float | None
    ratio: RatioInterval | None
    p_value: float | None
    limit: float
    word: Word
    because: str | None


class Compared(Record):
    """One row of BASE and its partner of NEW. against: why either is not to be quoted."""

    name: str
    boundary: str
    runtime: str
    provider: str
    load: Load
    base_target: str
    new_target: str
    judged: tuple[Judged, ...]
    against: tuple[str, ...]


class Comparison(Record):
    """What was found. paired: both were measured in one run, in turns. processes: fresh ones of each side, the fewest
    of any row.

    margin: null under a gate. gate: the ratios that the quantities judged may not be worse than, null without one.
    unmatched: rows of one report that the other lacks. warnings: what makes the two hard to compare.
    """

    base: str
    new: str
    paired: bool
    processes: int
    margin: float | None
    gate: dict[Quantity, float] | None
    rows: tuple[Compared, ...]
    unmatched: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    partial: bool = False

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Word:
        """The worst word of all: REGRESSED, then INCONCLUSIVE; else IMPROVED where anything is, SAME or PASSED.

        Under a gate INCONCLUSIVE too where BASE has a row that NEW lacks: it has passed nothing.
        """
        words = {judged.word for row in self.rows for judged in row.judged}
        if self.gate is not None and any(line.startswith(ONLY_IN_BASE) for line in self.unmatched):
            words.add("INCONCLUSIVE")
        order: tuple[Word, ...] = ("REGRESSED", "INCONCLUSIVE", "IMPROVED", "SAME", "PASSED")
        return next((word for word in order if word in words), "INCONCLUSIVE")


@dataclass(frozen=True, slots=True)
class _Pair:
    base: Measurement
    new: Measurement
    base_calls: Calls
    new_calls: Calls


@dataclass(frozen=True, slots=True)
class _Cell:
    """A quantity of a pair before its word. ratio is None, with the reason, where the samples do not give one."""

    pair: int
    quantity: Quantity
    ratio: Ratio | None
    missing: str | None


def compare_turns(
    measured: Measured,
    *,
    base: str,
    new: str,
    margin: float | None = None,
    gate: Mapping[Quantity, float] | None = None,
) -> Comparison:
    """The second of two artifacts or services against the first, measured in turns in one run, under every load.

    base, new: what to call them. margin, gate: as in `compare_reports`. Raises ValueError where the rows are not those
    of two targets.
    """
    rows = measured.measurements
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    in_turns = all(row.samples + TURNS in measured.samples for row in rows)
    if not in_turns or any(one.load != other.load or one.boundary != other.boundary for one, other in pairs):
        raise ValueError("not two targets measured in turns")
    found = [_Pair(one, other, _calls(one, measured), _calls(other, measured)) for one, other in pairs]
    compared = _judge(found, paired=True, margin=margin, gate=gate)
    return Comparison(
        base=base, new=new, paired=True, processes=_processes(found), margin=_margin(margin, gate),
        gate=dict(gate) if gate else None, rows=compared,
        warnings=(ONE_PROCESS,) if _processes(found) == 1 else (), partial=measured.partial,
    )  # fmt: skip


def compare_reports(
    base: Measured, new: Measured, *, margin: float | None = None, gate: Mapping[Quantity, float] | None = None
) -> Comparison:
    """The rows of NEW against those of BASE that measured the same: variant, runtime, provider, boundary and load.

    margin: a fraction, by default 0.05. gate: which quantities are judged, and the ratio that each may not be worse
    than ({"p99": 1.05, "throughput": 0.97}), instead of the margin. Raises UsageError where no row has a partner.
    """
    matched, unmatched = match_rows(base.measurements, new.measurements)
    if not matched:
        raise UsageError(
            "no row of NEW measured what a row of BASE did: " + "; ".join(unmatched),
            hint="rows belong together where variant, runtime, provider, boundary, generator, batch, concurrency and "
            "rate are the same",
        )
    pairs = [_Pair(one, other, _calls(one, base), _calls(other, new)) for one, other in matched]
    warnings = [WITHIN_RUNS if _processes(pairs) == 1 else BETWEEN_TIMES]
    warnings += [*environment_differences(base.report.environment, new.report.environment)]
    warnings += [text for one, other in matched for text in row_differences(one, other)]
    return Comparison(
        base=base.report.title, new=new.report.title, paired=False, processes=_processes(pairs),
        margin=_margin(margin, gate), gate=dict(gate) if gate else None,
        rows=_judge(pairs, paired=False, margin=margin, gate=gate),
        unmatched=tuple(unmatched), warnings=tuple(dict.fromkeys(warnings)), partial=base.partial or new.partial,
    )  # fmt: skip


def _processes(pairs: Sequence[_Pair]) -> int:
    return min((row.processes for pair in pairs for row in (pair.base, pair.new)), default=1)


def holm(p_values: Sequence[float], level: float = FALSE_ALARMS) -> tuple[list[float], list[int]]:
    """The adjusted p-values, and by how many tests the level is divided for each. Holm 1979.

    A hypothesis that is rejected at `level` is so at level / divisor, and so its interval at 1 - level / divisor
    excludes it; those after the first that is not share that one's divisor.
    """
    count = len(p_values)
    adjusted, divisors = [1.0] * count, [count] * count
    worst, divisor = 0.0, count
    for step, index in enumerate(sorted(range(count), key=lambda one: p_values[one])):
        if worst <= level:
            divisor = count - step
        worst = max(worst, min(1.0, (count - step) * p_values[index]))
        adjusted[index], divisors[index] = worst, divisor
    return adjusted, divisors


def word_for(cost: RatioInterval, *, differs: bool, limit: float, gated: bool) -> Word:
    """The word on a cost ratio (above 1 is worse) whose limit is at least 1.

    REGRESSED: surely worse than no change, and the estimate is beyond the limit. IMPROVED is its mirror image. SAME:
    the whole interval is within the limit on both sides. Under a gate only "worse" counts: PASSED where the whole
    interval is within the limit. Otherwise INCONCLUSIVE.
    """
    if differs and cost.value > limit:
        return "REGRESSED"
    inside = cost.high is not None and cost.high <= limit
    if gated:
        return "PASSED" if inside else "INCONCLUSIVE"
    if differs and cost.value < 1 / limit:
        return "IMPROVED"
    return "SAME" if inside and cost.low is not None and cost.low >= 1 / limit else "INCONCLUSIVE"


def _judge(
    pairs: Sequence[_Pair], *, paired: bool, margin: float | None, gate: Mapping[Quantity, float] | None
) -> tuple[Compared, ...]:
    """Every pair with a word on each quantity, by Holm over all of them."""
    quantities = [one for one in QUANTITIES if gate is None or one in gate]
    cells_ = [
        _cell(pair, index, quantity, paired=paired)
        for index, pair in enumerate(pairs)
        for quantity in quantities
        # At a given rate the throughput is what was offered.
        if not (quantity == "throughput" and pair.base.load.rate is not None)
    ]
    if not cells_:
        raise UsageError(
            f"nothing to judge: at a given rate {' and '.join(quantities)} is what was offered",
            hint="gate p50 or p99, or compare rows of a load without a rate",
        )
    known = [cell for cell in cells_ if cell.ratio is not None]
    adjusted, divisors = holm([cell.ratio.p_value for cell in known if cell.ratio is not None])
    judged: list[list[Judged]] = [[] for _ in pairs]
    place = 0
    for cell in cells_:
        limit = gate[cell.quantity] if gate is not None else _limit(cell.quantity, _margin(margin, None))
        values = [_value(row, cell.quantity) for row in (pairs[cell.pair].base, pairs[cell.pair].new)]
        found = Judged(
            quantity=cell.quantity, base=values[0], new=values[1], ratio=None, p_value=None, limit=limit,
            word="INCONCLUSIVE", because=cell.missing,
        )  # fmt: skip
        if cell.ratio is not None:
            found = _with_word(
                found, cell.ratio, p_value=adjusted[place], divisor=divisors[place], family=len(known),
                gated=gate is not None,
            )  # fmt: skip
            place += 1
        judged[cell.pair].append(_less_failures(found, pairs[cell.pair]))
    return tuple(_compared(pair, tuple(found)) for pair, found in zip(pairs, judged, strict=True) if found)


def _less_failures(found: Judged, pair: _Pair) -> Judged:
    """No quantile says anything good where more calls failed than before: a median may not see them."""
    shares = [row.error_count / row.latency.samples for row in (pair.base, pair.new)]
    if shares[1] <= shares[0] or found.word not in ("SAME", "IMPROVED", "PASSED"):
        return found
    return found.model_copy(update={"word": "INCONCLUSIVE", "because": f"{pair.new.error_count} calls of NEW failed"})


def _with_word(found: Judged, ratio: Ratio, *, p_value: float, divisor: int, family: int, gated: bool) -> Judged:
    higher_is_better = found.quantity == "throughput"
    differs = p_value <= FALSE_ALARMS

    def at(parts: int) -> RatioInterval:
        confidence = 1 - FALSE_ALARMS / parts
        low, high = ratio.interval(confidence)
        return RatioInterval(value=ratio.value, low=low, high=high, confidence=confidence)

    # "Same" is claimed of any number of quantities at once, so its intervals must hold at once: Bonferroni's. That
    # something changed is claimed step by step, where Holm's is the level.
    interval = at(family)
    cost, limit = (_inverse(interval), 1 / found.limit) if higher_is_better else (interval, found.limit)
    word = word_for(cost, differs=differs, limit=limit, gated=gated)
    if word in ("REGRESSED", "IMPROVED"):
        interval = at(divisor)
    because = None
    if word == "INCONCLUSIVE":
        because = "it changed, but maybe less than the limit" if differs else "the interval reaches beyond the limit"
    return found.model_copy(update={"ratio": interval, "p_value": p_value, "word": word, "because": because})


def _cell(pair: _Pair, index: int, quantity: Quantity, *, paired: bool) -> _Cell:
    # In turns a ratio of medians is known where neither median is: a slow spell moves both, and cancels.
    in_need = not (paired and quantity == "p50")
    reasons = [
        f"{side}: {_uncertified(row, quantity)}"
        for side, row in (("BASE", pair.base), ("NEW", pair.new))
        if in_need and _value(row, quantity) is None
    ]
    if quantity == "p50":
        reasons += [
            f"{side}: up to {calls.most_failed:.0%} of the calls of a stretch failed"
            for side, calls in (("BASE", pair.base_calls), ("NEW", pair.new_calls))
            if calls.most_failed >= _MANY_FAILED
        ]
    if reasons:
        return _Cell(index, quantity, None, "; ".join(reasons))
    of: dict[Quantity, Callable[[], Ratio | None]] = {
        "p50": lambda: median_ratio(pair.base_calls, pair.new_calls, paired=paired),
        "p99": lambda: quantile_ratio(pair.base_calls, pair.new_calls, 0.99, paired=paired),
        "throughput": lambda: rate_ratio(pair.base_calls, pair.new_calls, paired=paired),
    }
    ratio = of[quantity]()
    return _Cell(index, quantity, ratio, None if ratio else _too_few(pair))


def _too_few(pair: _Pair) -> str:
    what = "turns" if pair.base.processes == 1 else "processes"
    return f"too few {what} to say how sure it is"


def _uncertified(row: Measurement, quantity: Quantity) -> str:
    said = f"{quantity} is not certified"
    return next((reason for reason in row.verdict.reasons if said in reason), said)


def _calls(row: Measurement, measured: Measured) -> Calls:
    """A row's samples with their turns; where there were none, with a dozen stretches of equal time."""
    latencies = np.maximum(1, measured.samples[row.samples])
    if row.samples + TURNS in measured.samples:
        _, turns = np.unique(measured.samples[row.samples + TURNS], return_inverse=True)
        durations = np.bincount(turns, weights=latencies / 1e9).astype(np.float64)
        processes = None
        if row.samples + PROCESSES in measured.samples:
            _, first = np.unique(turns, return_index=True)
            _, processes = np.unique(measured.samples[row.samples + PROCESSES][first], return_inverse=True)
        return Calls(
            latencies_ns=latencies, turns=turns.astype(np.int64), durations_s=durations, processes=processes
        )  # fmt: skip
    service = measured.samples.get(row.samples + SERVICE)
    # In a closed loop a call begins when another is answered: begins count the answers, without those of the warm-up.
    starts = measured.samples[row.samples + STARTS]
    order = np.argsort(starts, kind="stable")
    # Where the row says how long it lasted: a stall at its end has no begins.
    length = max(1, row.duration_ns or int(starts.max())) / STRETCHES
    stretch = np.minimum(starts[order] // length, STRETCHES - 1).astype(np.int64)
    return Calls(
        latencies_ns=latencies[order], turns=stretch, durations_s=np.full(STRETCHES, length / 1e9),
        answered=None if service is None else service[order] >= 0,
    )  # fmt: skip


def _compared(pair: _Pair, judged: tuple[Judged, ...]) -> Compared:
    base, new = pair.base, pair.new
    names = list(dict.fromkeys(cells.name(row) for row in (new, base)))
    against = [
        f"{side}: {reason}"
        for side, row in (("BASE", base), ("NEW", new))
        for reason in row.verdict.reasons
        if not row.verdict.steady
    ]
    return Compared(
        name=" against ".join(names), boundary=base.boundary, runtime=new.runtime, provider=new.provider,
        load=base.load, base_target=base.target, new_target=new.target, judged=judged, against=tuple(against),
    )  # fmt: skip


def _value(row: Measurement, quantity: Quantity) -> float | None:
    if quantity == "throughput":
        return row.throughput.value
    interval = row.latency.p50_ns if quantity == "p50" else row.latency.p99_ns
    return None if interval is None else interval.value


def _inverse(ratio: RatioInterval) -> RatioInterval:
    low = None if ratio.high is None else 1 / ratio.high
    high = None if ratio.low is None else 1 / ratio.low
    return RatioInterval(value=1 / ratio.value, low=low, high=high, confidence=ratio.confidence)


def _limit(quantity: Quantity, margin: float | None) -> float:
    """The same factor both ways, so that exchanging BASE and NEW exchanges the words."""
    assert margin is not None
    return 1 / (1 + margin) if quantity == "throughput" else 1 + margin


def _margin(margin: float | None, gate: Mapping[Quantity, float] | None) -> float | None:
    return None if gate is not None else MARGIN if margin is None else margin
