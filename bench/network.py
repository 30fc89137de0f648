"""A service measured over HTTP: what is sent to it, whether it answers right, and its rows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlops.artifact import Artifact
from dlops.bench.analysis import analyse_closed_loop, listed, shortcomings
from dlops.bench.http import Answer, Connection
from dlops.bench.inprocess import accuracy_fields
from dlops.bench.load import TIMEOUT_S, Loaded, closed_loop
from dlops.bench.oip import Endpoint, decode_outputs, encode_request
from dlops.bench.payload import artifact_feeds, check_fits, random_feed
from dlops.bench.stats import Integers
from dlops.errors import GateError, MachineError, UsageError
from dlops.parity import compare, shortfalls
from dlops.report import EARLIER, STARTS, Load, Measurement
from dlops.signature import Feed
from dlops.tasks import open_task

_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What is sent. artifact: the one that the service was found to serve, or None; note: what to tell the reader."""

    feeds: list[Feed]
    artifact: Artifact | None
    note: str | None


def prepare(endpoint: Endpoint, artifact: Artifact | None, *, batch: int) -> Payload:
    """Choose what to send, and send one of it: the answer must be a whole one of the same batch.

    Raises UsageError where the service does not take it, MachineError where it does not answer.
    """
    if artifact is None:
        feeds: list[Feed] = [random_feed(endpoint.signature, batch)]
        _check_answer(endpoint, _ask(endpoint, feeds[0]), batch)
        note = f"{endpoint.url} was sent random numbers: no artifact's samples were given (--payload)"
        return Payload(feeds=feeds, artifact=None, note=note)
    feeds = artifact_feeds(artifact, batch)
    check_fits(feeds, endpoint.signature, where=endpoint.url)
    _check_answer(endpoint, _ask(endpoint, feeds[0]), batch)
    difference = _difference(endpoint, artifact)
    if difference is None:
        return Payload(feeds=feeds, artifact=artifact, note=None)
    note = f"{endpoint.url} does not answer as {artifact.title} does ({difference}): its accuracy is not quoted here"
    return Payload(feeds=feeds, artifact=None, note=note)


def measure_endpoint(
    endpoint: Endpoint, payload: Payload, *, batch: int, concurrency: int, duration_s: float, key: str
) -> tuple[Measurement, dict[str, Integers], Loaded]:
    """One row, its samples by name, and the run itself.

    Raises MachineError, naming the errors, where no call succeeded.
    """
    loaded = closed_loop(
        endpoint.host, endpoint.port, encoded(endpoint, payload), concurrency=concurrency, duration_s=duration_s,
        max_warmup_s=max(3.0, duration_s),
    )  # fmt: skip
    if not len(loaded.latencies_ns):
        if loaded.interrupted:
            raise KeyboardInterrupt
        raise MachineError(
            f"{endpoint.url}: no call succeeded at {concurrency} in flight ({listed(loaded.errors)})",
            hint="the server's log says why",
        )
    figures = analyse_closed_loop(
        loaded.latencies_ns, loaded.starts_ns, loaded.earlier_ns, duration_ns=loaded.duration_ns, batch=batch,
        observed=shortcomings(
            errors=loaded.errors, calls=len(loaded.latencies_ns) + sum(loaded.errors.values()), stopped=loaded.stopped,
            interrupted=loaded.interrupted, warmed_up=loaded.warmed_up, warmup_calls=loaded.warmup_calls,
        ),
    )  # fmt: skip
    row = Measurement(
        load=Load(
            scenario="single_stream" if concurrency == 1 else "multi_stream", batch=batch, concurrency=concurrency
        ),
        samples=key,
        duration_ns=loaded.duration_ns,
        errors=loaded.errors,
        warmup_calls=loaded.warmup_calls,
        **figures.as_fields(),
        **served_fields(endpoint, payload),
    )
    samples = {key: loaded.latencies_ns, key + STARTS: loaded.starts_ns, key + EARLIER: loaded.earlier_ns}
    return row, samples, loaded


def served_fields(endpoint: Endpoint, payload: Payload) -> dict[str, Any]:
    """What a row says of the service, whatever the load: a service tells neither its provider nor its device."""
    artifact = payload.artifact
    fields: dict[str, Any] = {
        "target": endpoint.url, "artifact": None, "runtime": endpoint.platform, "provider": _UNKNOWN,
        "device": _UNKNOWN, "precision": _UNKNOWN, "threads": None, "boundary": "network",
    }  # fmt: skip
    if artifact is None:
        return fields
    known = {"artifact": artifact.slug, "precision": artifact.variant.precision, "model_bytes": artifact.model_bytes}
    return fields | known | accuracy_fields(artifact)


def encoded(endpoint: Endpoint, payload: Payload) -> list[bytes]:
    """The whole requests, made before any is timed."""
    return [encode_request(endpoint, feed) for feed in payload.feeds]


def _ask(endpoint: Endpoint, feed: Feed) -> Feed:
    """The decoded answer to one request."""
    try:
        answer = asyncio.run(_send_once(endpoint, encode_request(endpoint, feed)))
    except (OSError, ValueError) as error:
        raise MachineError(f"{endpoint.url}: the first request failed: {error or type(error).__name__}") from None
    if answer.status != 200:
        text = answer.body[:300].decode("utf-8", "replace").strip()
        kind = UsageError if 400 <= answer.status < 500 else MachineError
        raise kind(f"{endpoint.url}: the first request was answered {answer.status}: {text}")
    length = answer.headers.get("inference-header-content-length")
    try:
        return decode_outputs(answer.body, None if length is None else int(length))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{endpoint.url}: the first answer is not the Open Inference Protocol's ({error})") from None


async def _send_once(endpoint: Endpoint, request: bytes) -> Answer:
    connection = await Connection.open(endpoint.host, endpoint.port)
    try:
        return await connection.send(request, timeout_s=TIMEOUT_S)
    finally:
        connection.close()


def _check_answer(endpoint: Endpoint, outputs: Feed, batch: int) -> None:
    for spec in endpoint.signature.outputs:
        if spec.name not in outputs:
            raise UsageError(f"{endpoint.url}: output {spec.name!r} is missing from the answer")
        if spec.is_batched and len(outputs[spec.name]) != batch:
            raise UsageError(f"{endpoint.url}: {batch} rows sent, {len(outputs[spec.name])} answered")


def _difference(endpoint: Endpoint, artifact: Artifact) -> str | None:
    """How the answers to the artifact's samples differ from what they must be; None where they are right."""
    samples = artifact.samples()
    feed = samples.feed(artifact.preprocess, artifact.signature.inputs[0].name)
    rows = [_ask(endpoint, {name: array[i : i + 1] for name, array in feed.items()}) for i in range(len(samples))]
    if {name for row in rows for name in row} != set(samples.outputs):
        return "other outputs"
    outputs = {name: np.concatenate([row[name] for row in rows]) for name in samples.outputs}
    try:
        errors = compare(samples.outputs, outputs, task=open_task(artifact.task), where=endpoint.url)
    except GateError as error:
        return error.message
    return "; ".join(shortfalls(errors, artifact.parity.tolerance, sampled=True)) or None
