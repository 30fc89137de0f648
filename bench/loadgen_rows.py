"""The rows of a run that LoadGen drives: "LoadGen, non-MLPerf workload"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dlops.artifact import Artifact
from dlops.bench.analysis import Figures, analyse_closed_loop, analyse_rate, listed, shortcomings
from dlops.bench.arrivals import Integers
from dlops.bench.child import Child
from dlops.bench.inprocess import Conditions, Started, placed_fields
from dlops.bench.inprocess_rates import process_of
from dlops.bench.load import TIMEOUT_S
from dlops.bench.loadgen import Driven, Said, Settings
from dlops.bench.loadgen_child import await_driven
from dlops.bench.loadgen_url import UrlJob
from dlops.bench.network import Payload, encoded, served_fields
from dlops.bench.oip import Endpoint
from dlops.bench.rates import Warm
from dlops.bench.scenarios import METRICS, load_of
from dlops.bench.sender import MAX_CONNECTIONS
from dlops.errors import MachineError
from dlops.report import EARLIER, SERVICE, STARTS, Measurement, Scenario
from dlops.timing import WarmUp

# One turn shows about how long a call takes, which LoadGen wants to know beforehand.
_TURN_S = 0.05

Row = tuple[Measurement, dict[str, Integers]]


def note(said: str) -> str:
    """What a reader must know of such rows. said: the package's version."""
    return (
        f"LoadGen, non-MLPerf workload: mlcommons-loadgen {said} made the queries of these rows and took their times; "
        "they are no MLPerf results"
    )


def measure_session(
    one: Started, conditions: Conditions, *, rate: float | None, duration_s: float, warmth: WarmUp,
    artifacts: Sequence[Artifact], key: str,
) -> tuple[Row, Said, bool]:  # fmt: skip
    """One row of a target in process, and whether Ctrl-C ended it. Raises MachineError where LoadGen got no answer, and
    KeyboardInterrupt where it got none before Ctrl-C."""
    assert conditions.scenario is not None
    process = process_of(one)
    expected_ns = float(np.median(process.take_turn(_TURN_S).latencies_ns))
    settings = Settings(
        scenario=conditions.scenario, duration_s=duration_s, batch=conditions.batch, rate=rate, expected_ns=expected_ns
    )
    driven, interrupted = await_driven(process, {"loadgen": settings.model_dump(mode="json")})
    fields = placed_fields(one, conditions, artifacts)
    row = _row(driven, settings, concurrency=1, interrupted=interrupted, warmth=warmth, key=key, fields=fields)
    return row, driven.said, interrupted


def measure_url(
    endpoint: Endpoint, payload: Payload, scenario: Scenario, *, batch: int, concurrency: int, rate: float | None,
    duration_s: float, warm: Warm, key: str,
) -> tuple[Row, Said, bool]:  # fmt: skip
    """One row of a service, which is loaded from a process of its own; see `measure_session`. concurrency: requests in
    flight, offline."""
    requests = encoded(endpoint, payload)
    # What one caller waits for; several in flight share a core, at worst.
    expected_ns = 1e9 / warm.rate / (concurrency if scenario == "offline" else 1)
    settings = Settings(scenario=scenario, duration_s=duration_s, batch=batch, rate=rate, expected_ns=expected_ns)
    job = UrlJob(
        url=endpoint.url,
        transport=payload.transport.name,
        tensor_bytes=payload.transport.tensor_bytes,
        host=endpoint.host,
        port=endpoint.port,
        connections=MAX_CONNECTIONS if scenario == "server" else concurrency,
        timeout_s=TIMEOUT_S,
        request_bytes=tuple(len(request) for request in requests),
        settings=settings,
    )
    who = f"{endpoint.url}: the process that ran LoadGen"
    with Child(who, "dlops.bench.loadgen_url", job.model_dump_json()) as child:
        driven, interrupted = await_driven(child, {}, b"".join(requests))
    warmth = WarmUp(calls=warm.calls, settled=warm.steady)
    fields = served_fields(endpoint, payload)
    row = _row(
        driven, settings, concurrency=concurrency, interrupted=interrupted, warmth=warmth, key=key, fields=fields
    )
    return row, driven.said, interrupted


def _row(
    driven: Driven, settings: Settings, *, concurrency: int, interrupted: bool, warmth: WarmUp, key: str,
    fields: dict[str, Any],
) -> Row:  # fmt: skip
    good = driven.succeeded == 1
    if not good.any():
        raise MachineError(f"{fields['target']}: no call succeeded ({listed(driven.said.errors)})")
    observed = shortcomings(
        warmed_up=warmth.settled,
        warmup_calls=warmth.calls,
        interrupted=interrupted,
        errors=driven.said.errors,
        calls=len(good),
    )
    remarks = (_in_words(driven.said, settings),)
    lag_p99_ns = None
    if settings.scenario == "server":
        duration_ns = int(driven.starts_ns[-1]) + 1
        lag_p99_ns = float(np.quantile(driven.lag_ns, 0.99, method="higher"))
        figures, samples = _at_rate(driven, good, duration_ns, lag_p99_ns, observed, remarks)
    else:
        starts, latencies = driven.starts_ns, np.where(good, driven.latencies_ns, _worst(driven, good))
        duration_ns = int((starts + latencies)[good].max())
        samples = {"": latencies, STARTS: starts, EARLIER: np.zeros(0, np.int64)}
        if not good.all():
            samples[SERVICE] = np.where(good, driven.latencies_ns, -1)
        figures = analyse_closed_loop(
            latencies, starts, samples[EARLIER], duration_ns=duration_ns, batch=settings.batch, succeeded=good,
            observed=observed, remarks=remarks,
        )  # fmt: skip
    row = Measurement(
        engine="loadgen",
        load=load_of(
            settings.scenario,
            batch=settings.batch,
            concurrency=concurrency,
            rate=settings.rate,
            arrivals="poisson" if settings.scenario == "server" else None,
        ),
        samples=key,
        duration_ns=duration_ns,
        lag_p99_ns=lag_p99_ns,
        errors=driven.said.errors,
        warmup_calls=warmth.calls,
        **figures.as_fields(),
        **fields,
    )
    return row, {key + suffix: array for suffix, array in samples.items()}


def _at_rate(
    driven: Driven, good: np.ndarray[Any, np.dtype[np.bool_]], duration_ns: int, lag_p99_ns: float,
    observed: Sequence[str], remarks: Sequence[str],
) -> tuple[Figures, dict[str, Integers]]:  # fmt: skip
    response = np.where(good, driven.latencies_ns, _worst(driven, good))
    service = np.where(good, driven.service_ns, -1)
    earlier = np.zeros(0, np.int64)
    figures = analyse_rate(
        response, driven.starts_ns, service, earlier, duration_ns=duration_ns, lag_p99_ns=lag_p99_ns, batch=1,
        observed=observed, remarks=remarks,
    )  # fmt: skip
    return figures, {"": response, STARTS: driven.starts_ns, SERVICE: service, EARLIER: earlier}


def _worst(driven: Driven, good: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """What a failed call counts as."""
    return max(round(TIMEOUT_S * 1e9), int(driven.latencies_ns[good].max()))


def _in_words(said: Said, settings: Settings) -> str:
    """`LoadGen itself: p90 0.21 ms, VALID`."""
    metric = METRICS[settings.scenario]
    if said.value is None:
        number = f"no {metric}"
    elif metric == "throughput":
        number = f"{said.value:,.0f} samples a second"
    else:
        number = f"{metric} {said.value / 1e6:.4g} ms"
    reasons = f" ({'; '.join(reason.rstrip('. ') for reason in said.reasons)})" if said.reasons else ""
    return f"LoadGen itself: {number}, {'VALID' if said.valid else 'INVALID'} by its rules{reasons}"
