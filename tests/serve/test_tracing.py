"""Traces as a collector gets them: a span a request, its parts within, in the caller's trace."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import tritonclient.grpc

from dlops.errors import MachineError
from dlops.serve import tracing
from dlops.serve.launch import ServerProcess

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="the exporter is in the tracing extra"
)
PNG = {"Content-Type": "image/png"}
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARTS = ["receive", "decode", "queue", "copy", "compute", "encode"]


class Collector:
    """An OTLP collector: `spans` are those that came so far."""

    def __init__(self) -> None:
        self.spans: list = []
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        request = trace_service.ExportTraceServiceRequest.FromString(body)
        for of_resource in request.resource_spans:
            names = {one.key: one.value.string_value for one in of_resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in of_resource.scope_spans:
                self.spans += scope.spans

    def of(self, trace: str) -> list:
        return [span for span in self.spans if span.trace_id.hex() == trace]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, int]]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            found.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found, server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_requests_are_parts_of_their_callers_traces(collector, digits_artifact, digit_pngs) -> None:
    found, port = collector
    env = {
        # Next to none, but for those whose caller says so.
        "DLOPS_TRACE_SAMPLE": "1e-9", "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_SERVICE_NAME": "digits-service",
    }  # fmt: skip
    x = digits_artifact.samples().inputs["image"][:3]
    size = {"binary_data_size": x.nbytes}
    head = {"inputs": [{"name": "image", "datatype": "FP32", "shape": list(x.shape), "parameters": size}]}
    text = json.dumps(head).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    with ServerProcess(digits_artifact, grpc_port=0, env=env) as server, httpx.Client(base_url=server.url) as client:

        def parent(span: str, sampled: bool = True) -> dict[str, str]:
            return {"traceparent": f"00-{TRACE}-{span}-0{int(sampled)}"}

        named = {"X-Request-Id": "one"}
        client.post("/predict", content=digit_pngs[0], headers=PNG | parent("00000000000000a1") | named)
        body = text + x.tobytes()
        client.post("/v2/models/digits/infer", content=body, headers=length | parent("00000000000000a2"))
        client.post("/v2/models/digits/infer", content=body, headers=length | parent("00000000000000a3", sampled=False))
        client.post("/v2/models/digits/infer", content=body, headers=length)
        client.post("/v2/models/digits/infer", content=b"{", headers=parent("00000000000000a4"))
        by_grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        tensor = tritonclient.grpc.InferInput("image", list(x.shape), "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(x))
        by_grpc.infer("digits", [tensor], headers=parent("00000000000000a5"))
        by_grpc.close()
        deadline = time.monotonic() + 20
        while len({span.parent_span_id for span in found.of(TRACE)} & callers()) < 4:
            assert time.monotonic() < deadline, found.spans
            time.sleep(0.05)
    spans = found.of(TRACE)
    assert spans == found.spans, "one that nobody sampled"
    assert found.services == {"digits-service"}
    roots = {span.parent_span_id.hex()[-2:]: span for span in spans if span.parent_span_id in callers()}
    names = {caller: span.name for caller, span in roots.items()}
    infer = "/v2/models/{name}/infer"
    assert names == {"a1": "/predict", "a2": infer, "a4": infer, "a5": "grpc ModelInfer"}
    for caller in ("a1", "a2", "a5"):
        root = roots[caller]
        parts = [span for span in spans if span.parent_span_id == root.span_id]
        assert [part.name for part in parts] == PARTS
        # One after the other, and all of them within.
        times = [root.start_time_unix_nano, *[part.end_time_unix_nano for part in parts]]
        assert times == sorted(times)
        assert parts[-1].end_time_unix_nano <= root.end_time_unix_nano
        told = {one.key: one.value for one in root.attributes}
        assert (told["dlops.model"].string_value, told["dlops.version"].string_value) == ("digits", "1")
        assert told["dlops.rows"].int_value == (1 if caller == "a1" else 3)
    assert {one.key: one.value.string_value for one in roots["a1"].attributes}["dlops.request_id"] == "one"
    wrong = roots["a4"]
    assert {one.key: one.value.string_value for one in wrong.attributes}["dlops.status"] == "400"
    assert not [span for span in spans if span.parent_span_id == wrong.span_id]


def callers() -> set[bytes]:
    return {bytes.fromhex(f"00000000000000a{number}") for number in (1, 2, 4, 5)}


def test_a_missing_exporter_is_one_clear_line(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(MachineError, match="needs opentelemetry-exporter-otlp-proto-http") as caught:
        tracing.Tracer(0.5)
    assert caught.value.hint == "pip install 'dlops[tracing]'"
