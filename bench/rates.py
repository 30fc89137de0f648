"""A service under a rate of requests: its warm-up and its rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlops.bench import pacing
from dlops.bench.analysis import analyse_rate, listed, shortcomings
from dlops.bench.arrivals import Integers, Schedule
from dlops.bench.load import closed_loop
from dlops.bench.network import Payload, encoded, served_fields, watch_server
from dlops.bench.oip import Endpoint
from dlops.bench.openloop import OpenLoaded, open_loop
from dlops.bench.scenarios import load_of
from dlops.bench.server_time import Sent
from dlops.errors import MachineError
from dlops.report import EARLIER, SERVICE, STARTS, Measurement, Scenario


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
        transport=payload.transport,
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
    scenario: Scenario | None = None,
) -> tuple[Measurement, dict[str, Integers], OpenLoaded]:
    """One row, its samples by name, and the run itself. Raises MachineError where no request succeeded.

    scenario: as it was asked for by name.
    """
    requests = encoded(endpoint, payload)
    watch = watch_server(endpoint, payload)
    watch.before()
    whole = open_loop(
        endpoint.host, endpoint.port, requests, schedule.due_ns, senders=senders, title=title,
        transport=payload.transport,
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
    service = np.where(loaded.succeeded, loaded.arrived_ns - loaded.sent_ns, -1)
    lag_p99_ns = float(np.quantile(loaded.lag_ns, 0.99, method="higher"))
    lead_in = whole.succeeded & (whole.due_ns < schedule.lead_in_ns)
    earlier = whole.arrived_ns[lead_in] - schedule.lead_in_ns
    earlier = earlier[earlier >= 0]
    duration_ns = schedule.end_ns - schedule.lead_in_ns
    if loaded.interrupted:
        duration_ns = min(duration_ns, int(loaded.due_ns[-1]) + 1)
    seen = shortcomings(
        errors=loaded.errors, calls=len(service), interrupted=loaded.interrupted, warmed_up=warm.steady,
        stopped=loaded.stopped or (pacing.GONE_AT_END if loaded.ends_without_server else None),
    )  # fmt: skip
    figures = analyse_rate(
        loaded.response_ns, loaded.due_ns, service, earlier, duration_ns=duration_ns, lag_p99_ns=lag_p99_ns,
        batch=batch,
        observed=(*seen, *accounted.against), remarks=accounted.remarks,
    )  # fmt: skip
    row = Measurement(
        load=load_of(scenario, batch=batch, **schedule.as_load),
        samples=key,
        duration_ns=duration_ns,
        server=accounted.server,
        lag_p99_ns=lag_p99_ns,
        errors=loaded.errors,
        warmup_calls=warm.calls + int((whole.due_ns < schedule.lead_in_ns).sum()),
        **figures.as_fields(),
        **served_fields(endpoint, payload),
    )
    samples = {
        key: loaded.response_ns, key + STARTS: loaded.due_ns, key + SERVICE: service, key + EARLIER: earlier
    }  # fmt: skip
    return row, samples, loaded


def _attempted(loaded: OpenLoaded) -> OpenLoaded:
    """Without what was never sent because of Ctrl-C; where the server was gone, that counts as failed."""
    if not loaded.interrupted:
        return loaded
    sent = np.flatnonzero(loaded.sent_ns >= 0)
    return loaded.between(0, int(loaded.due_ns[sent[-1]]) + 1)
