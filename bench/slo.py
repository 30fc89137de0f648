"""The highest rate at which a service keeps its objective, found by doubling and bisection."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from dlops.bench import stats
from dlops.bench.analysis import LEFT_LATE
from dlops.bench.stats import Integers
from dlops.errors import UsageError
from dlops.report import Measurement, Objective

Outcome = Literal["met", "missed", "unsure"]

# Why a search ended that Ctrl-C cut short.
INTERRUPTED = "interrupted"

# Bisection ends where the lowest rate that missed is at most this much above the highest that met.
RESOLUTION = 0.1
_CONFIDENCE = 0.975
_HALVINGS = 6
_DOUBLINGS = 20
_OBJECTIVE = re.compile(r"(p50|p90|p99)=(\d+(?:\.\d+)?)(us|ms|s)")
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_UNIT_NS = {"us": 1e3, "ms": 1e6, "s": 1e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """met: the highest rate that kept the objective, None where none did. missed: the lowest above it that did not, or
    could not be judged (unsure), None where all did. Both in requests a second."""

    met: float | None
    missed: float | None
    unsure: bool = False


def parse_objective(text: str) -> Objective:
    """`p99=20ms` as a record. Raises UsageError for anything else."""
    match = _OBJECTIVE.fullmatch(text.replace(" ", ""))
    if match is None or float(match[2]) == 0:
        raise UsageError(
            f"--slo {text!r}: expected a quantile and a time", hint="such as p99=20ms, p90=500us or p50=1s"
        )
    quantile = cast("Literal['p50', 'p90', 'p99']", match[1])
    return Objective(quantile=quantile, limit_ns=float(match[2]) * _UNIT_NS[match[3]])


def samples_for(objective: Objective) -> int:
    """How many requests to judge it by: 662 for p99, as LoadGen has it: twice what suffices where none is late."""
    share = _QUANTILES[objective.quantile]
    return round(662 * math.log(0.99) / math.log(share))


def judge(row: Measurement, response_ns: Integers, due_ns: Integers, objective: Objective) -> Outcome:
    """Whether the share of requests beyond the limit is certainly at most what the quantile allows, or certainly more.

    response_ns, due_ns: (n,), the row's. A failed request is beyond every limit. The bounds are Clopper and Pearson's,
    each one-sided at 97.5 % (an unsure rate is tried twice), over the samples that the run is worth. Late requests come
    in clusters; and where none is late, how alike neighbours at the quantile itself are says how many looks a queue
    gave. Where requests left late through our own fault, a miss proves nothing; that the objective was kept does.
    """
    if any(reason.startswith("saturated") for reason in row.verdict.reasons):
        return "missed"
    late = response_ns > objective.limit_ns
    turns = stats.stretches(due_ns, int(due_ns[-1]) + 1)
    quantile = _QUANTILES[objective.quantile]
    worth = min(stats.effective_share_samples(late, turns), stats.effective_samples(response_ns, quantile, turns=turns))
    allowed = 1 - quantile
    low, high = stats.share_bounds(float(late.mean()), worth, confidence=_CONFIDENCE)
    if high <= allowed:
        return "met"
    late_ourselves = any(reason.startswith(LEFT_LATE) for reason in row.verdict.reasons)
    return "missed" if low > allowed and not late_ourselves else "unsure"


def found_among(outcomes: Sequence[tuple[float, Outcome]]) -> Found:
    """What a search found that offered these rates, in the order it did: what `search` returns, from its outcomes.

    outcomes: rate in requests a second and what became of it. A rate met where it was met at once or, the first time
    unsure, at the second; otherwise it missed.
    """
    by_rate: dict[float, list[Outcome]] = {}
    for rate, outcome in outcomes:
        by_rate.setdefault(rate, []).append(outcome)
    settled = {rate: next((one for one in tries[:2] if one != "unsure"), "unsure") for rate, tries in by_rate.items()}
    met = max((rate for rate, outcome in settled.items() if outcome == "met"), default=None)
    beyond = (rate for rate, outcome in settled.items() if outcome != "met" and (met is None or rate > met))
    missed = min(beyond, default=None)
    return Found(met=met, missed=missed, unsure=missed is not None and settled[missed] == "unsure")


def search(
    probe: Callable[[float], Outcome], *, start: float, least: float = 0.0, resolution: float = RESOLUTION
) -> Found:
    """Double from `start` until a rate is missed (halve where the first one is), then bisect between the two.

    probe: offers a rate, in requests a second. least: no lower rate is tried. A rate that it is unsure about is tried
    once more and then counts as one that did not keep it: what cannot be certified is not promised.
    """
    settled: dict[float, Outcome] = {}

    def met(rate: float) -> bool:
        outcome = probe(rate)
        settled[rate] = probe(rate) if outcome == "unsure" else outcome
        return settled[rate] == "met"

    def found(low: float | None, high: float | None) -> Found:
        return Found(met=low, missed=high, unsure=high is not None and settled[high] == "unsure")

    low, high = _bracket(met, _round(start), least)
    if low is None:
        return found(None, high)
    while high is not None and high > low * (1 + resolution):
        middle = _round(math.sqrt(low * high))
        if middle in (low, high):
            break
        if met(middle):
            low = middle
        else:
            high = middle
    return found(low, high)


def _bracket(met: Callable[[float], bool], start: float, least: float) -> tuple[float | None, float | None]:
    """A rate that met and one above it that missed; None for the one that was not found."""
    if met(start):
        low = start
        for _ in range(_DOUBLINGS):
            if not met(2 * low):
                return low, 2 * low
            low *= 2
        return low, None
    high = start
    while high / 2 >= least and high > start / 2**_HALVINGS:
        if met(high / 2):
            return high / 2, high
        high /= 2
    return None, high


def _round(rate: float) -> float:
    """Three significant digits: a rate is a number that people type."""
    return float(f"{rate:.3g}")
