"""How prepared bytes get to a server and back: what the loads need of HTTP/1.1 and of gRPC, and nothing of what is in
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

TransportName = Literal["HTTP", "gRPC"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """status: an HTTP status, or as `pacing` numbers gRPC's; 200 is success with both, and a success that is another
    answer than expected has `pacing.OTHER`. headers: lower-case names, none over gRPC. body: of a failure, its text.
    arrived_ns: perf_counter_ns when the last byte was read."""

    status: int
    headers: dict[str, str]
    body: bytes
    arrived_ns: int


def canonical(url: str) -> str:
    """The same for all that name one target: neither case nor a slash at the end makes another, in one run and in the
    report that it is compared with."""
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.rstrip("/").partition("/")
    return f"{scheme.lower()}://{host.lower()}{slash}{path}"


class Connection(Protocol):
    """For a fixed number of calls in flight: one at a time on each."""

    @property
    def is_open(self) -> bool: ...

    async def send(self, request: bytes, *, timeout_s: float) -> Answer:
        """Raises ConnectionError, TimeoutError, or ValueError for an answer that is not the transport's."""
        ...

    async def aclose(self) -> None: ...


class Line(Protocol):
    """For calls that are waited for, one at a time; a connection that the server closed is made anew by the next."""

    def ask(self, request: bytes) -> Answer:
        """Send one request and wait. Raises OSError (TimeoutError among them) or ValueError."""
        ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Who is told what became of a call on a wire."""

    def answered(self, wire: Wire, arrived_ns: int, status: int, *, keep: bool) -> None:
        """keep: the wire takes another call."""
        ...

    def lost(self, wire: Wire, outcome: int) -> None:
        """The wire is gone, and with it the call that was on it, if there was one. outcome: as `pacing` has it."""
        ...


class Wire(Protocol):
    """For calls on schedule: one at a time on each, with callbacks instead of a task to wait in.

    timed_out: the outcome, as `pacing` has it, of a call that was given up.
    """

    @property
    def number(self) -> int: ...

    @property
    def timed_out(self) -> int: ...

    def send(self, request: bytes) -> None: ...

    def abort(self) -> None: ...


class Transport(Protocol):
    """rate_a_sender: requests a second that one process is trusted to send with its schedule kept. tensor_bytes: what
    it expects, None where any answer will do."""

    @property
    def name(self) -> TransportName: ...

    @property
    def rate_a_sender(self) -> float: ...

    @property
    def tensor_bytes(self) -> int | None: ...

    def expecting(self, tensor_bytes: int | None) -> Transport:
        """The same, which takes a success for another answer where `tensor_bytes_of` it are others; 0 takes any that is
        not empty."""
        ...

    def tensor_bytes_of(self, answer: Answer) -> int:
        """What an answer has in binary tensors; 0 where its numbers are JSON, or typed contents."""
        ...

    def dial(self, host: str, port: int, *, timeout_s: float) -> Line:
        """timeout_s: of a call. Raises OSError."""
        ...

    async def connect(self, host: str, port: int) -> Connection:
        """Raises OSError."""
        ...

    async def open_wire(self, host: str, port: int, *, number: int, listener: Listener, timeout_s: float) -> Wire:
        """Raises OSError."""
        ...

    async def aclose(self) -> None:
        """End what the wires share."""
        ...


def open_transport(name: TransportName) -> Transport:
    """A new one. Raises MachineError where its package is not installed."""
    if name == "HTTP":
        from dlops.bench.http import HttpTransport

        return HttpTransport()
    from dlops.errors import missing_package

    try:
        from dlops.bench.grpc import GrpcTransport
    except ModuleNotFoundError as error:
        if error.name != "grpc":
            raise
        raise missing_package("grpcio", extra="triton", needed_for="measuring over gRPC") from None
    return GrpcTransport()
