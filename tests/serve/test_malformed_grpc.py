"""Whatever comes over gRPC, the status is an error of the sender's, the log stays quiet, and the next call is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings

from dlops.serve.launch import ServerProcess

grpc = pytest.importorskip("grpc", reason="grpcio is in the triton extra")
pytest.importorskip("tritonclient.grpc", reason="tritonclient is in the triton extra")
from tests.serve.malformed_grpc import ALLOWED, calls, good, status_of, stream_of  # noqa: E402


@pytest.fixture(scope="module")
def server(digits_artifact) -> Iterator[ServerProcess]:
    with ServerProcess(digits_artifact, grpc_port=0, env={"DLOPS_MAX_BODY_BYTES": "200000"}) as running:
        yield running
        log = running.log_path.read_text()
    assert "Traceback" not in log
    assert "a bug in dlops" not in log


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as opened:
        yield opened


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_no_call_brings_it_down(channel: grpc.Channel, call: tuple[str, bytes]) -> None:
    assert status_of(channel, *call) in ALLOWED | {"OK"}
    assert status_of(channel, "ModelInfer", good()) == "OK"


def test_what_is_no_message_is_the_client_s_mistake(channel: grpc.Channel) -> None:
    for method in ("ModelInfer", "ModelMetadata", "ServerLive", "TraceSetting"):
        with pytest.raises(grpc.RpcError, match=r"the message is no \w+Request") as caught:
            channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"\xff" * 20, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_goes_on_after_what_is_no_message(channel: grpc.Channel) -> None:
    first, second, third = stream_of(channel, [good(), b"\xff" * 20, good()])
    assert (first, third) == ("", "")
    assert second == "the message is no ModelInferRequest"


@pytest.mark.parametrize(
    "body",
    [b"\x2a\x00" * 30_000, b"\x32\x00" * 30_000, b"\x2a\xe0\xd4\x03" + b"\x22\x00" * 30_000],
    ids=["inputs", "outputs", "parameters"],
)
def test_a_message_of_more_parts_than_any_needs_is_not_made(channel: grpc.Channel, body: bytes) -> None:
    with pytest.raises(grpc.RpcError, match="more than 20000 parts") as caught:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(body, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_who_may_not_ask_is_not_read(digits_artifact) -> None:
    # Made, it would have 1.5 GB.
    body = b"\x2a\x00" * 15_000_000
    with (
        ServerProcess(digits_artifact, grpc_port=0, env={"DLOPS_TOKEN": "a-token-for-the-tests"}) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        ask = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for metadata, code in (
            (None, "UNAUTHENTICATED"),
            ([("authorization", "Bearer a-token-for-the-tests")], "INVALID_ARGUMENT"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                ask(body, timeout=60, metadata=metadata)
            assert caught.value.code().name == code
        peaks = [
            int(line.split()[1]) / 1000
            for worker in psutil.Process(server.pid).children()
            for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ]
    assert 0 < max(peaks) < 600
