"""A small HTTP/1.1 client connection for load: prepared bytes out, one whole answer back, the time taken on arrival.

A general client costs more per request than a small model does; this one is a parser of answers and nothing else.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time

from dlops.bench import pacing
from dlops.bench.transport import Answer, Listener, TransportName

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 1024 * 1024 * 1024
_READ_BYTES = 256 * 1024
_HEX = re.compile(rb"[0-9A-Fa-f]{1,16}")


class AnswerParser:
    """Bytes of one connection, in whatever pieces they come, into answers. tensor_bytes: as `Transport.expecting` has
    it."""

    def __init__(self, tensor_bytes: int | None = None) -> None:
        self._buffer = bytearray()
        self._tensor_bytes = tensor_bytes
        self.closes = False

    def feed(self, data: bytes) -> Answer | None:
        """The answer that these bytes complete, or None. `closes` then says whether the server closes the connection.

        Raises ValueError for what is not HTTP.
        """
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ValueError("the head of the answer does not end")
            return None
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise ValueError(f"not an HTTP/1 answer: {lines[0][:60]!r}")
        fields = (line.partition(":") for line in lines[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        body = self._body(end + 4, headers)
        if body is None:
            return None
        self.closes = headers.get("connection", "").lower() == "close" or version == "HTTP/1.0"
        self._buffer.clear()
        arrived_ns, status = time.perf_counter_ns(), int(rest[:3])
        if self._tensor_bytes is not None and status == pacing.ANSWERED and self._is_other(headers, body):
            status = pacing.OTHER
        return Answer(status=status, headers=headers, body=body, arrived_ns=arrived_ns)

    def _is_other(self, headers: dict[str, str], body: bytes) -> bool:
        return tensor_bytes(headers, body) != self._tensor_bytes if self._tensor_bytes else not body

    def _body(self, start: int, headers: dict[str, str]) -> bytes | None:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return _unchunked(self._buffer, start)
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BODY_BYTES:
            raise ValueError(f"Content-Length is {length!r}")
        stop = start + int(length)
        return bytes(self._buffer[start:stop]) if len(self._buffer) >= stop else None


def tensor_bytes(headers: dict[str, str], body: bytes) -> int:
    """What an answer has behind its JSON, as the protocol's extension for binary tensors has it; 0 without it."""
    head = headers.get("inference-header-content-length", "")
    return len(body) - int(head) if head.isascii() and head.isdigit() else 0


class Connection(asyncio.Protocol):
    """One request in flight at a time, kept alive between them."""

    def __init__(self, tensor_bytes: int | None = None) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = AnswerParser(tensor_bytes)
        self._waiter: asyncio.Future[Answer] | None = None
        self._lost: BaseException | None = None

    @classmethod
    async def open(cls, host: str, port: int, *, tensor_bytes: int | None = None) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(tensor_bytes), host, port)
        return connection

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, request: bytes, *, timeout_s: float) -> Answer:
        """Raises ConnectionError, TimeoutError, or ValueError for an answer that is not HTTP."""
        if not self.is_open or self._transport is None:
            raise ConnectionResetError("the connection is closed")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Answer] = loop.create_future()
        self._waiter = waiter
        timer = loop.call_later(timeout_s, self._expire, waiter)
        self._transport.write(request)
        try:
            return await waiter
        finally:
            timer.cancel()
            self._waiter = None
            if self._parser.closes or not waiter.done() or waiter.cancelled() or waiter.exception() is not None:
                # An answer may still come for a request that was given up: it must not be taken for the next one's.
                self.close()

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc if isinstance(exc, ConnectionError) else ConnectionResetError("the server closed it"))

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self.close()  # nothing was asked: the server and we disagree about where answers end
            return
        try:
            answer = self._parser.feed(data)
        except ValueError as error:
            self._fail(error)
            return
        if answer is not None:
            self._waiter.set_result(answer)

    def _expire(self, waiter: asyncio.Future[Answer]) -> None:
        if not waiter.done():
            waiter.set_exception(TimeoutError("no answer in time"))

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


class HttpWire(asyncio.Protocol):
    """One connection, one request in flight on it at a time."""

    timed_out = pacing.TIMED_OUT

    def __init__(self, *, number: int, listener: Listener, tensor_bytes: int | None) -> None:
        self._listener, self.number = listener, number
        self._parser = AnswerParser(tensor_bytes)
        self._transport: asyncio.Transport

    def send(self, request: bytes) -> None:
        self._transport.write(request)

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            answer = self._parser.feed(data)
        except ValueError:
            self._listener.lost(self, pacing.NOT_HTTP)
            return
        if answer is not None:
            self._listener.answered(self, answer.arrived_ns, answer.status, keep=not self._parser.closes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._listener.lost(self, pacing.LOST)


class HttpLine:
    """A blocking connection, for one thread."""

    def __init__(self, host: str, port: int, *, timeout_s: float, tensor_bytes: int | None = None) -> None:
        self._place, self._timeout_s, self._tensor_bytes = (host, port), timeout_s, tensor_bytes
        self._socket: socket.socket | None = self._connected()

    def ask(self, request: bytes) -> Answer:
        """Raises OSError or, for an answer that is not HTTP, ValueError; the connection is given up then."""
        answer = None
        try:
            self._socket = self._socket or self._connected()
            until = time.perf_counter() + self._timeout_s
            parser = AnswerParser(self._tensor_bytes)
            self._socket.sendall(request)
            while answer is None:
                self._socket.settimeout(max(1e-3, until - time.perf_counter()))
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    raise ConnectionResetError("the server closed the connection")
                answer = parser.feed(data)
            return answer
        finally:
            # After a failure an answer may still come, which must not be taken for the next call's.
            if answer is None or parser.closes:
                self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        made = socket.create_connection(self._place, timeout=self._timeout_s)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made


class HttpTransport:
    """rate_a_sender: see docs/benchmarks/sender.md."""

    name: TransportName = "HTTP"
    rate_a_sender = 4000.0

    def __init__(self, tensor_bytes: int | None = None) -> None:
        self.tensor_bytes = tensor_bytes

    def expecting(self, tensor_bytes: int | None) -> HttpTransport:
        return HttpTransport(tensor_bytes)

    def tensor_bytes_of(self, answer: Answer) -> int:
        return tensor_bytes(answer.headers, answer.body)

    def dial(self, host: str, port: int, *, timeout_s: float) -> HttpLine:
        return HttpLine(host, port, timeout_s=timeout_s, tensor_bytes=self.tensor_bytes)

    async def connect(self, host: str, port: int) -> Connection:
        return await Connection.open(host, port, tensor_bytes=self.tensor_bytes)

    async def open_wire(self, host: str, port: int, *, number: int, listener: Listener, timeout_s: float) -> HttpWire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(
            lambda: HttpWire(number=number, listener=listener, tensor_bytes=self.tensor_bytes), host, port
        )
        return wire

    async def aclose(self) -> None:
        pass  # its wires share nothing


def _unchunked(buffer: bytearray, start: int) -> bytes | None:
    """The joined chunks, or None where the last one is not there yet."""
    pieces: list[bytes] = []
    while True:
        line_end = buffer.find(b"\r\n", start)
        if line_end < 0:
            return None
        digits = bytes(buffer[start:line_end]).split(b";")[0].strip()
        # int() alone would take a sign, and underscores.
        if not _HEX.fullmatch(digits) or start + int(digits, 16) > MAX_BODY_BYTES:
            raise ValueError(f"a chunk of the answer has the size {digits[:20]!r}")
        size, start = int(digits, 16), line_end + 2
        if len(buffer) < start + size + 2:
            return None
        if size == 0:
            return b"".join(pieces)
        pieces.append(bytes(buffer[start : start + size]))
        start += size + 2
