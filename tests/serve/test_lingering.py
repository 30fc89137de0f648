"""A client that is refused while it still sends reads why, instead of that its connection was reset."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from dlops.artifact import Artifact
from dlops.serve import lingering
from dlops.serve.door import Door
from dlops.serve.lingering import LingeringTransport
from dlops.serve.model import ServedModel
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from tests.serve.held import HeldSession
from tests.serve.test_door import listening, within
from tests.serve.test_outgoing import encrypted_as

# Far more than what it is refused for, and than both kernels keep.
MANY = 32 * 1024 * 1024
SOON_S = 60.0
BINARY = (
    "POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: 188\r\n"
    f"Content-Length: {MANY}\r\n\r\n"
)
USUAL = (
    "POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: image/png\r\n"
    f"Content-Length: {MANY}\r\n\r\n"
)
NONE = "this is no request\r\n\r\n"
HEAD = "GET / HTTP/1.1\r\nHost: x\r\nX: "


@pytest.fixture
def app(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    return Application(Settings(max_body_bytes=100_000, **getattr(request, "param", {})))


@pytest.fixture
def model(app: Application, digits_artifact: Artifact) -> Iterator[ServedModel]:
    session = HeldSession(digits_artifact.signature)
    session.gate.set()
    model = ServedModel(digits_artifact, [session], Settings(), app.metrics)
    yield model
    assert model.queue.close(timeout_s=10)


def connections() -> list[Door]:
    return [door for door in list(getattr(Door._swept, "connections", ())) if isinstance(door, Door)]


def lingers() -> bool:
    return any(door._lingering.lingers for door in connections())


def all_of(connection: socket.socket) -> bytes:
    received = b""
    while more := connection.recv(65536):
        received += more
    return received


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize(
    ("begins", "status"),
    [(USUAL, 413), (NONE, 400), (HEAD, 431)],
    ids=["usual", "none", "head"],
)
def test_who_sends_on_after_a_refusal_gets_to_read_it(
    app, model, certificate, loop: str, encrypted: bool, begins: str, status: int
) -> None:
    config = {"loop": loop} | (certificate if encrypted else {})
    with listening(app, model, **config) as port, encrypted_as(encrypted, port) as connection:
        connection.sendall(begins.encode())
        for _ in range(MANY // 2**20):
            connection.sendall(b"x" * 2**20)
        received = connection.recv(65536) if encrypted else all_of(connection)
    assert received.startswith(b"HTTP/1.1 %d " % status), received[:200]
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in received.lower()


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_who_keeps_to_the_length_that_was_too_much_may_ask_again(app, model, certificate, encrypted: bool) -> None:
    config = certificate if encrypted else {}
    with listening(app, model, **config) as port, encrypted_as(encrypted, port) as connection:
        connection.sendall(BINARY.encode())
        for _ in range(MANY // 2**20):
            connection.sendall(b"x" * 2**20)
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        statuses = re.findall(rb"HTTP/1.1 (\d+) ", all_of(connection))
    assert statuses == [b"413", b"200"]


@pytest.mark.parametrize("limit", ["_IDLE_S", "_LONGEST_S"])
def test_it_is_waited_for_neither_in_silence_nor_for_ever(app, model, monkeypatch, limit: str) -> None:
    monkeypatch.setattr(lingering, "_IDLE_S", 1000.0)
    monkeypatch.setattr(lingering, "_LONGEST_S", 1000.0)
    monkeypatch.setattr(lingering, limit, 0.2)
    with listening(app, model) as port, socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as connection:
        connection.sendall(USUAL.encode())
        assert within(SOON_S, lambda: connections() and lingers())
        deadline = time.monotonic() + SOON_S
        while connections() and time.monotonic() < deadline:
            if limit == "_LONGEST_S":
                try:
                    connection.sendall(b"x")
                except OSError:
                    break
            time.sleep(0.02)
        assert within(SOON_S, lambda: not connections())


def test_what_comes_keeps_it(app, model, monkeypatch) -> None:
    monkeypatch.setattr(lingering, "_IDLE_S", 2.0)
    with listening(app, model) as port, socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as connection:
        connection.sendall(USUAL.encode())
        assert within(SOON_S, lingers)
        (door,) = connections()
        before = door._lingering._last

        def is_kept() -> bool:
            connection.sendall(b"x")  # each time: the loop's clock counts in milliseconds, and one may not be over
            return door._lingering._last > before

        assert within(SOON_S, is_kept)


def test_a_client_that_has_left_meanwhile_ends_it() -> None:
    class Left(asyncio.Transport):
        said: ClassVar[list[str]] = []

        def is_closing(self) -> bool:
            return "abort" in self.said

        def resume_reading(self) -> None:
            pass

        def can_write_eof(self) -> bool:
            return True

        def write_eof(self) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

        def abort(self) -> None:
            self.said.append("abort")

    loop = asyncio.new_event_loop()
    try:
        transport = LingeringTransport(Left(), lambda: True, lambda: Left.said.append("ends"), loop=loop)
        transport.close()
        transport.close()
    finally:
        loop.close()
    assert Left.said == ["ends", "abort"]


@pytest.mark.parametrize("app", [{"receive_timeout_s": 0.5}], indirect=True)
def test_what_is_wrong_with_one_connection_leaves_the_others_watched(app, model, capsys) -> None:
    class Wrong:
        def stalled_s(self, now: float) -> float:
            raise ValueError("negative file descriptor")

    with listening(app, model) as port, socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as first:
        assert within(SOON_S, connections)
        (door,) = connections()
        door._waiting_since, door._outgoing = None, Wrong()
        assert first.recv(1) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as second:
            assert second.recv(1) == b""
    assert capsys.readouterr().err.count("a connection is dropped: ValueError: negative file descriptor\n") == 1


@pytest.mark.parametrize("app", [{"max_connections": 1}], indirect=True)
def test_it_gives_way_to_who_asks_for_something(app, model, monkeypatch) -> None:
    monkeypatch.setattr(lingering, "_IDLE_S", 1000.0)
    monkeypatch.setattr(lingering, "_LONGEST_S", 1000.0)
    with listening(app, model) as port, socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as first:
        first.sendall(USUAL.encode())
        assert within(SOON_S, lingers)
        with socket.create_connection(("127.0.0.1", port), timeout=SOON_S) as second:
            second.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert all_of(second).startswith(b"HTTP/1.1 200 ")
        assert within(SOON_S, lambda: not connections())


def test_it_does_not_hold_up_the_servers_end(app, model, monkeypatch) -> None:
    monkeypatch.setattr(lingering, "_IDLE_S", 1000.0)
    monkeypatch.setattr(lingering, "_LONGEST_S", 1000.0)
    with socket.socket() as connection:
        with listening(app, model) as port:
            connection.connect(("127.0.0.1", port))
            connection.sendall(USUAL.encode())
            assert within(SOON_S, lingers)
        # `listening` has waited for the end.
        connection.settimeout(SOON_S)
        assert all_of(connection).startswith(b"HTTP/1.1 413 ")
