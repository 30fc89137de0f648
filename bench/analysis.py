"""A row's numbers from its samples: one pure function a kind of row, for measuring and for re-analysing alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from dlops.bench import stats
from dlops.bench.stats import Integers
from dlops.report import Interval, Latency, Verdict
from dlops.timing import MIN_ROUNDS, by_turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What follows from a row's samples, under the names of Measurement's fields."""

    latency: Latency
    throughput: Interval
    speedup: Interval | None = None
    verdict: Verdict

    def as_fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def analyse_turns(
    latencies_ns: Integers, turns: Integers, *, batch: int, baseline: Sequence[Integers] | None, observed: Sequence[str]
) -> Figures:
    """A target that took turns in one run with others.

    latencies_ns, turns: (n,), the round of each call. baseline: by turn, the latencies of the row that speed-ups are
    counted from, of the same run; None gives no speed-up. observed: what stands against the row that no sample shows.
    """
    own = by_turn(latencies_ns, turns)
    counts = np.array([batch * len(turn) for turn in own], np.int64)
    medians = [float(np.median(turn)) for turn in own]
    against = [*observed]
    if len(own) < MIN_ROUNDS:
        against.append(f"only {len(own)} rounds: fewer than {MIN_ROUNDS} show neither drift nor spread")
    against += _unsteady(medians, "the medians of turns vary by {:.0%}; something else used the machine")
    return Figures(
        latency=stats.summarize(latencies_ns, turns=turns),
        throughput=stats.rate_interval(counts, np.array([turn.sum() / 1e9 for turn in own])),
        speedup=None if baseline is None else stats.ratio_interval(baseline, own),
        verdict=_verdict(against, observed, latencies_ns, turns),
    )


def shortcomings(
    *,
    warmed_up: bool,
    warmup_calls: int | None = None,
    interrupted: bool = False,
    errors: Mapping[str, int] | None = None,
    calls: int = 0,
    stopped: str | None = None,
) -> tuple[str, ...]:
    """What stands against a row that its samples do not show: it is kept with the row, as `Verdict.observed`.

    errors: failed calls by kind, of `calls` in all. stopped: why the run ended early.
    """
    against = []
    if errors:
        against.append(f"{sum(errors.values())} of {calls} calls failed: {listed(errors)}")
    if stopped:
        against.append(stopped)
    if interrupted:
        against.append("interrupted")
    if not warmed_up:
        made = "" if warmup_calls is None else f" ({warmup_calls} calls)"
        against.append(f"not steady: latency was still moving when the warm-up ended{made}")
    return tuple(against)


def listed(errors: Mapping[str, int]) -> str:
    """Errors by kind, the most frequent first: `HTTP 503 ×2, timed out ×1`."""
    return ", ".join(f"{kind} ×{count}" for kind, count in sorted(errors.items(), key=lambda item: -item[1])) or "none"


def _unsteady(medians: Sequence[float], varying: str) -> list[str]:
    """A trend in medians taken in order, and their spread, where they are too large to quote the row."""
    against = []
    trend = stats.drift(medians)
    if trend.matters:
        against.append(f"not steady: the median moved by {trend.change:+.0%} over the run")
    wide = stats.spread(medians)
    if wide > stats.MAX_SPREAD:
        against.append("not steady: " + varying.format(wide))
    return against


def _verdict(against: Sequence[str], observed: Sequence[str], samples: Integers, turns: Integers) -> Verdict:
    """Steady where nothing stands against it; quantiles that are not certified are said and do not count."""
    reasons = (*against, *undersampled(samples, turns))
    return Verdict(steady=not against, reasons=reasons, observed=tuple(observed))


def undersampled(samples: Integers, turns: Integers) -> list[str]:
    """Which quantiles the sample does not certify, with what it would need."""
    reasons = []
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        if stats.quantile_interval(samples, q, turns=turns) is None:
            have, need = stats.effective_samples(samples, q, turns=turns), stats.fewest_samples(q)
            reasons.append(f"{name} is not certified: {have} effective samples of {len(samples)}, it needs {need}")
    return reasons
