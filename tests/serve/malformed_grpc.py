"""gRPC messages that no client should send, for the suite and, by the ten thousand, for the experiments."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import grpc
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from tests.serve.malformed import PIXELS

SERVICE = "/inference.GRPCInferenceService"
# Of a call that never changes what is served; the server is to be the same afterwards.
METHODS = (
    "ModelInfer", "ModelInfer", "ModelInfer", "ServerLive", "ServerReady", "ModelReady", "ServerMetadata",
    "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "TraceSetting",
    "SystemSharedMemoryRegister", "Nothing",
)  # fmt: skip
# What a request that is wrong may be told; DEADLINE_EXCEEDED and CANCELLED where it says how long it waits.
ALLOWED = frozenset(
    ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
)
_INT64 = st.integers(-(2**63), 2**63 - 1)


def good() -> bytes:
    request = service_pb2.ModelInferRequest(model_name="digits")
    request.inputs.add(name="image", datatype="FP32", shape=[1, 1, 8, 8])
    request.raw_input_contents.append(struct.pack("<64f", *[0.5] * PIXELS))
    return bytes(request.SerializeToString())


@st.composite
def calls(draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """A method, and bytes that are no message of it, or one that is wrong somewhere."""
    method, body = draw(st.sampled_from(METHODS)), good()
    choice = draw(st.integers(0, 9))
    if choice == 0:
        return method, draw(st.binary(max_size=300))
    if choice == 1:
        return method, body[: draw(st.integers(0, len(body) - 1))]
    if choice <= 3:
        changed = bytearray(body)
        for place in draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=5)):
            changed[place] = draw(st.integers(0, 255))
        return method, bytes(changed)
    return "ModelInfer", _request(draw).SerializeToString()


def _request(draw: Callable[[Any], Any]) -> Any:
    """One that can be read, each of its parts right as often as not."""

    def either(right: Any, wrong: st.SearchStrategy[Any]) -> Any:
        return right if draw(st.booleans()) else draw(wrong)

    words = st.sampled_from(["", "image", "logits", "digits", "FP32", "FP16", "INT64", "BYTES", "BOOL", "binary_data"])
    texts = words | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    request = service_pb2.ModelInferRequest(
        model_name=either("digits", texts), model_version=either("", texts), id=either("", texts)
    )
    for _ in range(either(1, st.integers(0, 3))):
        tensor = request.inputs.add(
            name=either("image", texts), datatype=either("FP32", texts),
            shape=either([1, 1, 8, 8], st.lists(_INT64 | st.integers(-1, 9), max_size=6)),
        )  # fmt: skip
        _parameters(draw, tensor.parameters)
        match draw(st.integers(0, 7)):
            case 0:
                tensor.contents.fp32_contents.extend(draw(st.lists(st.floats(width=32), max_size=70)))
            case 1:
                tensor.contents.int64_contents.extend(draw(st.lists(_INT64, max_size=70)))
            case 2:
                tensor.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=20), max_size=5)))
    for _ in range(either(0, st.integers(0, 3))):
        output = request.outputs.add(name=either("logits", texts))
        _parameters(draw, output.parameters)
    _parameters(draw, request.parameters)
    raw = struct.pack("<64f", *[0.5] * PIXELS)
    request.raw_input_contents.extend(either([raw], st.lists(st.just(raw) | st.binary(max_size=300), max_size=3)))
    return request


def _parameters(draw: Callable[[Any], Any], parameters: Any) -> None:
    names = ["timeout", "priority", "classification", "binary_data", "shared_memory_region", "sequence_id"]
    for name in draw(st.lists(st.sampled_from(names) | st.text("abc", max_size=5), max_size=2)):
        match draw(st.integers(0, 3)):
            case 0:
                parameters[name].int64_param = draw(_INT64)
            case 1:
                parameters[name].bool_param = draw(st.booleans())
            case 2:
                parameters[name].string_param = draw(st.text("abc1", max_size=9))
            case 3:
                parameters[name].SetInParent()


def status_of(channel: grpc.Channel, method: str, body: bytes, *, within_s: float = 20.0) -> str:
    """The call's status by its name; OK where it was answered."""
    try:
        channel.unary_unary(f"{SERVICE}/{method}")(body, timeout=within_s)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def stream_of(channel: grpc.Channel, bodies: list[bytes], *, within_s: float = 20.0) -> list[str]:
    """What one stream is told, an error's text or nothing for each."""
    answers = channel.stream_stream(f"{SERVICE}/ModelStreamInfer")(iter(bodies), timeout=within_s)
    return [service_pb2.ModelStreamInferResponse.FromString(answer).error_message for answer in answers]
