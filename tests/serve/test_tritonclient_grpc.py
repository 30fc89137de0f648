"""Unmodified tritonclient over gRPC against our server, and what other clients of gRPC may send."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import numpy as np
import pytest

from dlops.errors import MachineError
from dlops.serve.launch import ServerProcess

triton_grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is in the triton extra")
import grpc  # noqa: E402
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

TOKEN = "a secret of thirty-two characters"


@pytest.fixture(scope="module")
def server(digits_artifact) -> Iterator[ServerProcess]:
    with ServerProcess(digits_artifact, grpc_port=0, env={"DLOPS_MAX_BODY_BYTES": "200000"}) as running:
        yield running


@pytest.fixture
def triton(server) -> Iterator[triton_grpc.InferenceServerClient]:
    client = triton_grpc.InferenceServerClient(url=f"127.0.0.1:{server.grpc_port}")
    yield client
    client.close()


@pytest.fixture
def stub(server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def x(digits_artifact) -> np.ndarray:
    return digits_artifact.samples().inputs["image"]


@pytest.fixture
def expected(digits_artifact) -> np.ndarray:
    return digits_artifact.samples().outputs["logits"]


def an_input(x: np.ndarray) -> triton_grpc.InferInput:
    tensor = triton_grpc.InferInput("image", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return tensor


def test_health_and_metadata_are_http_s(triton, server) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("digits")
    assert triton.is_model_ready("digits", "1")
    assert not triton.is_model_ready("other")
    http = httpx.get(f"{server.url}/v2").json()
    assert triton.get_server_metadata(as_json=True) == http
    metadata = triton.get_model_metadata("digits")
    assert [(output.name, output.datatype, list(output.shape)) for output in metadata.outputs] == [
        ("logits", "FP32", [-1, 10])
    ]
    config = triton.get_model_config("digits").config
    assert (config.max_batch_size, list(config.input[0].dims)) == (64, [1, 8, 8])
    assert config.version_policy.latest.num_versions == 1
    assert list(config.dynamic_batching.preferred_batch_size) == [32]


def test_both_doors_give_the_same_numbers_and_count_together(triton, server, x, expected) -> None:
    outputs = [triton_grpc.InferRequestedOutput("logits")]
    before = triton.get_inference_statistics("digits").model_stats[0].inference_count
    for asked in (None, outputs):
        result = triton.infer("digits", [an_input(x)], outputs=asked, request_id="r", model_version="1")
        np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-4, atol=1e-4)
        assert result.get_response().id == "r"
    after = triton.get_inference_statistics("digits").model_stats[0]
    assert after.inference_count - before == 2 * len(x)
    (http,) = httpx.get(f"{server.url}/v2/models/digits/stats").json()["model_stats"]
    assert http["inference_stats"]["success"]["count"] == after.inference_stats.success.count
    assert (
        'dlops_requests_total{method="gRPC",model="digits",route="grpc ModelInfer",status="OK"}'
        in httpx.get(f"{server.url}/metrics").text
    )


def test_typed_contents_are_read_as_raw_ones(stub, x, expected) -> None:
    request = service_pb2.ModelInferRequest(model_name="digits")
    tensor = request.inputs.add(name="image", datatype="FP32", shape=[1, 1, 8, 8])
    tensor.contents.fp32_contents.extend(x[0].ravel().tolist())
    response = stub.ModelInfer(request, timeout=30)
    found = np.frombuffer(response.raw_output_contents[0], np.float32)
    np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)


def test_many_at_once_get_their_own(triton, x, expected) -> None:
    def ask(n: int) -> None:
        one = n % len(x)
        result = triton.infer("digits", [an_input(x[one : one + 1])], request_id=str(n))
        assert result.get_response().id == str(n)
        np.testing.assert_allclose(result.as_numpy("logits")[0], expected[one], rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(200)))


def test_a_stream_answers_in_order_and_outlives_an_error(triton, x, expected) -> None:
    answers: queue.Queue = queue.Queue()

    def counts() -> tuple[int, int]:
        found = triton.get_inference_statistics("digits").model_stats[0].inference_stats
        return found.success.count, found.fail.count

    before = counts()
    triton.start_stream(callback=lambda result, error: answers.put((result, error)))
    for name, one in (("digits", 0), ("other", 1), ("digits", 2)):
        triton.async_stream_infer(name, [an_input(x[one : one + 1])], request_id=str(one))
    triton.async_stream_infer("digits", [an_input(x[:1, :, :4])])
    found = [answers.get(timeout=30) for _ in range(4)]
    triton.stop_stream()
    assert [error is None for _, error in found] == [True, False, True, False]
    assert "unknown model" in str(found[1][1])
    np.testing.assert_allclose(found[2][0].as_numpy("logits")[0], expected[2], rtol=1e-4, atol=1e-4)
    # The model that is not there has failed nobody.
    assert counts() == (before[0] + 2, before[1] + 1)


def an_infer(x: np.ndarray, **more) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="digits", **more)
    request.inputs.add(name="image", datatype="FP32", shape=x.shape)
    request.raw_input_contents.append(x.tobytes())
    return request


def changed(x: np.ndarray, kind: str) -> service_pb2.ModelInferRequest:
    request = an_infer(x)
    match kind:
        case "model":
            request.model_name = "other"
        case "version":
            request.model_version = "9"
        case "name":
            request.inputs[0].name = "picture"
        case "datatype":
            request.inputs[0].datatype = "FP64"
        case "shape":
            request.inputs[0].shape[:] = [1, 64]
        case "negative":
            request.inputs[0].shape[0] = -1
        case "bytes":
            request.raw_input_contents[0] = b"1234"
        case "raw":
            request.raw_input_contents.append(b"")
        case "both":
            request.inputs[0].contents.fp32_contents.append(1)
        case "nothing":
            del request.inputs[:]
            del request.raw_input_contents[:]
        case "output":
            request.outputs.add(name="labels")
        case "classes":
            request.outputs.add(name="logits").parameters["classification"].int64_param = -3
        case "region":
            request.inputs[0].parameters["shared_memory_region"].string_param = "a"
        case "timeout":
            request.parameters["timeout"].int64_param = 1
        case "negative timeout":
            request.parameters["timeout"].int64_param = -1
        case "timeout in words":
            request.parameters["timeout"].string_param = "soon"
    return request


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("model", "NOT_FOUND", "unknown model 'other'"), ("version", "NOT_FOUND", "version '9'"),
        ("name", "INVALID_ARGUMENT", "unknown input 'picture'"), ("datatype", "INVALID_ARGUMENT", "expected FP32"),
        ("shape", "INVALID_ARGUMENT", "expected [batch, 1, 8, 8]"), ("negative", "INVALID_ARGUMENT", "batch is -1"),
        ("bytes", "INVALID_ARGUMENT", "4 bytes"), ("raw", "INVALID_ARGUMENT", "2 raw tensors for 1 inputs"),
        ("both", "INVALID_ARGUMENT", "both raw and typed"), ("nothing", "INVALID_ARGUMENT", "missing"),
        ("output", "INVALID_ARGUMENT", "unknown output 'labels'"),
        ("classes", "INVALID_ARGUMENT", "classification"), ("region", "UNIMPLEMENTED", "shared memory"),
        ("timeout", "DEADLINE_EXCEEDED", "deadline"),
        ("negative timeout", "INVALID_ARGUMENT", "whole number of microseconds"),
        ("timeout in words", "INVALID_ARGUMENT", "whole number of microseconds"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_grpc_s_own_status(stub, x, kind: str, code: str, said: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(changed(x[:1], kind), timeout=30)
    assert caught.value.code().name == code
    assert said in caught.value.details()
    assert len(stub.ModelInfer(an_infer(x[:1]), timeout=30).raw_output_contents) == 1


def test_a_message_over_the_limit_is_refused_and_the_next_works(stub, x) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(an_infer(np.zeros((800, 1, 8, 8), np.float32)), timeout=30)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(stub.ModelInfer(an_infer(x[:1]), timeout=30).raw_output_contents) == 1


@pytest.mark.parametrize("call", ["get_system_shared_memory_status", "get_trace_settings", "get_log_settings"])
def test_what_is_not_supported_is_unimplemented(triton, call: str) -> None:
    with pytest.raises(InferenceServerException, match="not supported") as caught:
        getattr(triton, call)()
    assert "UNIMPLEMENTED" in str(caught.value.status())


def test_a_token_guards_all_but_health(digits_artifact, x) -> None:
    with (
        ServerProcess(digits_artifact, grpc_port=0, workers=2, env={"DLOPS_TOKEN": TOKEN}) as server,
        triton_grpc.InferenceServerClient(url=f"127.0.0.1:{server.grpc_port}") as client,
    ):
        # Two workers share the port.
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="token"):
            client.get_model_metadata("digits")
        with pytest.raises(InferenceServerException, match="wrong token"):
            client.infer("digits", [an_input(x)], headers={"authorization": "Bearer wrong"})
        found = client.infer("digits", [an_input(x)], headers={"authorization": f"Bearer {TOKEN}"})
        assert found.as_numpy("logits").shape == (len(x), 10)
        # A stream says who it is when it is opened, and not when it first asks for something.
        answers: queue.Queue = queue.Queue()
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        assert "UNAUTHENTICATED" in str(answers.get(timeout=30)[1].status())
        client.stop_stream()
        headers = {"authorization": f"Bearer {TOKEN}"}
        client.start_stream(callback=lambda result, error: answers.put((result, error)), headers=headers)
        client.async_stream_infer("digits", [an_input(x[:1])])
        assert answers.get(timeout=30)[1] is None
        client.stop_stream()


def test_streams_that_ask_for_nothing_leave_room_for_others(digits_artifact, x) -> None:
    with ServerProcess(digits_artifact, grpc_port=0, env={"DLOPS_MAX_PENDING_BYTES": "100000000"}) as server:
        address = f"127.0.0.1:{server.grpc_port}"
        with grpc.insecure_channel(address) as channel, triton_grpc.InferenceServerClient(url=address) as client:
            ended = threading.Event()

            def nothing():
                ended.wait(60)
                yield from ()

            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            streams = [stub.ModelStreamInfer(nothing()) for _ in range(600)]
            refused: queue.Queue = queue.Queue()
            for stream in streams:
                # One that has ended already is not called back.
                if not stream.add_callback(lambda stream=stream: refused.put(stream.code())):
                    refused.put(stream.code())
            # Those that are too many are told so, and the others wait.
            assert refused.get(timeout=30) is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert client.is_server_live()
            assert client.infer("digits", [an_input(x)]).as_numpy("logits").shape == (len(x), 10)
            for stream in streams:
                stream.cancel()
            ended.set()
            answers: queue.Queue = queue.Queue()
            until = time.monotonic() + 30
            while True:
                client.start_stream(callback=lambda result, error: answers.put((result, error)))
                # A stream that was refused before anything was sent on it takes nothing more; the error is called back.
                with suppress(InferenceServerException):
                    client.async_stream_infer("digits", [an_input(x[:1])])
                _, error = answers.get(timeout=30)
                client.stop_stream()
                if error is None:
                    break
                assert time.monotonic() < until, error


def test_what_was_accepted_before_the_end_is_answered(slow_artifact) -> None:
    slow = np.zeros((1, 1, 8, 8), np.float32)
    slow[0, 0, 7, 7] = 4e6
    with (
        ServerProcess(slow_artifact, grpc_port=0) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        pending = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(an_infer(slow), timeout=60)
        while 'dlops_busy_instances{model="digits"} 1.0' not in httpx.get(f"{server.url}/metrics").text:
            time.sleep(0.02)
        server.close()
        assert len(pending.result(30).raw_output_contents) == 1


def test_a_port_that_is_taken_is_said_before_anything_starts(digits_artifact) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(MachineError, match="in use"),
            ServerProcess(digits_artifact, grpc_port=taken.getsockname()[1]),
        ):
            pass


def test_an_idle_stream_does_not_keep_a_server_from_ending(digits_artifact, x) -> None:
    answers: queue.Queue = queue.Queue()
    with (
        ServerProcess(digits_artifact, grpc_port=0) as server,
        triton_grpc.InferenceServerClient(url=f"127.0.0.1:{server.grpc_port}") as client,
    ):
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer("digits", [an_input(x[:1])])
        assert answers.get(timeout=30)[1] is None
        began = time.monotonic()
        server.close()
        # gRPC's own time of grace is a minute.
        assert time.monotonic() - began < 15
        client.stop_stream()


def test_what_was_sent_on_a_stream_is_answered_before_the_server_ends(slow_artifact) -> None:
    answers: queue.Queue = queue.Queue()
    slow = np.zeros((1, 1, 8, 8), np.float32)
    slow[..., -1, -1] = 1e6  # about half a second
    with (
        ServerProcess(slow_artifact, grpc_port=0) as server,
        triton_grpc.InferenceServerClient(url=f"127.0.0.1:{server.grpc_port}") as client,
    ):
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for number in range(5):
            client.async_stream_infer("digits", [an_input(slow)], request_id=str(number))
        found = [answers.get(timeout=60)]
        server.close()
        while len(found) < 5:
            found.append(answers.get(timeout=1))
        client.stop_stream()
    assert [(error, result.get_response().id) for result, error in found] == [(None, str(one)) for one in range(5)]


def test_two_servers_do_not_share_a_port(digits_artifact) -> None:
    with ServerProcess(digits_artifact, grpc_port=0) as server:
        # The launcher asks before, the process that holds the port afterwards.
        env = {"DLOPS_GRPC_PORT": str(server.grpc_port)}
        with pytest.raises(MachineError, match=r"in use|before it was ready"), ServerProcess(digits_artifact, env=env):
            pass


def test_an_output_as_its_strongest_classes(triton, x, expected) -> None:
    asked = [triton_grpc.InferRequestedOutput("logits", class_count=2)]
    found = triton.infer("digits", [an_input(x)], outputs=asked).as_numpy("logits")
    assert found.shape == (len(x), 2)
    assert [int(row[0].split(b":")[1]) for row in found] == expected.argmax(axis=1).tolist()


def test_an_answer_that_is_too_large_is_an_error(digits_artifact, x) -> None:
    env = {"DLOPS_MAX_RESPONSE_BYTES": "100"}
    with ServerProcess(digits_artifact, grpc_port=0, env=env) as limited:
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{limited.grpc_port}")
        assert client.infer("digits", [an_input(x[:2])]).as_numpy("logits").shape == (2, 10)
        with pytest.raises(InferenceServerException, match="some 120 bytes, at most 100 are sent"):
            client.infer("digits", [an_input(x[:3])])
        client.close()


def test_what_is_opened_beyond_as_many_connections_as_there_may_be_is_closed(digits_artifact) -> None:
    env = {"DLOPS_MAX_CONNECTIONS": "3", "DLOPS_RECEIVE_TIMEOUT_S": "1000"}
    with ExitStack() as opened, ServerProcess(digits_artifact, grpc_port=0, env=env) as server:
        address = ("127.0.0.1", server.grpc_port)
        # Else they would share a connection.
        own = [("grpc.use_local_subchannel_pool", 1)]
        where = f"127.0.0.1:{server.grpc_port}"
        channels = [opened.enter_context(grpc.insecure_channel(where, options=own)) for _ in range(3)]
        for channel in channels:
            grpc.channel_ready_future(channel).result(timeout=30)
        late = opened.enter_context(socket.create_connection(address, timeout=30))
        assert ended(late)
        for channel in channels:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=30).live


def test_who_says_nothing_on_a_connection_loses_it(digits_artifact) -> None:
    env = {"DLOPS_RECEIVE_TIMEOUT_S": "1"}
    # Not even that it speaks HTTP/2.
    with (
        ServerProcess(digits_artifact, grpc_port=0, env=env) as server,
        socket.create_connection(("127.0.0.1", server.grpc_port), timeout=30) as silent,
    ):
        assert ended(silent)


def ended(connection: socket.socket) -> bool:
    """Once it is; the greeting of HTTP/2 may come before."""
    with suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True
