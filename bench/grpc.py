"""gRPC for load: requests and answers are bytes, and a request is encoded before it is timed.

Nothing is tried again and no proxy of the environment is used: either would be measured instead of the server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from dlops.bench import pacing
from dlops.bench.transport import Answer, Listener, TransportName
from dlops.grpc_messages import grpc
from dlops.wire_format import fields

# Of ModelInferResponse.
_RAW_OUTPUT_CONTENTS = 6
_UNAVAILABLE = pacing.GRPC + pacing.GRPC_STATUSES.index("UNAVAILABLE")
_METHOD = "/inference.GRPCInferenceService/ModelInfer"
# Calls on schedule share so many connections, as the calls of one gRPC client do.
_CHANNELS = 8
# What tells one channel from the other: equal ones would share a connection.
_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
# A server that is back is found at once; by default the pauses between tries grow to two minutes.
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100))


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_channel(host: str, port: int) -> Any:
    """A blocking channel with a connection of its own, a context manager."""
    return grpc.insecure_channel(address(host, port), options=_OPTIONS)


class GrpcConnection:
    """One channel, and with it one HTTP/2 connection."""

    def __init__(self, channel: Any, tensor_bytes: int | None) -> None:
        self._channel, self._tensor_bytes = channel, tensor_bytes
        self._call = channel.unary_unary(_METHOD)

    @property
    def is_open(self) -> bool:
        return bool(self._channel.get_state() is grpc.ChannelConnectivity.READY)

    async def send(self, request: bytes, *, timeout_s: float) -> Answer:
        """Never raises for what the server did: that is in the status."""
        return await _answer(self._call(request, timeout=timeout_s), self._tensor_bytes)

    async def aclose(self) -> None:
        await self._channel.close()


class GrpcWire:
    """One call at a time on a channel that other wires use too."""

    timed_out = pacing.GRPC + pacing.GRPC_STATUSES.index("DEADLINE_EXCEEDED")

    def __init__(
        self, channel: Any, *, number: int, listener: Listener, timeout_s: float, tensor_bytes: int | None
    ) -> None:
        self._channel, self._listener, self._timeout_s = channel, listener, timeout_s
        self._call = channel.unary_unary(_METHOD)
        self.number, self._tensor_bytes = number, tensor_bytes
        self._task: asyncio.Task[None] | None = None

    def send(self, request: bytes) -> None:
        self._task = asyncio.get_running_loop().create_task(self._send(request))

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _send(self, request: bytes) -> None:
        answer = await _answer(self._call(request, timeout=self._timeout_s), self._tensor_bytes)
        if answer.status == _UNAVAILABLE and self._channel.get_state() is not grpc.ChannelConnectivity.READY:
            # No server said so: gRPC has one status for a server that is busy and a connection that broke.
            self._listener.lost(self, pacing.LOST)
            return
        # The channel mends itself, so the wire takes another call whatever became of this one.
        self._listener.answered(self, answer.arrived_ns, answer.status, keep=True)


class GrpcLine:
    """A blocking channel with a connection of its own."""

    def __init__(self, host: str, port: int, *, timeout_s: float, tensor_bytes: int | None = None) -> None:
        self._channel, self._timeout_s = open_channel(host, port), timeout_s
        self._tensor_bytes = tensor_bytes
        self._call = self._channel.unary_unary(_METHOD)

    def ask(self, request: bytes) -> Answer:
        """Never raises for what the server did: that is in the status."""
        try:
            body = self._call(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            return _failed(error)
        return _answered(body, self._tensor_bytes)

    def close(self) -> None:
        self._channel.close()


class GrpcTransport:
    """rate_a_sender: see docs/bench.md; a call costs this client several times what one over HTTP does."""

    name: TransportName = "gRPC"
    rate_a_sender = 1000.0

    def __init__(self, tensor_bytes: int | None = None) -> None:
        self.tensor_bytes = tensor_bytes
        self._channels: list[Any] = []

    def expecting(self, tensor_bytes: int | None) -> GrpcTransport:
        return GrpcTransport(tensor_bytes)

    def tensor_bytes_of(self, answer: Answer) -> int:
        return raw_bytes(answer.body)

    def dial(self, host: str, port: int, *, timeout_s: float) -> GrpcLine:
        return GrpcLine(host, port, timeout_s=timeout_s, tensor_bytes=self.tensor_bytes)

    async def connect(self, host: str, port: int) -> GrpcConnection:
        channel = grpc.aio.insecure_channel(address(host, port), options=[*_OPTIONS, *_RECONNECT])
        try:
            await _until_ready(channel)
        except (OSError, asyncio.CancelledError):
            await channel.close()
            raise
        return GrpcConnection(channel, self.tensor_bytes)

    async def open_wire(self, host: str, port: int, *, number: int, listener: Listener, timeout_s: float) -> GrpcWire:
        while len(self._channels) < _CHANNELS:
            self._channels.append(grpc.aio.insecure_channel(address(host, port), options=[*_OPTIONS, *_RECONNECT]))
        channel = self._channels[number % _CHANNELS]
        await _until_ready(channel)
        return GrpcWire(channel, number=number, listener=listener, timeout_s=timeout_s, tensor_bytes=self.tensor_bytes)

    async def aclose(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels.clear()


async def _until_ready(channel: Any) -> None:
    """Raises ConnectionRefusedError where the first try fails, for whatever reason: gRPC does not say which."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            raise ConnectionRefusedError("no gRPC connection could be made")
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


async def _answer(call: Any, tensor_bytes: int | None) -> Answer:
    try:
        body = await call
    except grpc.aio.AioRpcError as error:
        return _failed(error)
    return _answered(body, tensor_bytes)


def _answered(body: bytes, tensor_bytes: int | None) -> Answer:
    arrived_ns, status = time.perf_counter_ns(), pacing.ANSWERED
    if tensor_bytes is not None and (raw_bytes(body) != tensor_bytes if tensor_bytes else not body):
        status = pacing.OTHER
    return Answer(status=status, headers={}, body=body, arrived_ns=arrived_ns)


def raw_bytes(message: bytes) -> int:
    """What a ModelInferResponse has in `raw_output_contents`; 0 where it has none, -1 where it is no such message.

    By the lengths of its fields alone: between two calls there is no time to decode it.
    """
    try:
        return sum([end - begin for number, begin, end in fields(message) if number == _RAW_OUTPUT_CONTENTS])
    except ValueError:
        return -1


def _failed(error: Any) -> Answer:
    """error: an RpcError of a call, with its code and details."""
    text = (error.details() or "").encode()
    return Answer(status=pacing.GRPC + error.code().value[0], headers={}, body=text, arrived_ns=time.perf_counter_ns())
