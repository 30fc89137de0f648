"""One inference over the binary protocol that takes part in no conversation of ASGI: from its head to its answer."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from dlops.errors import DlopsError
from dlops.serve.accounts import Caller
from dlops.serve.answers import deadline_ns, header_lines, json_length, server_timing
from dlops.serve.guard import REQUEST_ID, request_id
from dlops.serve.outcome import Answer
from dlops.serve.protocol import InferRequest
from dlops.serve.routes import INFER
from dlops.serve.ticket import Ticket
from dlops.signature import Feed

if TYPE_CHECKING:
    from dlops.serve.codec import Plan
    from dlops.serve.door import Door
    from dlops.serve.model import ServedModel

_REQUEST_ID = REQUEST_ID.encode()


class Call:
    """One inference, in the place of uvicorn's RequestResponseCycle.

    Of that it has what the protocol reads: `response_complete`, `keep_alive`, `disconnected` and `message_event`.
    """

    def __init__(
        self, door: Door, model: ServedModel, *, length: bytes, json_bytes: bytes, deadline_ms: bytes | None,
        keep_alive: bool,
    ) -> None:  # fmt: skip
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = keep_alive
        self.authorization: bytes | None = None
        self.identity: bytes | None = None
        self.parent: bytes | None = None
        self.is_timed = False
        self._door = door
        self._model = model
        self._length = length
        self._json_bytes = json_bytes
        self._deadline_ms = deadline_ms
        model.hold()
        self._started_ns = time.perf_counter_ns()
        self._chunks: list[bytes] = []
        self._held = 0
        self._received_ns, self._decode_ns = self._started_ns, 0
        self._wanted: InferRequest | None = None
        self._plan: Plan | None = None
        self._ticket: Ticket | None = None
        self._making: asyncio.Future[Feed] | None = None

    @property
    def message_event(self) -> Call:
        return self

    def set(self) -> None:
        """As an event's: nobody waits on a call."""

    def admit(self) -> None:
        """Answer at once where the request cannot be taken, before its body is read."""
        application = self._door.application
        try:
            application.guard.check(_text(self.authorization))
            application.bodies.announced(self._length.decode("latin-1"))
            application.check_room(self._model, deadline_ns=self._deadline_ns(None))
        except Exception as error:  # noqa: BLE001 - what is no error of the client's is the log's, as in the routes
            self._fail(error)

    def receive(self, body: bytes) -> None:
        """A part of the body; what comes after the answer is left unread."""
        if self.response_complete:
            return
        try:
            self._held += self._door.application.bodies.hold(len(body))
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(error)
            return
        self._chunks.append(body)

    def run(self) -> None:
        """The body is whole: into the queue with it."""
        if self.response_complete:
            return
        self._received_ns = time.perf_counter_ns()
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks = []
        model = self._model
        try:
            wanted, self._plan = model.codec.decode(body, json_bytes=json_length(self._json_bytes.decode("latin-1")))
            deadline_ns = self._deadline_ns(wanted.timeout_us)
            self._wanted = wanted
            if wanted.raws:
                made = asyncio.ensure_future(model.preprocessed(wanted.raws, deadline_ns=deadline_ns))
                self._making = made
                made.add_done_callback(lambda _: self._made(made, deadline_ns))
                return
            self._put(wanted.feed, deadline_ns)
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(error)

    def _made(self, made: asyncio.Future[Feed], deadline_ns: int | None) -> None:
        """The raw rows have become tensors, or could not."""
        self._making = None
        # Asked for in any case, or asyncio would report it as one that nobody saw.
        failure = None if made.cancelled() else made.exception()
        if self.response_complete or made.cancelled():
            return
        try:
            if failure is not None:
                raise failure
            self._put(made.result(), deadline_ns)
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(error)

    def _put(self, feed: Feed, deadline_ns: int | None) -> None:
        assert self._wanted is not None
        self._decode_ns = time.perf_counter_ns() - self._received_ns
        self._ticket = self._model.queue.put(
            feed, rows=self._wanted.rows, deadline_ns=deadline_ns, deliver=self._deliver
        )

    def give_up(self, error: DlopsError) -> None:
        """The body has not come, and is not waited for."""
        self.keep_alive = False
        self._fail(error)

    def abandon(self) -> None:
        """The client has gone: what has not run is not run."""
        if self._ticket is not None:
            self._ticket.cancel()
        if self._making is not None:
            self._making.cancel()
        self._end(499)

    def _deliver(self, result: Answer | Exception) -> None:
        if self.response_complete:
            return
        if isinstance(result, Exception):
            self._fail(result)
            return
        assert self._wanted is not None
        wanted, plan, model = self._wanted, self._plan, self._model
        try:
            head, body = model.codec.encode(result.outputs, wanted, plan)
        except Exception as error:  # noqa: BLE001 - likewise
            self._fail(error)
            return
        times = self._door.application.accounts.answered(
            model, INFER, self._started_ns, result, rows=wanted.rows, received_ns=self._received_ns,
            decode_ns=self._decode_ns, caller=self._caller(),
        )  # fmt: skip
        if self.is_timed:
            head += b"server-timing: %s\r\n" % server_timing(times).encode()
        self._write(200, head, body)

    def _deadline_ns(self, timeout_us: int | None) -> int | None:
        if self._deadline_ms is None and timeout_us is None:
            return None
        return deadline_ns(self._started_ns, header=_text(self._deadline_ms), timeout_us=timeout_us)

    def _fail(self, error: Exception) -> None:
        response = self._door.application.failed(error, where=f"POST {INFER}", caller=self._caller())
        self._write(response.status_code, header_lines(response), [bytes(response.body)])

    def _caller(self) -> Caller:
        return Caller(identity=_text(self.identity), parent=_text(self.parent))

    def _write(self, status: int, headers: bytes, body: list[bytes]) -> None:
        door = self._door
        if self.identity is not None and (identity := request_id(_text(self.identity))) is not None:
            headers += b"%s: %s\r\n" % (_REQUEST_ID, identity.encode())
        if not door.transport.is_closing():
            # What waits behind it was accepted: the last one's answer ends the connection.
            keep_alive = self.keep_alive and not (door.application.draining and door.is_last())
            door.answer(status, headers, body, keep_alive=keep_alive)
        self._end(status)
        door.on_response_complete()

    def _end(self, status: int) -> None:
        self.response_complete = True
        self._model.release()
        self._chunks = []
        # The ticket holds this call by its `deliver`, and the request its body: let go of both now, and not when the
        # garbage collector next comes by.
        self._ticket = self._wanted = self._plan = None
        application = self._door.application
        application.bodies.release(self._held)
        self._held = 0
        application.accounts.count(
            INFER, "POST", status, self._model, self._started_ns, failed=status >= 400, caller=self._caller()
        )


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")
