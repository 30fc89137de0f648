"""Clients that do not read their answers: they hold neither memory nor the server's end up for ever."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import uvloop

from dlops.artifact import Artifact
from dlops.serve.model import ServedModel
from dlops.serve.outgoing import Outgoing
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from tests.serve.held import HeldSession
from tests.serve.test_door import images, listening, request_of, within

USUAL = b"GET /docs.json HTTP/1.1\r\nHost: x\r\n\r\n" * 60
BINARY = request_of(np.tile(images(1), (64, 1, 1, 1))) * 200
SEND_TIMEOUT_S = 1.0
# Much longer than either needs, however slow the machine is: without a limit they would last for ever.
SOON_S = 60.0
# Of a client that reads slowly: a machine that stands still for a moment must not make it one that reads nothing.
PATIENCE_S, PAUSE_S = 4.0, 0.4


@pytest.fixture
def app(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    return Application(Settings(send_timeout_s=getattr(request, "param", SEND_TIMEOUT_S)))


@pytest.fixture
def model(app: Application, digits_artifact: Artifact) -> Iterator[ServedModel]:
    session = HeldSession(digits_artifact.signature)
    session.gate.set()
    model = ServedModel(digits_artifact, [session], Settings(), app.metrics)
    yield model
    assert model.queue.close(timeout_s=10)


@contextmanager
def asking(port: int, requests: bytes, *, encrypted: bool = False) -> Iterator[socket.socket]:
    """A connection that has sent requests and has read nothing."""
    # An answer soon is more than both kernels take.
    with encrypted_as(encrypted, port, receive_buffer=4096) as connection:
        sender = threading.Thread(target=_send, args=(connection, requests))
        sender.start()
        try:
            yield connection
        finally:
            connection.close()
            sender.join(10)


@contextmanager
def encrypted_as(encrypted: bool, port: int, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection of either kind."""
    with socket.socket() as plain:
        if receive_buffer is not None:  # before it connects
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        plain.settimeout(10)
        plain.connect(("127.0.0.1", port))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(plain) if encrypted else plain as connection:
            yield connection


def _send(connection: socket.socket, requests: bytes) -> None:
    with suppress(OSError):  # the server reads no more of one that takes nothing
        connection.sendall(requests)


def dropped(app: Application) -> int:
    return sum(value for (value,) in app.metrics.unread.summed(app.metrics.cells.workers()).values())


@pytest.mark.parametrize("requests", [USUAL, BINARY], ids=["usual", "binary"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_takes_nothing_is_dropped_and_the_server_ends(
    app, model, certificate, capsys, caplog, loop: str, encrypted: bool, requests: bytes
) -> None:
    config: dict[str, Any] = {"loop": loop} | (certificate if encrypted else {})
    with ExitStack() as clients:
        with listening(app, model, send_buffer=4096, **config) as port:
            clients.enter_context(asking(port, requests, encrypted=encrypted))
            assert within(SOON_S, lambda: dropped(app))
            second = clients.enter_context(asking(port, requests, encrypted=encrypted))
            # However late the server comes to answer: of one that it has not begun with there is nothing to drop.
            assert select.select([second], [], [], SOON_S)[0]
            time.sleep(0.3)
            app.drain()
            began = time.monotonic()
        assert time.monotonic() - began < SOON_S
    assert dropped(app) == 2
    assert capsys.readouterr().err.count(" took nothing of its answers for 1 s: connection dropped\n") == 2
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert app.bodies.pending_bytes == 0


@pytest.mark.parametrize("app", [PATIENCE_S], indirect=True)
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_who_reads_slowly_gets_all_of_it(app, model, certificate, encrypted: bool) -> None:
    request = b"GET /docs.json HTTP/1.1\r\nHost: x\r\n\r\n"
    secure = certificate if encrypted else {}
    with (
        listening(app, model, send_buffer=4096, **secure) as port,
        encrypted_as(encrypted, port, receive_buffer=4096) as connection,
    ):
        connection.settimeout(SOON_S)
        # Here and not in a thread: what is encrypted may not be written and read at once.
        connection.sendall(request * 4)
        began, received = time.monotonic(), b""
        while received.count(b"HTTP/1.1 200 OK") < 4 or not received.endswith(b"}"):
            received += connection.recv(4096)
            time.sleep(PAUSE_S)
        assert time.monotonic() - began > PATIENCE_S
    assert dropped(app) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what has been acknowledged")
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_what_the_kernel_alone_knows_of_is_taken_too(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        made: asyncio.Future[asyncio.Transport] = loop.create_future()

        class Sender(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport)  # type: ignore[arg-type]

        with socket.socket() as listener, socket.socket() as client:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            listener.bind(("127.0.0.1", 0))
            server = await loop.create_server(Sender, sock=listener)
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            transport = await made
            transport.write(b"x" * 4_000_000)
            await asyncio.sleep(0.3)
            outgoing, size = Outgoing(transport), transport.get_write_buffer_size()
            assert outgoing.stalled_s(0.0) == 0
            assert outgoing.stalled_s(1.0) == 1
            for _ in range(8):
                await loop.sock_recv(client, 1024)
            await asyncio.sleep(0.3)
            assert outgoing.stalled_s(2.0) == 0
            assert transport.get_write_buffer_size() == size > 0
            transport.abort()
            server.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(scenario())
