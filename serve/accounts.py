"""What is kept of each request: counts and times, a line in the log, a span of a trace."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from dlops.serve.answers import Times
from dlops.serve.guard import request_id
from dlops.serve.log import Log
from dlops.serve.metrics import Metrics
from dlops.serve.outcome import Answer
from dlops.serve.tracing import Tracer

if TYPE_CHECKING:
    from dlops.serve.model import ServedModel


class Caller(NamedTuple):
    """What a request says of itself: its X-Request-Id, and its traceparent."""

    identity: str | None = None
    parent: str | None = None


class Accounts:
    """Of one worker. `tracer` is None where nothing is traced."""

    def __init__(self, metrics: Metrics, log: Log) -> None:
        self._metrics = metrics
        self._log = log
        self.tracer: Tracer | None = None

    def count(
        self, route: str, method: str, status: int | str, model: ServedModel | None, started_ns: int, *, failed: bool,
        caller: Caller,
    ) -> None:  # fmt: skip
        """An answer has been made. model: that was to infer; None where none was asked, or one that is not there."""
        if failed and model is not None:
            model.statistics.add_failure(time.perf_counter_ns() - started_ns)
        name = "" if model is None else model.name
        self._metrics.requests.add(name, route, method, str(status))
        if not (self._log.access or (self.tracer is not None and failed)):
            return
        identity, ns = request_id(caller.identity), time.perf_counter_ns() - started_ns
        if self._log.access:
            self._log.answered(
                route=route, method=method, status=str(status), model=name, identity=identity, ms=ns / 1e6
            )
        if self.tracer is not None and failed:
            self.tracer.failed(route, status=str(status), ns=ns, parent=caller.parent, identity=identity)

    def answered(
        self, model: ServedModel, route: str, started_ns: int, answer: Answer, *, rows: int, received_ns: int,
        decode_ns: int, caller: Caller,
    ) -> Times:  # fmt: skip
        """An inference has been answered with a result: count its time and its parts, and return them.

        received_ns: when its body had come whole.
        """
        total_ns, receive_ns = time.perf_counter_ns() - started_ns, received_ns - started_ns
        # Triton's clock starts once a request is there, whatever its client's line is like.
        model.statistics.add_success(
            rows=rows, total_ns=total_ns - receive_ns, queue_ns=answer.queue_ns, compute_ns=answer.compute_ns,
            input_ns=decode_ns + answer.copy_ns,
        )  # fmt: skip
        encode_ns = max(0, total_ns - receive_ns - decode_ns - answer.queue_ns - answer.copy_ns - answer.compute_ns)
        times = (
            ("total", total_ns), ("receive", receive_ns), ("decode", decode_ns), ("queue", answer.queue_ns),
            ("copy", answer.copy_ns), ("compute", answer.compute_ns), ("encode", encode_ns),
        )  # fmt: skip
        for part, ns in times:
            self._metrics.seconds.observe(model.name, route, part, value=ns)
        if self.tracer is not None:
            self.tracer.answered(
                route, model=model.name, version=model.version, rows=rows, batch_rows=answer.batch_rows, times=times,
                parent=caller.parent, identity=request_id(caller.identity),
            )  # fmt: skip
        return times
