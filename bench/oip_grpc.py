"""The Open Inference Protocol over gRPC: metadata, requests with raw tensors, statistics."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from dlops.bench.grpc import GrpcTransport, open_channel
from dlops.bench.oip import ASK_TIMEOUT_S, Address, Described, only_model
from dlops.bench.server_time import STATISTICS_TIMEOUT_S, Counts, NoStatisticsError
from dlops.bench.transport import Answer
from dlops.datatypes import DATATYPES, DTYPES
from dlops.errors import MachineError, UsageError
from dlops.grpc_messages import CONTENTS, DecodeError, grpc, service_pb2, service_pb2_grpc
from dlops.signature import Array, Feed

# Of what a server answers when it is there and does not serve what was asked for.
_NOT_SERVED = (
    grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED,
)  # fmt: skip
_PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


class GrpcClient:
    def __init__(self, address: Address, *, model: str) -> None:
        self._address, self._model, self.binary = address, model, True
        self._version = address.version or ""
        self.transport = GrpcTransport()

    def encode(self, feed: Feed) -> bytes:
        request = service_pb2.ModelInferRequest(model_name=self._model, model_version=self._version)
        for name, array in feed.items():
            request.inputs.add(name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape)
            request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
        return bytes(request.SerializeToString())

    def decode(self, answer: Answer) -> Feed:
        return decode_outputs(answer.body)

    def statistics(self) -> Counts:
        with open_channel(self._address.host, self._address.port) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                answer = stub.ModelStatistics(
                    service_pb2.ModelStatisticsRequest(name=self._model, version=self._version),
                    timeout=STATISTICS_TIMEOUT_S,
                )
            except grpc.RpcError as error:
                raise NoStatisticsError(f"ModelStatistics answered {_said(error)}") from None
        try:
            return Counts.of([_as_json(model) for model in answer.model_stats])
        except ValueError as error:
            raise NoStatisticsError(f"ModelStatistics answered no statistics ({error})") from None


def describe(address: Address, *, model: str | None) -> Described:
    """What is served there; model: its name, where it is known."""
    with open_channel(address.host, address.port) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def ask(method: str, request: Any) -> Any:
            try:
                return getattr(stub, method)(request, timeout=ASK_TIMEOUT_S)
            except grpc.RpcError as error:
                _refuse(address.url, method, error)

        server = ask("ServerMetadata", service_pb2.ServerMetadataRequest())
        name = model or _only_model(stub, address.url)
        which = {"name": name, "version": address.version or ""}
        metadata = ask("ModelMetadata", service_pb2.ModelMetadataRequest(**which))
        if not ask("ModelReady", service_pb2.ModelReadyRequest(**which)).ready:
            raise MachineError(f"{address.url}: model {name!r} is not ready", hint="the server's log says why")
    return Described(
        client=GrpcClient(address, model=name), model=name, server=f"{server.name} {server.version}".strip(),
        metadata={
            "versions": list(metadata.versions), "platform": metadata.platform,
            "inputs": [_tensor(one) for one in metadata.inputs], "outputs": [_tensor(one) for one in metadata.outputs],
        },
    )  # fmt: skip


def decode_outputs(body: bytes) -> dict[str, Array]:
    """The named outputs of a ModelInferResponse, raw or typed. Raises ValueError where it is none."""
    try:
        response = service_pb2.ModelInferResponse.FromString(body)
    except DecodeError as error:
        raise ValueError(error) from None
    raw, outputs = response.raw_output_contents, {}
    if raw and len(raw) != len(response.outputs):
        raise ValueError(f"{len(raw)} raw outputs for {len(response.outputs)} names")
    for index, entry in enumerate(response.outputs):
        dtype, shape = np.dtype(DTYPES[entry.datatype]), [int(size) for size in entry.shape]
        if not raw:
            outputs[entry.name] = np.array(getattr(entry.contents, CONTENTS[entry.datatype]), dtype).reshape(shape)
            continue
        if len(raw[index]) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"output {entry.name}: {len(raw[index])} bytes for shape {shape}")
        outputs[entry.name] = np.frombuffer(raw[index], dtype).reshape(shape)
    return outputs


def _tensor(entry: Any) -> dict[str, Any]:
    return {"name": entry.name, "datatype": entry.datatype, "shape": list(entry.shape)}


def _as_json(model: Any) -> dict[str, Any]:
    """One of a ModelStatisticsResponse as REST words it."""
    parts = {part: getattr(model.inference_stats, part) for part in _PARTS}
    return {
        "inference_count": model.inference_count,
        "execution_count": model.execution_count,
        "inference_stats": {part: {"count": one.count, "ns": one.ns} for part, one in parts.items()},
    }


def _only_model(stub: Any, url: str) -> str:
    form = f"{url.rstrip('/')}/NAME"
    try:
        index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=ASK_TIMEOUT_S)
    except grpc.RpcError as error:
        raise UsageError(
            f"{url}: it does not list its models ({_said(error)})", hint=f"say which: --payload ARTIFACT, or {form}"
        ) from None
    return only_model(url, [one.name for one in index.models], form=form)


def _refuse(url: str, method: str, error: Any) -> NoReturn:
    if error.code() in _NOT_SERVED:
        hint = "it must speak the Open Inference Protocol over gRPC, as Triton and KServe do"
        raise UsageError(f"{url}: {method} answered {_said(error)}", hint=hint) from None
    raise MachineError(
        f"{url}: no answer over gRPC ({_said(error)})",
        hint="is the server up, and is this its gRPC port? oip+http:// is for REST",
    ) from None


def _said(error: Any) -> str:
    return f"{error.code().name}: {(error.details() or '')[:200]}".strip(": ")
