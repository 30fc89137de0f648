"""The Open Inference Protocol over gRPC, against a real server of a real artifact: healthy, failing, hanging, dying."""

# ruff: noqa: N802 - the servicer's methods are named by the protocol

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from dlops.artifact import Artifact
from dlops.bench import oip_grpc, pacing
from dlops.bench.arrivals import Offered, constant
from dlops.bench.grpc import GrpcTransport, raw_bytes
from dlops.bench.load import closed_loop
from dlops.bench.network import prepare
from dlops.bench.oip import encode_request, find_endpoint
from dlops.bench.openloop import open_loop
from dlops.bench.payload import artifact_feeds
from dlops.bench.run import measure
from dlops.bench.table import table_text
from dlops.bench.transport import Answer
from dlops.datatypes import DTYPES
from dlops.errors import MachineError, UsageError
from dlops.grpc_messages import CONTENTS

Status = grpc.StatusCode


class GrpcServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """behave may end a call itself, by returning the status to end it with. scale: of what it answers.

    typed: answers in typed contents instead of raw ones. counts: whether it has the statistics extension. known:
    whether that counts this model. reshape: of its answers, by their number.
    """

    def __init__(self, artifact: Artifact, *, typed: bool = False, counts: bool = True) -> None:
        self.artifact, self.typed, self.counts = artifact, typed, counts
        self.behave: Callable[[int], grpc.StatusCode | None] = lambda count: None
        self.known = True
        self.reshape: Callable[[int, np.ndarray], np.ndarray] = lambda count, logits: logits
        self.scale, self.ready, self.lists = np.float32(1), True, [artifact.name]
        self.requests = self.answered = self.failed = 0
        self._session = ort.InferenceSession(str(artifact.path("model")), providers=["CPUExecutionProvider"])
        self._input = artifact.signature.inputs[0].name
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=16))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.url = f"oip+grpc://127.0.0.1:{self.port}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()

    def ServerMetadata(self, request, context):
        return service_pb2.ServerMetadataResponse(name="toy-server", version="1")

    def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=self.ready)

    def RepositoryIndex(self, request, context):
        return service_pb2.RepositoryIndexResponse(models=[{"name": name} for name in self.lists])

    def ModelMetadata(self, request, context):
        if request.name != self.artifact.name:
            context.abort(Status.NOT_FOUND, "no such model")
        answer = service_pb2.ModelMetadataResponse(name=request.name, versions=["1"], platform="onnxruntime_onnx")
        for into, specs in (
            (answer.inputs, self.artifact.signature.inputs),
            (answer.outputs, self.artifact.signature.outputs),
        ):
            for spec in specs:
                into.add(name=spec.name, datatype="FP32", shape=[-1 if isinstance(d, str) else d for d in spec.shape])
        return answer

    def ModelStatistics(self, request, context):
        if not self.counts:
            context.abort(Status.UNIMPLEMENTED, "no statistics here")
        answer = service_pb2.ModelStatisticsResponse()
        if not self.known:
            return answer
        with self._lock:
            answered, failed = self.answered, self.failed
        model = answer.model_stats.add(name=request.name, inference_count=answered, execution_count=answered // 2)
        for part, ns in {
            "success": 500_000, "queue": 100_000, "compute_input": 1000, "compute_infer": 50_000, "compute_output": 2000
        }.items():  # fmt: skip
            one = getattr(model.inference_stats, part)
            one.count, one.ns = answered, ns * answered
        model.inference_stats.fail.count = failed
        return answer

    def ModelInfer(self, request, context):
        with self._lock:
            self.requests += 1
            count = self.requests
        status = self.behave(count)
        if status is not None:
            with self._lock:
                self.failed += 1
            context.abort(status, "as the test wants it")
        (entry,), (raw,) = request.inputs, request.raw_input_contents
        array = np.frombuffer(raw, np.float32).reshape(entry.shape)
        (logits,) = self._session.run(None, {self._input: array})
        logits = self.reshape(count, logits * self.scale)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        output = answer.outputs.add(name="logits", datatype="FP32", shape=logits.shape)
        if self.typed:
            output.contents.fp32_contents.extend(logits.ravel().tolist())
        else:
            answer.raw_output_contents.append(logits.tobytes())
        with self._lock:
            self.answered += 1
        return answer


@pytest.fixture
def serve_grpc() -> Iterator[Callable[..., GrpcServer]]:
    running: list[GrpcServer] = []

    def start(artifact: Artifact, **options: bool) -> GrpcServer:
        running.append(GrpcServer(artifact, **options))
        return running[-1]

    yield start
    for server in running:
        server.close()


def requests_for(server: GrpcServer) -> list[bytes]:
    endpoint = find_endpoint(server.url, model=server.artifact.name)
    return [encode_request(endpoint, feed) for feed in artifact_feeds(server.artifact, 1)]


def test_a_service_is_measured_checked_and_says_where_its_time_goes(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    offered = Offered(rates=(60.0,))
    measured = measure(
        [server.url], payload=digits_artifact, batch=(2,), concurrency=(1,), offered=offered, duration_s=0.3
    )
    assert measured.report.notes == ()
    flight, rate = measured.measurements
    for row in measured.measurements:
        assert (row.artifact, row.errors, row.runtime) == ("onnx-fp32", {}, "onnxruntime_onnx")
        assert row.server is not None
        # By its own constants, whatever this machine's clock says.
        assert (row.server.queue_ns, row.server.compute_infer_ns) == (100_000, 50_000)
        assert row.server.mean_batch == pytest.approx(2, rel=0.3)
        assert not any("other clients" in reason for reason in row.verdict.reasons), row.verdict.reasons
    # A call that begins in the run is counted in it; of the warm-up, only a few while the server was asked.
    assert flight.latency.samples <= flight.server.requests < server.answered
    assert flight.server.client_ns == flight.latency.mean_ns
    # The lead-in is in both means of a schedule.
    assert rate.server.requests > rate.latency.samples
    text = " ".join(table_text(measured.report).split())
    assert "over gRPC, batch 2" in text
    assert "queue 0.100, input 0.00100, model 0.0500, output 0.00200, network and framework" in text


def test_typed_answers_are_checked_against_the_artifacts_samples_too(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact, typed=True)
    endpoint = find_endpoint(server.url, model="digits")
    assert prepare(endpoint, digits_artifact, batch=2).artifact == digits_artifact
    server.scale = np.float32(1.5)
    assert prepare(endpoint, digits_artifact, batch=2).artifact is None


def test_another_model_is_not_credited_with_the_artifacts_accuracy(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact, counts=False)
    server.scale = np.float32(1.5)
    measured = measure([server.url], payload=digits_artifact, duration_s=0.3)
    (row,) = measured.measurements
    wrong, silent = measured.report.notes
    assert (row.artifact, row.server) == (None, None)
    assert "does not answer as digits/onnx-fp32 does" in wrong
    assert "does not say where its time goes: ModelStatistics answered UNIMPLEMENTED: no statistics here" in silent
    assert not any("server times" in reason for reason in row.verdict.reasons)


def test_another_clients_requests_are_noticed(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests, over = requests_for(server), threading.Event()

    def other() -> None:
        # Without pause it would be the measuring itself that waits: the server is of this process.
        while not over.wait(0.005):
            GrpcTransport().dial("127.0.0.1", server.port, timeout_s=10).ask(requests[0])

    thread = threading.Thread(target=other)
    thread.start()
    try:
        measured = measure([server.url], payload=digits_artifact, duration_s=0.3)
    finally:
        over.set()
        thread.join()
    (row,) = measured.measurements
    assert not row.verdict.steady
    assert any(reason.startswith("other clients used the server") for reason in row.verdict.reasons), row
    assert row.server is not None


def test_errors_are_counted_by_status(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests = requests_for(server)
    server.behave = lambda count: {0: Status.RESOURCE_EXHAUSTED, 5: Status.UNAVAILABLE}.get(count % 10)
    loaded = open_loop(
        "127.0.0.1", server.port, requests, constant(100, duration_s=1), transport=GrpcTransport(), timeout_s=5.0
    )
    assert loaded.errors == {"gRPC RESOURCE_EXHAUSTED": 10, "gRPC UNAVAILABLE": 10}
    assert server.requests == 100
    assert (loaded.response_ns >= 5e9).sum() == 20
    assert np.all(loaded.sent_ns >= loaded.due_ns)
    assert np.all(loaded.arrived_ns[loaded.succeeded] > loaded.sent_ns[loaded.succeeded])


@pytest.mark.usefixtures("soon_given_up")
def test_a_flood_of_unavailable_is_one_clear_error(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    server.behave = lambda count: Status.UNAVAILABLE if count > 20 else None
    with pytest.raises(MachineError, match=r"no call succeeded at 2 in flight \(gRPC UNAVAILABLE ×\d+\)"):
        measure([server.url], payload=digits_artifact, concurrency=(2,), duration_s=0.3)


def test_a_call_that_hangs_meets_its_deadline_and_the_rest_goes_on(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests, over = requests_for(server), threading.Event()
    server.behave = lambda count: over.wait(30) and None if count == 3 else None
    due = constant(20, duration_s=1)
    loaded = open_loop("127.0.0.1", server.port, requests, due, transport=GrpcTransport(), timeout_s=2.5)
    over.set()
    assert loaded.errors == {"gRPC DEADLINE_EXCEEDED": 1}
    assert loaded.succeeded.sum() == 19


@pytest.mark.usefixtures("soon_given_up")
def test_a_server_that_dies_under_calls_in_flight_is_noticed(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests = requests_for(server)
    dying = threading.Thread(target=server.close)
    server.behave = lambda count: dying.start() if count == 300 else None
    loaded = closed_loop(
        "127.0.0.1", server.port, requests, concurrency=2, duration_s=60, max_warmup_s=0.0, transport=GrpcTransport()
    )
    dying.join()
    assert loaded.stopped is not None
    assert "the server is gone" in loaded.stopped
    assert len(loaded.latencies_ns) > 200
    assert "connection refused" in loaded.errors


def test_a_server_that_dies_under_a_rate_is_noticed(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests = requests_for(server)
    dying = threading.Thread(target=server.close)
    server.behave = lambda count: dying.start() if count == 30 else None
    due = constant(50, duration_s=60)
    loaded = open_loop("127.0.0.1", server.port, requests, due, transport=GrpcTransport())
    dying.join()
    assert loaded.stopped is not None
    assert loaded.succeeded.sum() > 10
    assert {"connection refused", "not sent: the server was gone"} <= set(loaded.errors)


def test_a_server_that_dies_as_a_rate_ends_is_noticed(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests = requests_for(server)
    dying = threading.Thread(target=server.close)
    server.behave = lambda count: dying.start() if count == 60 else None
    loaded = open_loop("127.0.0.1", server.port, requests, constant(50, duration_s=1.8), transport=GrpcTransport())
    dying.join()
    assert loaded.stopped is None
    assert loaded.ends_without_server
    assert "connection refused" in loaded.errors


def test_a_server_that_says_unavailable_is_there(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests = requests_for(server)
    server.behave = lambda count: Status.UNAVAILABLE if count > 60 else None
    loaded = open_loop("127.0.0.1", server.port, requests, constant(50, duration_s=1.8), transport=GrpcTransport())
    assert set(loaded.errors) == {"gRPC UNAVAILABLE"}
    assert not loaded.ends_without_server


def test_a_slow_server_is_offered_the_rate_all_the_same(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    requests = requests_for(server)
    server.behave = lambda count: time.sleep(0.3)
    loaded = open_loop("127.0.0.1", server.port, requests, constant(30, duration_s=1), transport=GrpcTransport())
    # A closed loop of one would have sent 4.
    assert (server.requests, loaded.errors) == (30, {})
    assert np.median(loaded.response_ns) >= 0.3e9


def test_nobody_there_is_said_by_both_loops_and_before_them(free_port: int) -> None:
    with pytest.raises(MachineError, match=r"no answer over gRPC \(UNAVAILABLE"):
        find_endpoint(f"oip+grpc://127.0.0.1:{free_port}", model="m")
    due = constant(10, duration_s=0.5)
    assert open_loop("127.0.0.1", free_port, [b""], due, transport=GrpcTransport()).errors == {"connection refused": 5}


def test_a_name_comes_from_the_url_the_payload_or_the_servers_list(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    assert find_endpoint(f"{server.url}/digits", model="other").model == "digits"
    assert find_endpoint(server.url, model=None).model == "digits"
    with pytest.raises(UsageError, match="ModelMetadata answered NOT_FOUND: no such model"):
        find_endpoint(server.url, model="other")
    server.lists = ["a", "b"]
    with pytest.raises(UsageError, match=r"it lists a, b .*--payload ARTIFACT, or oip\+grpc://.*/NAME"):
        find_endpoint(server.url, model=None)
    server.ready = False
    with pytest.raises(MachineError, match="model 'digits' is not ready"):
        find_endpoint(server.url, model="digits")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("oip+grpc://127.0.0.1", "has no port"),
        ("oip+grpc://127.0.0.1:99999/m", "the port is no number"),
        ("oip+grpc://:8001", "is no http://HOST:PORT, oip"),
        ("oip+grpc://h:1/v2/models/m", "unknown path /v2/models/m"),
        ("oip+http://h:1/m", "unknown path /m"),
        ("oip+http://me:secret@h:1/v2/models/m", "a target at h has a user"),
        ("oip+http://h:1/v2/models/m?token=secret", "a target at h has a user"),
        ("oip+http://h:0/v2/models/m", "the port is no number from 1"),
        ("oip+http://h:1/v2/models/", "unknown path /v2/models/"),
        ("grpc://h:1", "is no http://HOST:PORT, oip"),
        ("https://h:1", "is no http://HOST:PORT, oip"),
    ],
)
def test_a_url_that_is_none_is_one_clear_line(url: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_endpoint(url, model="m")
    assert said in caught.value.message


def test_a_rest_server_at_the_grpc_url_is_said(make_artifact, serve) -> None:
    server = serve(make_artifact())
    with pytest.raises(MachineError, match=r"no answer over gRPC .*is this its gRPC port"):
        find_endpoint(f"oip+grpc://127.0.0.1:{server.port}", model="toy")


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (b"\xff\xff", "."),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}], "raw_output_contents": [b"123"]}, "3 bytes"),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}], "raw_output_contents": [b"", b""]}, "2 raw"),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "contents": {"fp32_contents": [1]}}]}, "reshape"),
    ],
)
def test_an_answer_that_is_not_whole_is_refused(response, said: str) -> None:
    body = response if isinstance(response, bytes) else service_pb2.ModelInferResponse(**response).SerializeToString()
    with pytest.raises(ValueError, match=said):
        oip_grpc.decode_outputs(body)


@pytest.mark.parametrize("datatype", sorted(CONTENTS))
def test_typed_numbers_are_read_as_raw_ones_are(datatype: str) -> None:
    field = CONTENTS[datatype]
    array = np.array([[0, 1], [1, 0]], DTYPES[datatype])
    entry = {"name": "y", "datatype": datatype, "shape": array.shape}
    typed = service_pb2.ModelInferResponse(outputs=[entry | {"contents": {field: array.ravel().tolist()}}])
    raw = service_pb2.ModelInferResponse(outputs=[entry], raw_output_contents=[array.tobytes()])
    for response in (typed, raw):
        answer = Answer(status=pacing.ANSWERED, headers={}, body=response.SerializeToString(), arrived_ns=0)
        outputs = oip_grpc.decode_outputs(answer.body)["y"]
        np.testing.assert_array_equal(outputs, array)
        assert outputs.dtype == array.dtype


@pytest.mark.parametrize(
    ("module", "package"),
    [("grpc", "grpcio"), ("tritonclient.grpc", "tritonclient"), ("google.protobuf.message", "protobuf")],
)
def test_a_missing_package_is_one_clear_line(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for importer in ("dlops.bench.oip_grpc", "dlops.bench.grpc", "dlops.grpc_messages"):
        monkeypatch.delitem(sys.modules, importer)
    with pytest.raises(MachineError, match=f"gRPC needs {package}, which is not") as caught:
        find_endpoint("oip+grpc://127.0.0.1:1/m", model=None)
    assert caught.value.hint == "pip install 'dlops[triton]'"


def test_statuses_are_numbered_as_grpc_numbers_them() -> None:
    assert {code.name: code.value[0] for code in grpc.StatusCode} == {
        name: number for number, name in enumerate(pacing.GRPC_STATUSES)
    }


def test_a_server_that_counts_no_such_model_is_measured_without_its_times(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    server.known = False
    notes = prepare(find_endpoint(server.url, model=None), digits_artifact, batch=1).notes
    assert notes == (
        f"{server.url} does not say where its time goes: ModelStatistics answered no statistics (model_stats is empty)",
    )


def test_answers_of_a_shape_that_makes_no_sense_are_named(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    server.reshape = lambda count, logits: logits[0, 0] if count == 1 else logits
    endpoint = find_endpoint(server.url, model=None)
    with pytest.raises(UsageError, match="1 rows sent, a single number answered"):
        prepare(endpoint, digits_artifact, batch=1)
    # Among the samples that its answers are checked with.
    server.reshape = lambda count, logits: logits[:, :3] if count % 3 == 0 else logits
    (note,) = prepare(endpoint, digits_artifact, batch=1).notes
    assert "answers whose shapes differ from one another" in note


def test_a_version_in_the_url_is_in_every_request(digits_artifact, serve_grpc) -> None:
    server = serve_grpc(digits_artifact)
    endpoint = find_endpoint(f"{server.url}/{digits_artifact.name}/versions/7", model=None)
    request = service_pb2.ModelInferRequest.FromString(encode_request(endpoint, digits_artifact.samples().inputs))
    assert (endpoint.version, endpoint.server, request.model_version) == ("7", "toy-server 1", "7")


@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
@pytest.mark.parametrize("part", ["closed", "open", "blocking"])
def test_a_success_without_its_tensors_is_a_failed_call(digits_artifact, serve_grpc, typed: bool, part: str) -> None:
    server = serve_grpc(digits_artifact, typed=typed)
    endpoint = find_endpoint(server.url, model=None)
    transport = prepare(endpoint, digits_artifact, batch=1).transport
    request = requests_for(server)[0]
    # One logit of the ten is missing.
    server.reshape = lambda count, logits: logits[:, :9] if count % 4 == 0 else logits
    place = ("127.0.0.1", server.port)
    if part == "closed":
        load = closed_loop(*place, [request], concurrency=2, duration_s=0.5, max_warmup_s=0.0, transport=transport)
        errors = load.errors
    elif part == "open":
        errors = open_loop(*place, [request], constant(40, duration_s=0.5), transport=transport).errors
    else:
        line = transport.dial(*place, timeout_s=10)
        statuses = [line.ask(request).status for _ in range(8)]
        line.close()
        errors = {"another answer than the first": statuses.count(pacing.OTHER)} if pacing.OTHER in statuses else {}
    # Numbers in typed contents are not counted.
    assert list(errors) == ([] if typed else ["another answer than the first"])


def test_raw_bytes_are_counted_by_the_lengths_of_fields() -> None:
    answer = service_pb2.ModelInferResponse(model_name="digits", id="x" * 200)
    answer.parameters["pace"].int64_param = 300
    answer.outputs.add(name="logits", datatype="FP32", shape=[1, 10]).contents.fp32_contents.extend([0.5] * 10)
    assert raw_bytes(answer.SerializeToString()) == 0
    answer.raw_output_contents.extend([b"", b"x" * 40, b"y" * 100_000])
    message = answer.SerializeToString()
    assert raw_bytes(message) == 100_040
    # Fields of a later version of the protocol: a number, eight bytes, four bytes.
    assert raw_bytes(message + b"\x78\x96\x01" + b"\x79" + bytes(8) + b"\x7d" + bytes(4)) == 100_040
    for damaged in (message[:-1], message + b"\x32", message + b"\x32\x80", message + b"\x7b", message + b"\x79\x00"):
        assert raw_bytes(damaged) == -1
