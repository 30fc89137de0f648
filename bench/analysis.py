"""A row's numbers from its samples: one pure function a kind of row, for measuring and for re-analysing alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlops.bench import stats
from dlops.bench.dependence import STRETCHES
from dlops.bench.pacing import is_gone
from dlops.bench.stats import Integers
from dlops.report import CLOCKS, COPY_IN, COPY_OUT, ENQUEUE, Clocks, Interval, Latency, Measurement, Verdict
from dlops.timing import MIN_ROUNDS, by_turn

# Requests that left this much too late (p99) say more about us than about the service.
_MAX_LAG_NS = 1_000_000
_MAX_LAG_SHARE = 0.1
# How the reason begins that says so.
LEFT_LATE = "client-bound: 1% of the requests left"
# Under a rate calls wait for one another, and a queue's bursts are rarer than its tail is long: a run that saw few of
# them looks surer than it is. So a quantile also takes this many independent calls by the median, which every run sees
# enough of: then about one run of twenty gives an interval that does not hold, up to 0.9 of the capacity.
QUEUE_SAMPLES = {"p90": 100, "p99": 800}
# A service that answers less than this share of what was offered has no steady state under it.
_KEEPS_UP = 0.98
# From this share of an inference on, what it takes on the GPU hardly matters: the host is what it waits for.
_LAUNCH_BOUND = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What follows from a row's samples, under the names of Measurement's fields."""

    latency: Latency
    service: Latency | None = None
    throughput: Interval
    speedup: Interval | None = None
    clocks: Clocks | None = None
    verdict: Verdict

    def as_fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def analyse_turns(
    latencies_ns: Integers, turns: Integers, parts_ns: Mapping[str, Integers], *, batch: int, concurrency: int = 1,
    processes: Integers | None = None, baseline: Sequence[Integers] | None, observed: Sequence[str],
    remarks: Sequence[str] = (),
) -> Figures:  # fmt: skip
    """A target that took turns in one run with others.

    latencies_ns, turns: (n,), the round of each call. parts_ns: by the suffix of CLOCKS, what else was timed of each
    call, (n,); empty off CUDA. concurrency: calls that were made at once. processes: (n,), which of several made each
    call; None where there was one, and then intervals are of that one. baseline: by turn, or by process where there are
    several, the latencies of the row that speed-ups are counted from, of the same run; None gives no speed-up.
    observed: what stands against the row that no sample shows; remarks: what no sample shows either and does not.
    """
    medians = [float(np.median(turn)) for turn in by_turn(latencies_ns, turns)]
    blocks = turns if processes is None else processes
    own = by_turn(latencies_ns, blocks)
    against = [*observed]
    if len(medians) < MIN_ROUNDS:
        against.append(f"only {len(medians)} rounds: fewer than {MIN_ROUNDS} show neither drift nor spread")
    against += _unsteady(medians, "the medians of turns vary by {:.0%}; something else used the machine")
    return Figures(
        latency=stats.summarize(latencies_ns, turns=blocks, apart=processes is not None),
        # Little's law: callers that never wait between calls spend all their time in them.
        throughput=stats.rate_interval(
            np.array([batch * len(block) for block in own]),
            np.array([block.sum() / 1e9 / concurrency for block in own]),
        ),
        speedup=None if baseline is None else stats.ratio_interval(baseline, own),
        clocks=_clocks(parts_ns, blocks, apart=processes is not None),
        verdict=_verdict(
            against, observed, latencies_ns, blocks, remarks, said=launch_bound(latencies_ns, parts_ns),
            apart=processes is not None,
        ),
    )  # fmt: skip


def launch_bound(latencies_ns: Integers, parts_ns: Mapping[str, Integers]) -> list[str]:
    """What to say where the host takes 80 % or more of the inference (the call without its copies) to enqueue it.

    latencies_ns, each part: (n,). The share is the median over the calls.
    """
    if ENQUEUE not in parts_ns:
        return []
    inference = latencies_ns - parts_ns.get(COPY_IN, 0) - parts_ns.get(COPY_OUT, 0)
    share = float(np.median(parts_ns[ENQUEUE] / np.maximum(inference, 1)))
    if share < _LAUNCH_BOUND:
        return []
    return [f"launch-bound: the host takes {share:.0%} of the inference to enqueue it, and the GPU waits for the host"]


def analyse_closed_loop(
    latencies_ns: Integers, starts_ns: Integers, earlier_ns: Integers, *, duration_ns: int, batch: int,
    succeeded: NDArray[np.bool_] | None = None, observed: Sequence[str], remarks: Sequence[str] = (),
) -> Figures:  # fmt: skip
    """A service with a fixed number of calls in flight.

    latencies_ns, starts_ns: (n,), from the run's begin. earlier_ns: (m,), when calls were answered that began before.
    succeeded: (n,), None where all did; one that failed has the worst latency and is no answer.
    """
    turns = stats.stretches(starts_ns, duration_ns)
    good = np.ones(len(latencies_ns), np.bool_) if succeeded is None else succeeded
    # What failed is said by itself: a median of the worst latency would be called another's load.
    medians = _medians(latencies_ns[good], turns[good])
    varying = "the median varies by {:.0%} within the run; something else used the machine"
    against = [*observed, *_unsteady(medians, varying)]
    return Figures(
        latency=stats.summarize(latencies_ns, turns=turns),
        throughput=answered_rate(np.concatenate([(starts_ns + latencies_ns)[good], earlier_ns]), duration_ns, batch),
        verdict=_verdict(against, observed, latencies_ns, turns, remarks),
    )


def analyse_rate(
    response_ns: Integers, due_ns: Integers, service_ns: Integers, earlier_ns: Integers, *, duration_ns: int,
    lag_p99_ns: float, batch: int, observed: Sequence[str], remarks: Sequence[str] = (),
) -> Figures:  # fmt: skip
    """A service under a rate: above all, whether the rate was truly offered and truly served.

    response_ns, due_ns, service_ns: (n,), from the run's begin; service_ns is -1 where a request failed. earlier_ns:
    (m,), when requests were answered that came due before. lag_p99_ns: how late requests left.
    """
    turns = stats.stretches(due_ns, duration_ns)
    succeeded = service_ns >= 0
    arrived = (due_ns + response_ns)[succeeded]
    against = [*observed]
    answered = int((arrived <= duration_ns).sum())
    trend = stats.drift(_medians(response_ns, turns))
    # Where the server died what it left is no wait that grew.
    gone = is_gone(observed)
    saturated = not gone and answered < _KEEPS_UP * len(response_ns) and trend.change > 0 and trend.matters
    if saturated:
        against.append(f"saturated: {answered} of {len(response_ns)} requests were answered in time, and the wait grew")
    elif trend.matters and not gone:
        against.append(f"not steady: the median moved by {trend.change:+.0%} over the run")
    late = max(_MAX_LAG_NS, _MAX_LAG_SHARE * float(np.quantile(response_ns, 0.99, method="higher")))
    # Under a server that does not keep up all connections are taken: then requests leave late through no fault of ours.
    if lag_p99_ns > late and not saturated and not gone:
        against.append(f"{LEFT_LATE} {lag_p99_ns / 1e6:.1f} ms late or more")
    latency, unsure = _of_a_queue(stats.summarize(response_ns, turns=turns))
    return Figures(
        latency=latency,
        service=stats.summarize(service_ns[succeeded], turns=turns[succeeded]),
        throughput=answered_rate(np.concatenate([arrived, earlier_ns]), duration_ns, batch),
        verdict=_verdict(against, observed, response_ns, turns, remarks, said=unsure),
    )


def _of_a_queue(latency: Latency) -> tuple[Latency, list[str]]:
    """Response times without the quantiles that a queue's bursts leave open, and what is to be said of those."""
    unknown: dict[str, None] = {}
    said = []
    for name, need in QUEUE_SAMPLES.items():
        if getattr(latency, f"{name}_ns") is not None and latency.effective_samples < need:
            unknown[f"{name}_ns"] = None
            said.append(
                f"under-sampled: {name} of a queue is not given: by its median the run is worth "
                f"{latency.effective_samples} independent calls, it needs {need}"
            )
    return latency.model_copy(update=unknown), said


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


def remarked(row: Measurement, remarks: Sequence[str]) -> Measurement:
    """The row with more to be said of it that no sample shows and that does not stand against it."""
    if not remarks:
        return row
    old = row.verdict
    verdict = old.model_copy(update={"reasons": (*old.reasons, *remarks), "remarks": (*old.remarks, *remarks)})
    return row.model_copy(update={"verdict": verdict})


def listed(errors: Mapping[str, int]) -> str:
    """Errors by kind, the most frequent first: `HTTP 503 ×2, timed out ×1`."""
    return ", ".join(f"{kind} ×{count}" for kind, count in sorted(errors.items(), key=lambda item: -item[1])) or "none"


def answered_rate(arrived_ns: Integers, duration_ns: int, batch: int) -> Interval:
    """Items a second, of all answered within the run, whenever asked: what a slow server owes at one end of the run
    it is paid at the other."""
    edges = np.linspace(0, duration_ns, STRETCHES + 1)
    counts, _ = np.histogram(arrived_ns, bins=edges)
    return stats.rate_interval(counts * batch, np.diff(edges) / 1e9)


def _clocks(parts_ns: Mapping[str, Integers], turns: Integers, *, apart: bool) -> Clocks | None:
    if not parts_ns:
        return None
    found = {CLOCKS[suffix]: stats.summarize(part, turns=turns, apart=apart) for suffix, part in parts_ns.items()}
    return Clocks(**found)


def _medians(samples: Integers, turns: Integers) -> list[float]:
    return [float(np.median(samples[turns == turn])) for turn in np.unique(turns)]


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


def _verdict(
    against: Sequence[str], observed: Sequence[str], samples: Integers, turns: Integers, remarks: Sequence[str] = (),
    said: Sequence[str] = (), apart: bool = False,
) -> Verdict:  # fmt: skip
    """Steady where nothing stands against it. A median that is not known does; other quantiles that are not certified,
    and remarks, are said and do not.

    remarks: what no sample shows and does not stand against the row; said: what samples show and does not either.
    apart: as in `stats.summarize`.
    """
    lacking = undersampled(samples, turns, apart=apart)
    reasons = (*against, *lacking, *said, *remarks)
    return Verdict(
        steady=_knows_median(samples, turns, apart=apart) and not against,
        reasons=reasons,
        observed=tuple(observed),
        remarks=tuple(remarks),
    )


def _knows_median(samples: Integers, turns: Integers, *, apart: bool) -> bool:
    have = len(np.unique(turns)) if apart else stats.effective_samples(samples, 0.5, turns=turns)
    return have >= stats.fewest_samples(0.5)


def undersampled(samples: Integers, turns: Integers, *, apart: bool = False) -> list[str]:
    """Which quantiles the sample does not certify, with what it would need. apart: as in `stats.summarize`."""
    reasons = []
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        if apart and q == 0.5 and len(np.unique(turns)) >= stats.fewest_samples(q):
            continue
        have, least = stats.effective_samples(samples, q, turns=turns), stats.fewest_samples(q)
        need = stats.certifying_samples(q)
        if have < need:
            alone = f"; {least} give an interval" if have >= least else ""
            reasons.append(
                f"under-sampled: {name} is not certified: {have} effective samples of {len(samples)}, it needs {need}"
                f"{alone}"
            )
    return reasons
