"""Inference over the binary protocol, answered on the connection itself.

BentoML's middleware, a task and an ASGI conversation cost several times what a small model's inference does. So one
kind of request does not take part in them: `POST /v2/models/NAME/infer` with a Content-Length, the binary extension and
no compression. It goes from the parser into the queue and from there to the socket. All others are BentoML's and take
the usual way, on the same port and connection; errors, limits and metrics are the same on both.

uvicorn takes a class for its connections, and BentoML names none: `install` puts this one where uvicorn looks for its
own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import uvicorn
import uvicorn.config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dlops.console import say
from dlops.errors import DlopsError, InputError
from dlops.serve.accounts import Caller
from dlops.serve.answers import (
    TIMING_HEADER,
    HeadTooLargeError,
    ReceiveTimeoutError,
    error_response,
    header_lines,
)
from dlops.serve.call import Call
from dlops.serve.guard import REQUEST_ID, SECURITY_HEADERS
from dlops.serve.handshake import Handshake
from dlops.serve.lingering import LingeringTransport
from dlops.serve.outcome import OverloadedError
from dlops.serve.outgoing import Outgoing
from dlops.serve.ports import authority
from dlops.serve.routes import IS_LAST, Application
from dlops.serve.tracing import PARENT
from dlops.serve.upgrade import without_upgrade

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application


# What a header of this name asks for is done on the usual way.
_UNUSUAL = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"sec-fetch-site", b"origin"))
_REQUEST_ID = REQUEST_ID.encode()
_PARENT = PARENT.encode()
_TIMING = TIMING_HEADER.lower().encode()
_SECURITY = b"".join([f"{name}: {value}\r\n".encode() for name, value in SECURITY_HEADERS.items()])
# How often slow connections are looked for.
_SWEEP_S = 0.5
# Of the JSON's length: up to 9,999 bytes are read on the event loop in well under a millisecond.
_JSON_DIGITS = 4
# Of the first line and the headers.
_MAX_HEAD_BYTES = 64 * 1024
_LARGE_BYTES = 64 * 1024
# Of requests that wait for the answer to one before them on their connection: with more than this no more is read, and
# more requests than that, each of next to no bytes, are refused.
_MAX_AHEAD_BYTES, _MAX_AHEAD = 64 * 1024, 256
# Of connections that are ending, when one has to make room.
_MOST_LOOKED_AT = 16
# What uvicorn warns of, request by request: counted, and the client's affair and not the log's, which junk would fill.
_CLIENTS_AFFAIR = frozenset(("Invalid HTTP request received.", "Unsupported upgrade request."))


class Door(HttpToolsProtocol):
    """One connection."""

    application: Application
    # The server whose connections are looked at.
    _swept: object = None
    _date: tuple[object, bytes] = (None, b"")
    # Of which server, and its connections whose clients are waited for, since the longest first: in this order without
    # looking at all of them, which would cost most when there are too many.
    _of: object = None
    _waited_for: ClassVar[dict[Door | Handshake, None]] = {}
    # Those that were closed and are not gone, since the longest first.
    _ending: ClassVar[dict[Door, None]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving: Call | None = None
        self._running: RequestResponseCycle | None = None
        # The last inference of our kind: no other begins before its answer.
        self._call: Call | None = None
        # When the request that has not come whole yet began to; at first, when the connection was made.
        self._waiting_since: float | None = self.loop.time()
        self._in_head, self._head_bytes, self._chunk_bytes, self._trailer_bytes = False, 0, 0, 0
        # Not even with a library for them installed: they would leave the door, and who guards it.
        self.ws_protocol_class = None
        self._completed = self._body_came = False
        # No request has begun to come.
        self._between = True
        # What is wrong with what came behind requests that are still to be answered.
        self._refusal: DlopsError | None = None
        # Why the parser was stopped, where it was not by itself.
        self._stopped: InputError | None = None
        # What came is no request, so of what follows nobody knows whose it is.
        self._is_lost = False
        self._handshake: Handshake | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        handshake = self._handshake
        if handshake is not None:
            # Not when it says so, a moment later: the connection counts once.
            self.end_handshake(handshake)
        super().connection_made(transport)
        self.transport = self._lingering = LingeringTransport(transport, self._has_more, self._note_end, loop=self.loop)
        self.flow = _Reading(transport, self._has_enough)
        self._outgoing = Outgoing(transport)
        self._waiting_since = self.loop.time()
        if Door._swept is not self.server_state:
            Door._swept = self.server_state
            self.loop.call_later(_SWEEP_S, self._sweep)
        if handshake is None:
            self._wait_for(self)
        elif handshake.is_aborted:
            self.transport.abort()
        else:
            self._waited_for[self] = None

    def begin_handshake(self, handshake: Handshake) -> None:
        self._handshake = handshake
        self.connections.add(handshake)  # type: ignore[arg-type]
        self._wait_for(handshake)

    def end_handshake(self, handshake: Handshake) -> None:
        self._handshake = None
        self.connections.discard(handshake)
        self._waited_for.pop(handshake, None)

    def _wait_for(self, newest: Door | Handshake) -> None:
        if Door._of is not self.server_state:
            Door._of, Door._waited_for, Door._ending = self.server_state, {}, {}
        self._waited_for[newest] = None
        if len(self.connections) > self.application.max_connections:
            self._make_room(newest)

    def _make_room(self, newest: Door | Handshake) -> None:
        """End one that is ending anyway and has nothing left to send; else the one whose client has been waited for the
        longest, be it for the rest of a request or for the next one; where all others are being answered, the newest.
        """
        self.application.metrics.crowded.add()
        for ending in islice(self._ending, _MOST_LOOKED_AT):
            if ending._outgoing.is_sent():
                del self._ending[ending]
                ending.transport.abort()
                return
        first = next(iter(self._waited_for))
        del self._waited_for[first]
        if isinstance(first, Handshake):
            first.abort()
        elif first is newest:
            most = self.application.max_connections
            first._refuse(OverloadedError(f"{most} connections are open and all are being answered"))
        else:
            first._make_way()

    def _make_way(self) -> None:
        most = self.application.max_connections
        is_told = self._receiving is not None and not self._receiving.response_complete
        if is_told or not self._outgoing.is_sent():
            self._end(OverloadedError(f"more than {most} connections were opened; this one was waited for the longest"))
            self._lingering.close_now()
        else:
            # Closing would wait for the client where it is encrypted, and the connection would count until then.
            self.transport.abort()

    def _note_end(self) -> None:
        self._waited_for.pop(self, None)
        self._ending[self] = None

    def _sweep(self) -> None:
        """End the connections whose requests take too long to come, and those whose clients take nothing of their
        answers; again as long as there are connections."""
        now = self.loop.time()
        for connection in list(self.connections):
            if not isinstance(connection, Door):
                continue
            try:
                connection._look(now)
            except Exception as error:  # noqa: BLE001 - whatever one has, the others must be looked at
                say(f"a connection is dropped: {type(error).__name__}: {error}")
                connection.transport.abort()
        if not self.connections:
            Door._swept = None
        elif Door._swept is self.server_state:
            self.loop.call_later(_SWEEP_S, self._sweep)

    def _look(self, now: float) -> None:
        limit, send_timeout_s = now - self.application.receive_timeout_s, self.application.send_timeout_s
        if self.flow.read_paused and self._waiting_since is not None:
            # It is we who do not read.
            self._waiting_since = now
        if self._lingering.lingers:
            self._lingering.end_if_late(now)
        elif (self._waiting_since or limit) < limit:
            self._time_out()
        if self._outgoing.stalled_s(now) > send_timeout_s:
            self._drop()
            return
        is_sent = self._outgoing.is_sent()
        limit_s = 0.0 if self._outgoing.is_known else send_timeout_s
        if self._lingering.is_ending_late(now, is_sent=is_sent, limit_s=limit_s):
            self.transport.abort()

    def _time_out(self) -> None:
        self._waiting_since = None
        if self._is_answering():
            self._refuse(_too_slow())
            return
        self._end(_too_slow())

    def _end(self, error: DlopsError) -> None:
        """Close; to a request of our kind that has not come whole `error` is the answer."""
        call = self._receiving
        if call is not None and not call.response_complete:
            call.give_up(error)
        else:
            self._lingering.close_now()

    def _drop(self) -> None:
        """The client takes nothing. Closing would wait for it, and may do so already."""
        self.application.metrics.unread.add()
        client = "a client" if self.client is None else authority(*self.client)
        say(f"{client} took nothing of its answers for {self.application.send_timeout_s:g} s: connection dropped")
        self._disconnect()
        self.transport.abort()

    def _disconnect(self) -> None:
        """Tell what runs on the usual way. uvicorn tells the last request that came, which may not be it."""
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _has_enough(self) -> bool:
        """Whether nothing more is to be read before something is answered."""
        return self._refusal is not None or sum(_size(cycle) for cycle, _ in self.pipeline) > _MAX_AHEAD_BYTES

    def _is_answering(self) -> bool:
        """Whether a request that came whole, before the one at hand, is still to be answered."""
        unanswered = (one for one in (self._call, self._running) if one is not None and not one.response_complete)
        at_hand = self._at_hand()
        return any(one is not at_hand for one in unanswered) or any(cycle is not at_hand for cycle, _ in self.pipeline)

    def _at_hand(self) -> Call | RequestResponseCycle | None:
        """The request whose head has come and whose body has not."""
        return None if self._between or self._in_head else self._receiving or self.cycle

    def _has_more(self) -> bool:
        """Whether the client may still send what belongs to a request, or to what was taken for none."""
        return self._is_lost or not self._between

    def shutdown(self) -> None:
        if self._lingering.lingers:
            self._lingering.close_now()
            return
        super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._lingering.lingers:
            self._lingering.note_more()
            return
        if self._refusal is not None:
            return
        # The parser ends a request with an upgrade at its head, and uvicorn then drops the body.
        if self._between:
            data = without_upgrade(data)
        self._completed, self._body_came, self._chunk_bytes = False, False, len(data)
        super().data_received(data)
        if self._between and not self._completed and self._waiting_since is None and not self._is_answering():
            # What begins no request, an empty line say, has ended uvicorn's own waiting.
            self._waiting_since = self.loop.time()
        if not (self._in_head or self._between or self._body_came or self._completed):
            # A chunk's first line, or what follows the last chunk: of that too the parser keeps what is not complete.
            self._trailer_bytes += len(data)
            if self._trailer_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(_too_large())
        # The parser keeps what is not complete yet to itself, however long it grows. Of a chunk that ends a request and
        # begins another nobody says how much is the other's: that part is not counted.
        if self._in_head and not self._completed:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(_too_large())

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, in the form of all our errors."""
        self._refuse(self._stopped or InputError("this is no HTTP request that can be understood"))

    def _stop_parsing(self, error: InputError) -> None:
        """Leave what else was read; call from the parser."""
        self._stopped = error
        raise RuntimeError(error.message)

    def _refuse(self, error: DlopsError) -> None:
        """Answer what no request was made of, and end the connection; both once the requests before it are answered,
        as the client would take it for the answer to one of those."""
        if self._is_answering():
            if self.pipeline and self.pipeline[0][0] is self._at_hand():
                self.pipeline.popleft()
            self._refusal = error
            self.flow.pause_reading()
            return
        response = error_response(error)
        now_ns = time.perf_counter_ns()
        self.application.accounts.count("other", "-", response.status_code, None, now_ns, failed=True, caller=Caller())
        self._is_lost = True
        self.answer(response.status_code, header_lines(response), [bytes(response.body)], keep_alive=False)

    def on_message_begin(self) -> None:
        self._between = False
        self._receiving = None
        self._in_head, self._head_bytes, self._trailer_bytes = True, 0, 0
        self._waiting_since = self.loop.time()
        if self._waited_for.pop(self, self) is None:
            self._waited_for[self] = None
        super().on_message_begin()
        self.scope[IS_LAST] = self.is_last  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        # What came in one piece was not counted above.
        if self._chunk_bytes > _MAX_HEAD_BYTES and self._head_size() > _MAX_HEAD_BYTES:
            self._stop_parsing(_too_large())
        if self.parser.should_upgrade():
            # In other words than `without_upgrade` looks for; the parser would end the request at its head.
            self._stop_parsing(InputError("HTTP/1.1 is spoken here alone: send no Upgrade, and no CONNECT"))
        call = self._usual_inference()
        if call is None:
            # Which may not understand the address: until then the request at hand is none of its own.
            super().on_headers_complete()
            self._in_head = False
            if len(self.pipeline) > _MAX_AHEAD:
                self._stop_parsing(InputError(f"more than {_MAX_AHEAD} requests on one connection wait"))
            # What waits stops uvicorn's reading, and with it what would tell that the client has left.
            self.flow.resume_reading()
            return
        self._in_head = False
        self._receiving = self._call = call
        # From here on uvicorn treats it as one of its own: what is pipelined behind it waits, shutting down too.
        self.cycle = call  # type: ignore[assignment]
        call.admit()

    def _head_size(self) -> int:
        """Of address and headers, without what stands between them."""
        return len(self.url) + sum([len(name) + len(value) for name, value in self.headers])

    def is_last(self) -> bool:
        """Whether no request waits behind the one that is being answered."""
        return not self.pipeline

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
            return
        # Behind a body in chunks: nobody asked for any, and they must not pass for headers.
        self._trailer_bytes += len(name) + len(value)
        if self._trailer_bytes > _MAX_HEAD_BYTES:
            self._stop_parsing(_too_large())

    def on_body(self, body: bytes) -> None:
        self._body_came = True
        if self._receiving is None:
            super().on_body(body)
        else:
            self._receiving.receive(body)

    def on_message_complete(self) -> None:
        self._waiting_since, self._completed, self._between = None, True, True
        self._waited_for.pop(self, None)
        if self._receiving is None:
            super().on_message_complete()
        else:
            self._receiving.run()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self._is_answering():
            self._waited_for.setdefault(self)
        # One that waited has become the one under way.
        self.flow.resume_reading()
        if self._refusal is not None and not self._is_answering() and not self.transport.is_closing():
            self._refuse(self._refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._waited_for.pop(self, None)
        self._disconnect()
        super().connection_lost(exc)
        self._ending.pop(self, None)
        # They hold the connection as it holds them, and their bodies.
        self.pipeline.clear()
        # Not uvicorn's `cycle`: that is of what came last, which may wait behind this.
        if self._call is not None and not self._call.response_complete:
            self._call.abandon()

    def _usual_inference(self) -> Call | None:
        """The request at hand, where its kind is ours and nothing else is under way on this connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        model = self.application.models.paths.get(self.url)
        # A client that does not read its answers is waited for on the usual way.
        if model is None or self.flow.write_paused or self.parser.get_method() != b"POST":
            return None
        length = json_bytes = deadline_ms = authorization = identity = parent = None
        is_timed = False
        for name, value in self.headers:
            if name == b"content-length":
                length = value
            elif name == b"inference-header-content-length":
                if json_bytes is not None:
                    return None  # of two the usual way takes the first, and so do we
                json_bytes = value
            elif name == b"x-request-timeout-ms":
                if deadline_ms is not None:
                    return None
                deadline_ms = value
            elif name == b"authorization":
                if authorization is not None:
                    return None
                authorization = value
            elif name == _REQUEST_ID:
                identity = value
            elif name == _PARENT:
                parent = value
            elif name == _TIMING:
                is_timed = True
            elif name in _UNUSUAL or (name == b"accept-encoding" and value.strip() != b"identity"):
                return None
        # A long header is read in a thread, the usual way.
        if length is None or json_bytes is None or len(json_bytes) > _JSON_DIGITS:
            return None
        keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() == "1.1"
        call = Call(self, model, length=length, json_bytes=json_bytes, deadline_ms=deadline_ms, keep_alive=keep_alive)
        call.authorization, call.identity, call.parent, call.is_timed = authorization, identity, parent, is_timed
        return call

    def answer(self, status: int, headers: bytes, body: list[bytes], *, keep_alive: bool) -> None:
        """Write an answer. headers: each with its line's end."""
        size = sum([len(part) for part in body])
        head = b"".join(
            (
                STATUS_LINE[status], self._default_headers(), headers, _SECURITY, b"content-length: %d" % size,
                b"\r\n\r\n" if keep_alive else b"\r\nconnection: close\r\n\r\n",
            )
        )  # fmt: skip
        if size < _LARGE_BYTES:
            self.transport.write(b"".join((head, *body)))
        else:
            self.transport.writelines((head, *body))
        if not keep_alive:
            self.transport.close()

    def _default_headers(self) -> bytes:
        """uvicorn's, which has a new list of them every second."""
        current = self.server_state.default_headers
        cached, text = Door._date
        if cached is not current:
            text = b"".join([b"%s: %s\r\n" % header for header in current])
            Door._date = (current, text)
        return text


class _Reading(FlowControl):
    """uvicorn's, which reads on whenever one of several requests in a row asks it to. has_enough: whether not to."""

    def __init__(self, transport: asyncio.Transport, has_enough: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_enough = has_enough

    def resume_reading(self) -> None:
        if self.read_paused and not self._has_enough():
            super().resume_reading()


def _size(cycle: RequestResponseCycle) -> int:
    """Of a request that waits: its headers and what has come of its body."""
    return len(cycle.body) + sum([len(name) + len(value) for name, value in cycle.scope["headers"]])


def _too_large() -> HeadTooLargeError:
    return HeadTooLargeError(f"address and headers are larger than {_MAX_HEAD_BYTES} bytes")


def _too_slow() -> ReceiveTimeoutError:
    return ReceiveTimeoutError("the request did not come whole in time", field="body")


def _is_ours(record: logging.LogRecord) -> bool:
    return record.getMessage() not in _CLIENTS_AFFAIR


def install(application: Application) -> bool:
    """Let uvicorn make its connections of this kind in this process; call before its server begins. Whether it does.

    A uvicorn that looks elsewhere serves all the same, the usual way; that is said, as it is several times slower.
    """
    Door.application = application
    logging.getLogger("uvicorn.error").addFilter(_is_ours)
    kinds = getattr(uvicorn.config, "HTTP_PROTOCOLS", None)
    if not isinstance(kinds, dict) or "auto" not in kinds:
        say(f"uvicorn {uvicorn.__version__}: no place to put connections of our own; binary inference will be slower")
        return False
    kinds["auto"] = f"{__name__}:{Door.__name__}"
    return True
