"""A service under a rate of requests: its row, and what stands against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlops.bench import stats
from dlops.bench.arrivals import Integers, Schedule
from dlops.bench.inprocess import undersampled
from dlops.bench.load import closed_loop
from dlops.bench.network import Payload, encoded, listed, served_fields, watch_server
from dlops.bench.oip import Endpoint
from dlops.bench.openloop import OpenLoaded, open_loop
from dlops.bench.server_time import Sent
from dlops.errors import MachineError
from dlops.report import SERVICE, STARTS, Interval, Load, Measurement, Verdict

# Requests that left this much too late (p99) say more about us than about the service.
_MAX_LAG_NS = 1_000_000
_MAX_LAG_SHARE = 0.1
# A service that answers less than this share of what was offered has no steady state under it.
_KEEPS_UP = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """A service after its warm-up. steady: latency had settled. rate: requests a second that one caller got."""

    calls: int
    steady: bool
    rate: float


def warm_up(endpoint: Endpoint, payload: Payload) -> Warm:
    """One call at a time until latency has settled, at most 3 s; once for all the rates of a payload.

    What is left to warm up under load falls into each schedule's lead-in. Raises MachineError where no call succeeds.
    """
    loaded = closed_loop(
        endpoint.host, endpoint.port, encoded(endpoint, payload), concurrency=1, duration_s=0.1, max_warmup_s=3.0,
        transport=endpoint.client.transport,
    )  # fmt: skip
    if loaded.interrupted:
        raise KeyboardInterrupt
    if not len(loaded.latencies_ns):
        raise MachineError(
            f"{endpoint.url}: no request succeeded ({listed(loaded.errors)})", hint="the server's log says why"
        )
    return Warm(calls=loaded.warmup_calls, steady=loaded.warmed_up, rate=1e9 / float(np.median(loaded.latencies_ns)))


def measure_rate(
    endpoint: Endpoint,
    payload: Payload,
    schedule: Schedule,
    *,
    warm: Warm,
    batch: int,
    senders: int | None,
    key: str,
    title: str,
) -> tuple[Measurement, dict[str, Integers], OpenLoaded]:
    """One row, its samples by name, and the run itself. Raises MachineError where no request succeeded."""
    requests = encoded(endpoint, payload)
    watch = watch_server(endpoint, payload)
    watch.before()
    whole = open_loop(
        endpoint.host, endpoint.port, requests, schedule.due_ns, senders=senders, title=title,
        transport=endpoint.client.transport,
    )  # fmt: skip
    loaded = whole.between(schedule.lead_in_ns, schedule.end_ns)
    if not loaded.succeeded.any():
        if loaded.interrupted:
            raise KeyboardInterrupt
        raise MachineError(
            f"{endpoint.url}: no request succeeded at {schedule.rate:g} a second ({listed(loaded.errors)})",
            hint="the server's log says why",
        )
    # Both means are of the whole schedule, its lead-in included: so the server is asked only when it is idle.
    accounted = watch.end(
        Sent(
            attempts=int((whole.sent_ns >= 0).sum()),
            answered=int(whole.succeeded.sum()),
            in_flight=1,
            client_ns=float(whole.service_ns.mean()),
        )
    )
    loaded = _attempted(loaded)
    duration_s = schedule.duration_s
    response, turns = loaded.response_ns, stats.stretches(loaded.due_ns, duration_s)
    served = turns[loaded.succeeded]
    row = Measurement(
        load=Load(scenario="server", batch=batch, concurrency=1, rate=schedule.rate),
        samples=key,
        latency=stats.summarize(response, turns=turns),
        service=stats.summarize(loaded.service_ns, turns=served),
        server=accounted.server,
        lag_p99_ns=float(np.quantile(loaded.lag_ns, 0.99, method="higher")),
        throughput=_throughput(whole, schedule, batch),
        errors=loaded.errors,
        warmup_calls=warm.calls + int((whole.due_ns < schedule.lead_in_ns).sum()),
        verdict=accounted.added_to(judge(loaded, warmed_up=warm.steady, turns=turns, duration_s=duration_s)),
        **served_fields(endpoint, payload),
    )
    service = np.where(loaded.succeeded, loaded.arrived_ns - loaded.sent_ns, -1)
    return row, {key: response, key + STARTS: loaded.due_ns, key + SERVICE: service}, loaded


def judge(loaded: OpenLoaded, *, warmed_up: bool, turns: Integers, duration_s: float) -> Verdict:
    """Whether a row can be quoted, and why not: above all, whether the rate was truly offered and truly served."""
    against = []
    response = loaded.response_ns
    if loaded.errors:
        failed = sum(loaded.errors.values())
        against.append(f"{failed} of {len(response)} calls failed: {listed(loaded.errors)}")
    if loaded.stopped:
        against.append(loaded.stopped)
    if loaded.interrupted:
        against.append("interrupted")
    answered = int((loaded.succeeded & (loaded.arrived_ns <= duration_s * 1e9)).sum())
    trend = stats.drift([float(np.median(response[turns == turn])) for turn in np.unique(turns)])
    saturated = answered < _KEEPS_UP * len(response) and trend.change > 0 and trend.matters
    if saturated:
        against.append(f"saturated: {answered} of {len(response)} requests were answered in time, and the wait grew")
    elif trend.matters:
        against.append(f"not steady: the median moved by {trend.change:+.0%} over the run")
    lag = float(np.quantile(loaded.lag_ns, 0.99, method="higher"))
    late = lag > max(_MAX_LAG_NS, _MAX_LAG_SHARE * float(np.quantile(response, 0.99, method="higher")))
    # Under a server that does not keep up all connections are taken: then requests leave late through no fault of ours.
    if late and not saturated:
        against.append(f"client-bound: 1% of the requests left {lag / 1e6:.1f} ms late or more")
    if not warmed_up:
        against.append("not steady: latency was still moving when the warm-up ended")
    return Verdict(steady=not against, reasons=(*against, *undersampled(response, turns)))


def _attempted(loaded: OpenLoaded) -> OpenLoaded:
    """Without what was never sent because of Ctrl-C; where the server was gone, that counts as failed."""
    if not loaded.interrupted:
        return loaded
    sent = np.flatnonzero(loaded.sent_ns >= 0)
    return loaded.between(0, int(loaded.due_ns[sent[-1]]) + 1)


def _throughput(whole: OpenLoaded, schedule: Schedule, batch: int) -> Interval:
    """Of all answers that came within the kept time, whenever they were asked for."""
    edges = np.linspace(schedule.lead_in_ns, schedule.end_ns, stats.STRETCHES + 1)
    counts, _ = np.histogram(whole.arrived_ns[whole.succeeded], bins=edges)
    return stats.rate_interval(counts * batch, np.diff(edges) / 1e9)
