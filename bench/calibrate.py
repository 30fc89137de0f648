"""The harness measured by itself, on the machine at hand: what timing and sending cost with nothing behind them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import repeat

import numpy as np

from dlops.bench import analysis, stats
from dlops.bench.arrivals import constant, poisson
from dlops.bench.load import Loaded, closed_loop
from dlops.bench.nullserver import null_server
from dlops.bench.openloop import OpenLoaded, open_loop
from dlops.bench.peaks import measure_peaks
from dlops.bench.slo import Found, Outcome, search
from dlops.environment import describe_environment
from dlops.report import Calibration, Interval, Machine, Peaks, SendingCost, TimingCost
from dlops.timing import MIN_ROUNDS, Clock, SystemClock, interleave
from dlops.version import __version__

# A schedule counts as kept while 99 % of its requests leave within this time of when they are due.
MAX_LAG_NS = 1_000_000
CLOSED_CONCURRENCY = 8
LAG_RATE = 500.0
_MS = 1_000_000
_SLEEP_S = 0.001
# As large as a small image's request: 8 by 8 pixels of float32.
_REQUEST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 256\r\n\r\n" + b"x" * 256
# What one sender is rated at: at lower rates it sleeps longer, and how a machine wakes up is not what limits a sender.
_FIRST_RATE, _LEAST_RATE = 4000.0, 500.0
# Connections are open before a schedule begins; what its first requests page in is not kept.
_LEAD_IN_NS = 100_000_000
# Beyond these a calibration says more about what else the machine did.
_MAX_SHARE = 0.01
_MAX_WIDTH = 0.5
_MAX_ABOVE_MEDIAN = 1.25
_NO_OPS = 1000
_BLOCKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long each part is measured, in seconds. sleeps: how many. probe_s: of each rate; None looks for no rate."""

    timing_s: float
    closed_s: float
    warmup_s: float
    lag_s: float
    sleeps: int
    probe_s: float | None


FULL = Effort(timing_s=2.0, closed_s=2.0, warmup_s=3.0, lag_s=4.0, sleeps=1000, probe_s=2.0)
# About 2 s in all, two processes' start included.
QUICK = Effort(timing_s=0.2, closed_s=0.2, warmup_s=0.2, lag_s=0.35, sleeps=50, probe_s=None)


def calibrate(*, quick: bool = False, network: bool = True) -> Calibration:
    """Measure timing, with `network` sending too, and the machine's peaks. quick: without peaks and a sender's rate.

    Raises MachineError where the null server or a sender does not start.
    """
    effort = QUICK if quick else FULL
    # First what is to be least disturbed: no other process of ours is there yet.
    timing = timing_cost(budget_s=effort.timing_s)
    sending, against = sending_cost(effort) if network else (None, [])
    peaks = None if quick else measure_peaks()
    return Calibration(
        created=datetime.now(UTC), machine=this_machine(), quick=quick, timing=timing, network=sending, peaks=peaks,
        reasons=(*_against_timing(timing), *against, *_against_peaks(peaks)),
    )  # fmt: skip


def this_machine() -> Machine:
    where = describe_environment()
    return Machine(
        cpu=where.cpu, cores=where.cores, system=where.system, python=where.python, dlops_version=__version__
    )


def timing_cost(
    *, budget_s: float, clock: Clock | None = None, now: Callable[[], int] = time.perf_counter_ns,
    no_op: Callable[[], object] | None = None, wait: Callable[[], object] | None = None,
) -> TimingCost:  # fmt: skip
    """What `dlops.timing.interleave` adds to a call that does nothing and to a wait of 1 ms.

    Each turn of the no-op is paired with a bare loop right after it. The wait is a busy one that ends by the clock: a
    fixed amount of work takes 5 % more or less from one moment to the next, which would hide what is looked for.
    budget_s: for both together, without the warm-ups. clock, now, no_op, wait: of a simulation; now is what the bare
    loop reads.
    """
    clock = clock or SystemClock()
    nothing, until_1_ms = no_op or _nothing, wait or _wait_1_ms
    bare: list[float] = []

    def bare_loop(_: float) -> None:
        blocks = []
        for _block in range(_BLOCKS):
            start = now()
            for _call in repeat(None, _NO_OPS):
                nothing()
            blocks.append((now() - start) / _NO_OPS)
        bare.append(float(np.median(blocks)))

    def turns(call: Callable[[], object], *, turn_s: float, after_round: Callable[[float], None] | None) -> list[float]:
        """The median latency of each turn."""
        timed = interleave(
            {"calibration": call}, budget_s=budget_s / 2, min_samples=MIN_ROUNDS, turn_s=turn_s,
            max_warmup_s=min(1.0, budget_s), clock=clock, on_progress=after_round,
        )  # fmt: skip
        return [float(np.median(turn)) for turn in timed.runs["calibration"].by_turn()]

    # Short turns: a no-op is called a million times a second, and each call is kept.
    no_ops = turns(nothing, turn_s=0.002, after_round=bare_loop)
    waits = turns(until_1_ms, turn_s=0.02, after_round=None)
    step_ns, read_ns = clock_cost(now)
    return TimingCost(
        added_ns=_certain([harness - alone for harness, alone in zip(no_ops, bare, strict=True)]),
        share_of_1_ms=_certain([took / _MS - 1 for took in waits]),
        clock_step_ns=step_ns,
        clock_read_ns=read_ns,
    )


def clock_cost(now: Callable[[], int] = time.perf_counter_ns, *, readings: int = 10_000) -> tuple[int, float]:
    """The smallest difference above zero between two readings in a row, and what one costs, both in nanoseconds."""
    times = np.array([now() for _ in range(readings)], np.int64)
    steps = np.diff(times)
    # The median block's: an interruption would count for the clock.
    cost = float(np.median([np.ptp(block) / (len(block) - 1) for block in np.array_split(times, 20)]))
    return int(steps[steps > 0].min()), cost


def sending_cost(effort: Effort) -> tuple[SendingCost, list[str]]:
    """The load generator against the null server, and what stands against its numbers.

    Raises MachineError where a process does not start, KeyboardInterrupt on Ctrl-C.
    """
    with null_server() as port:
        one = _closed(port, 1, effort)
        many = _closed(port, CLOSED_CONCURRENCY, effort)
        lagged = _scheduled(port, constant(LAG_RATE, duration_s=effort.lag_s))
        found = None if effort.probe_s is None else _search(port, effort.probe_s)
    lag_p50, lag_p99 = (stats.quantile_interval(lagged.lag_ns, q, turns=_turns(lagged)) for q in (0.5, 0.99))
    late_ns = oversleep(count=effort.sleeps)
    cost = SendingCost(
        floor_ns=stats.quantile_interval(
            one.latencies_ns, 0.5, turns=stats.stretches(one.starts_ns, one.duration_ns)
        ),
        closed_concurrency=CLOSED_CONCURRENCY,
        closed_rate=_rate(many),
        capacity=None if found is None else found.met,
        missed=None if found is None else found.missed,
        lag_rate=LAG_RATE,
        lag_p50_ns=lag_p50,
        lag_p99_ns=lag_p99,
        oversleep_p50_ns=stats.quantile_interval(late_ns, 0.5),
        oversleep_p99_ns=stats.quantile_interval(late_ns, 0.99),
    )  # fmt: skip
    return cost, _against_sending(cost, effort, settled=one.warmed_up and many.warmed_up)


def _against_timing(cost: TimingCost) -> list[str]:
    share = cost.share_of_1_ms
    if max(share.value, share.high or share.value) <= _MAX_SHARE:
        return []
    return [f"a wait of 1 ms may be recorded over {_MAX_SHARE:.0%} too long; something else used the machine"]


def _against_peaks(peaks: Peaks | None) -> list[str]:
    cpu = () if peaks is None else peaks.cpu
    pairs = [(one.flops, one.flops_median) for one in cpu] + [(one.bytes_per_s, one.bytes_per_s_median) for one in cpu]
    if all(best <= _MAX_ABOVE_MEDIAN * median for best, median in pairs):
        return []
    return [
        "the best product or copy was far above the median one: a peak may be higher; something else used the machine"
    ]


def _against_sending(cost: SendingCost, effort: Effort, *, settled: bool) -> list[str]:
    reasons = []
    if cost.floor_ns is None:
        reasons.append("the floor is not certified: its calls resemble one another; something else used the machine")
    if effort.probe_s is None:
        reasons.append("made in short: what a sender keeps was not looked for, and no p99 is certified")
        return reasons
    if not settled:
        reasons.append("in the closed loops latency was still moving when the warm-up ended")
    rate = cost.closed_rate
    if rate is not None and (rate.low is None or rate.high is None or rate.high - rate.low > _MAX_WIDTH * rate.value):
        reasons.append("the closed loop's rate varied within its run; something else used the machine")
    if cost.lag_p99_ns is None:
        reasons.append("the p99 of the lag is not certified: late requests came in clusters")
    if cost.capacity is None:
        reasons.append(
            f"no rate was kept: even at {cost.missed:,.5g} requests a second more than 1% left over 1 ms late, or may "
            "have; something else used the machine"
        )
    return reasons


def judge_lag(loaded: OpenLoaded) -> Outcome:
    """Whether certainly at most 1 % of the requests left over 1 ms late, or certainly more; a failed one is late.

    Certainly: beyond Clopper and Pearson's one-sided 95 % bound, over the samples that the run is worth.
    """
    late = (loaded.sent_ns - loaded.due_ns > MAX_LAG_NS) | ~loaded.succeeded
    turns = _turns(loaded)
    # Where none is late, how alike neighbours are at the quantile itself says how much the run is worth.
    worth = min(stats.effective_share_samples(late, turns), stats.effective_samples(loaded.lag_ns, 0.99, turns=turns))
    low, high = stats.share_bounds(float(late.mean()), worth)
    if high <= 0.01:
        return "met"
    return "missed" if low > 0.01 else "unsure"


def oversleep(*, count: int, clock: Clock | None = None) -> stats.Integers:
    """How much longer than asked sleeps of 1 ms last, in nanoseconds: (count,)."""
    clock = clock or SystemClock()
    late = []
    for _ in range(count):
        start = clock.now_ns()
        clock.sleep(_SLEEP_S)
        late.append(clock.now_ns() - start - round(_SLEEP_S * 1e9))
    return np.array(late, np.int64)


def _nothing() -> None:
    return None


def _wait_1_ms() -> None:
    end = time.perf_counter_ns() + _MS
    while time.perf_counter_ns() < end:
        pass


def _certain(values: list[float]) -> Interval:
    interval = stats.median_interval(values)
    assert interval is not None, "interleave makes six rounds"
    return interval


def _turns(loaded: OpenLoaded) -> stats.Integers:
    return stats.stretches(loaded.due_ns, int(loaded.due_ns[-1]) + 1)


def _closed(port: int, concurrency: int, effort: Effort) -> Loaded:
    loaded = closed_loop(
        "127.0.0.1", port, [_REQUEST], concurrency=concurrency, duration_s=effort.closed_s,
        max_warmup_s=effort.warmup_s,
    )  # fmt: skip
    if loaded.interrupted:
        raise KeyboardInterrupt
    return loaded


def _scheduled(port: int, due_ns: stats.Integers, *, title: str = "calibrating") -> OpenLoaded:
    loaded = open_loop("127.0.0.1", port, [_REQUEST], due_ns, senders=1, title=title)
    if loaded.interrupted:
        raise KeyboardInterrupt
    return loaded.between(_LEAD_IN_NS, int(due_ns[-1]) + 1)


def _search(port: int, probe_s: float) -> Found:
    def probe(rate: float) -> Outcome:
        due_ns = poisson(rate, duration_s=probe_s)
        return judge_lag(_scheduled(port, due_ns, title=f"calibrating: {rate:,.5g} requests/s"))

    return search(probe, start=_FIRST_RATE, least=_LEAST_RATE)


def _rate(loaded: Loaded) -> Interval:
    arrived_ns = np.concatenate([loaded.starts_ns + loaded.latencies_ns, loaded.earlier_ns])
    return analysis.answered_rate(arrived_ns, loaded.duration_ns, batch=1)
