"""A service measured over HTTP or gRPC: what is sent to it, whether it answers right, and its rows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlops.artifact import Artifact
from dlops.bench import pacing
from dlops.bench.analysis import analyse_closed_loop, listed, shortcomings
from dlops.bench.inprocess import accuracy_fields
from dlops.bench.load import TIMEOUT_S, Loaded, closed_loop
from dlops.bench.oip import Endpoint, encode_request
from dlops.bench.payload import artifact_feeds, check_fits, random_feed
from dlops.bench.scenarios import load_of
from dlops.bench.server_time import NoStatisticsError, Sent, Watch
from dlops.bench.stats import Integers
from dlops.bench.transport import Answer, Transport
from dlops.errors import GateError, MachineError, UsageError
from dlops.parity import compare, shortfalls
from dlops.report import EARLIER, SERVICE, STARTS, Measurement, Scenario
from dlops.signature import Feed
from dlops.tasks import open_task

_UNKNOWN = "unknown"
# Statuses that say that the request was wrong.
_OUR_MISTAKES = {
    *range(400, 500),
    *(pacing.GRPC + pacing.GRPC_STATUSES.index(name) for name in ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What is sent. artifact: the one that the service was found to serve, or None; notes: what to tell the reader.

    transport: the endpoint's, which counts answers as failed that are shorter or longer than the one that was checked.
    has_statistics: the server says where its time goes.
    """

    feeds: list[Feed]
    transport: Transport
    artifact: Artifact | None
    notes: tuple[str, ...]
    has_statistics: bool


def prepare(endpoint: Endpoint, artifact: Artifact | None, *, batch: int) -> Payload:
    """Choose what to send, and send one of it: the answer must be a whole one of the same batch.

    Raises UsageError where the service does not take it, MachineError where it does not answer.
    """
    notes = []
    if not endpoint.client.binary:
        notes.append(f"{endpoint.url}: tensors go and come as numbers in JSON: the server lists no binary_tensor_data")
    served = None
    if artifact is None:
        feeds: list[Feed] = [random_feed(endpoint.signature, batch)]
        transport = _checked(endpoint, feeds[0], batch)
        notes.append(f"{endpoint.url} was sent random numbers: no artifact's samples were given (--payload)")
    else:
        feeds = artifact_feeds(artifact, batch)
        check_fits(feeds, endpoint.signature, where=endpoint.url)
        transport = _checked(endpoint, feeds[0], batch)
        difference = _difference(endpoint, artifact)
        if difference is None:
            served = artifact
        else:
            how = f"does not answer as {artifact.title} does ({difference})"
            notes.append(f"{endpoint.url} {how}: its accuracy is not quoted here")
    missing = _missing_statistics(endpoint)
    if missing is not None:
        notes.append(f"{endpoint.url} does not say where its time goes: {missing}")
    return Payload(
        feeds=feeds, transport=transport, artifact=served, notes=tuple(notes), has_statistics=missing is None
    )


def measure_endpoint(
    endpoint: Endpoint, payload: Payload, *, batch: int, concurrency: int, duration_s: float, key: str,
    scenario: Scenario | None = None,
) -> tuple[Measurement, dict[str, Integers], Loaded]:  # fmt: skip
    """One row, its samples by name, and the run itself. scenario: as it was asked for by name.

    Raises MachineError, naming the errors, where no call succeeded.
    """
    watch = watch_server(endpoint, payload)
    watch.before()
    loaded = closed_loop(
        endpoint.host, endpoint.port, encoded(endpoint, payload), concurrency=concurrency, duration_s=duration_s,
        max_warmup_s=max(3.0, duration_s), transport=payload.transport, on_warm=watch.start,
    )  # fmt: skip
    if not len(loaded.latencies_ns):
        if loaded.interrupted:
            raise KeyboardInterrupt
        raise MachineError(
            f"{endpoint.url}: "
            + (f"after {loaded.warmup_calls:,} calls of the warm-up " if loaded.warmup_calls else "")
            + f"no call succeeded at {concurrency} in flight ({listed(loaded.errors)})",
            hint="the server's log says why",
        )
    accounted = watch.end(
        Sent(
            attempts=loaded.attempts, answered=loaded.answered, in_flight=concurrency,
            client_ns=float(loaded.latencies_ns.mean()),
        )
    )  # fmt: skip
    seen = shortcomings(
        errors=loaded.errors, calls=len(loaded.latencies_ns) + sum(loaded.errors.values()), stopped=loaded.stopped,
        interrupted=loaded.interrupted, warmed_up=loaded.warmed_up, warmup_calls=loaded.warmup_calls,
    )  # fmt: skip
    latencies, starts, service = _with_failures(loaded)
    figures = analyse_closed_loop(
        latencies, starts, loaded.earlier_ns, duration_ns=loaded.duration_ns, batch=batch, succeeded=service >= 0,
        observed=(*seen, *accounted.against), remarks=accounted.remarks,
    )  # fmt: skip
    row = Measurement(
        load=load_of(scenario, batch=batch, concurrency=concurrency),
        samples=key,
        duration_ns=loaded.duration_ns,
        server=accounted.server,
        errors=loaded.errors,
        warmup_calls=loaded.warmup_calls,
        **figures.as_fields(),
        **served_fields(endpoint, payload),
    )
    samples = {key: latencies, key + STARTS: starts, key + EARLIER: loaded.earlier_ns}
    if (service < 0).any():
        samples[key + SERVICE] = service
    return row, samples, loaded


def _with_failures(loaded: Loaded) -> tuple[Integers, Integers, Integers]:
    """Latencies and begins of all calls, by begin, those that failed with the worst latency; and the latencies of those
    that did not, -1 where one did: (n,) each."""
    answered, failed = loaded.latencies_ns, loaded.failed_ns
    starts = np.concatenate([loaded.starts_ns, failed])
    latencies = np.concatenate([answered, np.full(len(failed), loaded.worst_ns)])
    service = np.concatenate([answered, np.full(len(failed), -1)])
    order = np.argsort(starts, kind="stable")
    return latencies[order], starts[order], service[order]


def served_fields(endpoint: Endpoint, payload: Payload) -> dict[str, Any]:
    """What a row says of the service, whatever the load: a service tells neither its provider nor its device."""
    artifact = payload.artifact
    fields: dict[str, Any] = {
        "target": endpoint.url, "artifact": None, "runtime": endpoint.platform, "provider": _UNKNOWN,
        "device": _UNKNOWN, "precision": _UNKNOWN, "threads": None, "boundary": "network",
        "served_by": endpoint.server or None,
    }  # fmt: skip
    if artifact is None:
        return fields
    known = {"artifact": artifact.slug, "precision": artifact.variant.precision, "model_bytes": artifact.model_bytes}
    return fields | known | accuracy_fields(artifact)


def encoded(endpoint: Endpoint, payload: Payload) -> list[bytes]:
    """The whole requests, made before any is timed."""
    return [encode_request(endpoint, feed) for feed in payload.feeds]


def watch_server(endpoint: Endpoint, payload: Payload) -> Watch:
    return Watch(endpoint.client.statistics if payload.has_statistics else None)


def _ask(endpoint: Endpoint, feed: Feed) -> tuple[Answer, Feed]:
    """The answer to one request, and its outputs."""
    client = endpoint.client
    try:
        with closing(client.transport.dial(endpoint.host, endpoint.port, timeout_s=TIMEOUT_S)) as line:
            answer = line.ask(client.encode(feed))
    except (OSError, ValueError) as error:
        raise MachineError(f"{endpoint.url}: the first request failed: {error or type(error).__name__}") from None
    if answer.status != pacing.ANSWERED:
        text = answer.body[:300].decode("utf-8", "replace").strip()
        kind = UsageError if answer.status in _OUR_MISTAKES else MachineError
        name = pacing.outcome_name(answer.status).removeprefix("HTTP ")
        raise kind(f"{endpoint.url}: the first request was answered {name}: {text}")
    try:
        return answer, client.decode(answer)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{endpoint.url}: the first answer is not the Open Inference Protocol's ({error})") from None


def _missing_statistics(endpoint: Endpoint) -> str | None:
    """Why the server gives no statistics; None where it does."""
    try:
        endpoint.client.statistics()
    except NoStatisticsError as error:
        return str(error)
    return None


def _checked(endpoint: Endpoint, feed: Feed, batch: int) -> Transport:
    """What to send such feeds with, once the first was answered. Raises UsageError where that is no whole answer.

    Outputs whose size the metadata leaves open, and what is not binary, may be of any length.
    """
    answer, outputs = _ask(endpoint, feed)
    _check_answer(endpoint, outputs, batch)
    shapes = {
        spec.name: tuple(batch if dim == "batch" else dim for dim in spec.shape) for spec in endpoint.signature.outputs
    }
    fixed = shapes == {name: array.shape for name, array in outputs.items()}
    transport = endpoint.client.transport
    return transport.expecting(transport.tensor_bytes_of(answer) if fixed else 0)


def _check_answer(endpoint: Endpoint, outputs: Feed, batch: int) -> None:
    for spec in endpoint.signature.outputs:
        if spec.name not in outputs:
            raise UsageError(f"{endpoint.url}: output {spec.name!r} is missing from the answer")
        shape = outputs[spec.name].shape
        if spec.is_batched and shape[:1] != (batch,):
            answered = shape[0] if shape else "a single number"
            raise UsageError(f"{endpoint.url}: {batch} rows sent, {answered} answered")


def _difference(endpoint: Endpoint, artifact: Artifact) -> str | None:
    """How the answers to the artifact's samples differ from what they must be; None where they are right."""
    samples = artifact.samples()
    feed = samples.feed(artifact.preprocess, artifact.signature.inputs[0].name)
    rows = [_ask(endpoint, {name: array[i : i + 1] for name, array in feed.items()})[1] for i in range(len(samples))]
    if any(row.keys() != samples.outputs.keys() for row in rows):
        return "other outputs"
    try:
        outputs = {name: np.concatenate([row[name] for row in rows]) for name in samples.outputs}
    except ValueError:
        return "answers whose shapes differ from one another"
    try:
        errors = compare(
            samples.outputs,
            outputs,
            task=open_task(artifact.task),
            where=endpoint.url,
            min_iou=artifact.parity.tolerance.min_iou,
        )
    except GateError as error:
        return error.message
    return "; ".join(shortfalls(errors, artifact.parity.tolerance, sampled=True)) or None
