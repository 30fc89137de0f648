"""Connections that are to be encrypted: they count and are timed from their first moment, and end without loss."""

from __future__ import annotations

import gc
import logging
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlops.artifact import Artifact
from dlops.serve import lingering, outgoing
from dlops.serve.door import Door
from dlops.serve.handshake import Handshake
from dlops.serve.model import ServedModel
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from tests.serve.held import HeldSession
from tests.serve.test_door import listening, within
from tests.serve.test_outgoing import encrypted_as

SOON_S = 60.0
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def app(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    return Application(Settings(**getattr(request, "param", {})))


@pytest.fixture
def model(app: Application, digits_artifact: Artifact) -> Iterator[ServedModel]:
    session = HeldSession(digits_artifact.signature)
    session.gate.set()
    model = ServedModel(digits_artifact, [session], Settings(), app.metrics)
    yield model
    assert model.queue.close(timeout_s=10)


@pytest.fixture(params=["asyncio", "uvloop"])
def config(request: pytest.FixtureRequest, certificate: dict[str, Path]) -> dict[str, Any]:
    return {"loop": request.param} | certificate


def connections() -> list[object]:
    return list(getattr(Door._of, "connections", ()))


def all_of(connection: socket.socket) -> bytes:
    received = b""
    while more := connection.recv(65536):
        received += more
    return received


def is_live(port: int) -> bool:
    with encrypted_as(True, port) as connection:
        connection.settimeout(SOON_S)
        connection.sendall(LIVE)
        return connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("app", [{"receive_timeout_s": 0.5}], indirect=True)
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02"], ids=["nothing", "a part"])
def test_who_does_not_finish_it_is_left(app, model, config, caplog, sent: bytes) -> None:
    with listening(app, model, **config) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        silent.settimeout(SOON_S)
        silent.sendall(sent)
        assert ended(silent)
        assert within(SOON_S, lambda: not connections())
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("app", [{"receive_timeout_s": 1000.0}], indirect=True)
@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(1000)], ids=["plain", "junk"])
def test_what_is_no_handshake_ends_the_connection(app, model, config, caplog, sent: bytes) -> None:
    with listening(app, model, **config) as port:
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.settimeout(SOON_S)
            other.sendall(sent)
            assert ended(other)
        assert is_live(port)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("app", [{"receive_timeout_s": 1000.0, "max_connections": 2}], indirect=True)
def test_who_has_not_finished_it_gives_way(app, model, config) -> None:
    with listening(app, model, **config) as port:
        first, second = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        with first, second:
            assert within(SOON_S, lambda: len(connections()) == 2)
            assert all(isinstance(one, Handshake) for one in connections())
            assert is_live(port)
            first.settimeout(SOON_S)
            assert ended(first)
            assert crowded(app) == 1


@pytest.mark.parametrize("app", [{"receive_timeout_s": 1000.0}], indirect=True)
def test_it_does_not_hold_up_the_servers_end(app, model, config) -> None:
    with socket.socket() as silent:
        with listening(app, model, **config) as port:
            silent.connect(("127.0.0.1", port))
            assert within(SOON_S, connections)
        # `listening` has waited for the end.
        silent.settimeout(SOON_S)
        assert ended(silent)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process' descriptors in /proc")
@pytest.mark.parametrize("app", [{"receive_timeout_s": 1000.0, "max_connections": 4}], indirect=True)
def test_no_descriptor_is_kept(app, model, config) -> None:
    with listening(app, model, **config) as port:
        assert is_live(port)
        before = descriptors()
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        assert within(SOON_S, lambda: crowded(app) == 96)
        for client in clients:
            client.close()
        assert within(SOON_S, lambda: not connections() and descriptors() <= before)


@pytest.mark.parametrize("app", [{"receive_timeout_s": 1000.0, "send_timeout_s": 1000.0}], indirect=True)
def test_a_client_need_not_say_that_it_has_seen_the_end(app, model, config, monkeypatch) -> None:
    monkeypatch.setattr(lingering, "_FAREWELL_S", 0.2)
    with listening(app, model, **config) as port, encrypted_as(True, port) as connection:
        connection.settimeout(SOON_S)
        connection.sendall(LIVE)
        assert all_of(connection).startswith(b"HTTP/1.1 200 ")
        assert within(SOON_S, lambda: not connections())


@pytest.mark.parametrize("app", [{"max_connections": 1}], indirect=True)
def test_who_does_not_say_so_keeps_nobody_out(app, model, config, monkeypatch) -> None:
    monkeypatch.setattr(lingering, "_FAREWELL_S", 1000.0)
    with listening(app, model, **config) as port, encrypted_as(True, port) as connection:
        connection.settimeout(SOON_S)
        connection.sendall(LIVE)
        assert all_of(connection).startswith(b"HTTP/1.1 200 ")
        assert len(connections()) == 1
        assert is_live(port)
        assert crowded(app) == 1


@pytest.mark.parametrize("platform", ["linux", "one that does not tell what has been acknowledged"])
def test_a_client_may_take_its_time_for_the_last_answer(app, model, config, monkeypatch, platform: str) -> None:
    if platform == "linux" != sys.platform:
        pytest.skip("only Linux tells what has been acknowledged")
    monkeypatch.setattr(outgoing, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(lingering, "_FAREWELL_S", 0.6)
    with (
        listening(app, model, send_buffer=4096, **config) as port,
        encrypted_as(True, port, receive_buffer=4096) as connection,
    ):
        connection.settimeout(SOON_S)
        connection.sendall(b"GET /docs.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        began = time.monotonic()
        while more := connection.recv(4096):
            received += more
            time.sleep(0.3)
        assert time.monotonic() - began > 1.2
    head, _, body = received.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head


def ended(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return True


def crowded(app: Application) -> int:
    return sum(value for (value,) in app.metrics.crowded.summed(app.metrics.cells.workers()).values())


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
