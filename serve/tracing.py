"""OpenTelemetry traces of a sample of the requests: a span each, and one for each part of its time.

They go where OTEL_EXPORTER_OTLP_ENDPOINT says, by OTLP over HTTP, in a thread of their own. A caller's `traceparent`
header makes the request a part of the caller's trace, and decides whether it is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

# BentoML brings all of these; what sends the traces anywhere it does not.
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dlops.errors import missing_package

# The parts of a request in the order in which they follow one another.
_IN_ORDER = ("receive", "decode", "queue", "copy", "compute", "encode")
PARENT = "traceparent"


class Tracer:
    """fraction: of the requests that no caller has decided about. Made in the process that answers them.

    Raises MachineError where the package that sends them is missing.
    """

    def __init__(self, fraction: float) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError:
            raise missing_package(
                "opentelemetry-exporter-otlp-proto-http", extra="tracing", needed_for="DLOPS_TRACE_SAMPLE"
            ) from None
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
        ours = Resource.create().merge(Resource({"service.name": "dlops"}))
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(fraction)), resource=ours.merge(OTELResourceDetector().detect())
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("dlops")
        self._parents = TraceContextTextMapPropagator()

    def answered(
        self, route: str, *, model: str, version: str, rows: int, batch_rows: int, times: Sequence[tuple[str, int]],
        parent: str | None, identity: str | None,
    ) -> None:  # fmt: skip
        """A request has been answered just now. times: part and ns, "total" among them."""
        parts = dict(times)
        ended_ns = time.time_ns()
        began_ns = ended_ns - parts["total"]
        span = self._begin(route, began_ns, parent, identity)
        if span.is_recording():
            span.set_attributes(
                {"dlops.model": model, "dlops.version": version, "dlops.rows": rows, "dlops.batch_rows": batch_rows}
            )
            inside = set_span_in_context(span)
            at_ns = began_ns
            for part in _IN_ORDER:
                self._tracer.start_span(part, context=inside, start_time=at_ns).end(at_ns + parts[part])
                at_ns += parts[part]
        span.end(ended_ns)

    def failed(self, route: str, *, status: str, ns: int, parent: str | None, identity: str | None) -> None:
        """A request has been refused or has failed just now."""
        ended_ns = time.time_ns()
        span = self._begin(route, ended_ns - ns, parent, identity)
        span.set_attribute("dlops.status", status)
        span.set_status(Status(StatusCode.ERROR, status))
        span.end(ended_ns)

    def close(self) -> None:
        """Send what is left. Blocks until then."""
        self._provider.shutdown()

    def _begin(self, route: str, began_ns: int, parent: str | None, identity: str | None) -> Span:
        context = None if parent is None else self._parents.extract({PARENT: parent})
        span = self._tracer.start_span(route, context=context, kind=SpanKind.SERVER, start_time=began_ns)
        if identity is not None:
            span.set_attribute("dlops.request_id", identity)
        return span
