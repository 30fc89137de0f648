"""Ports that are kept for a server that is about to begin."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from dlops.errors import MachineError
from dlops.serve.launch import ServerProcess
from dlops.serve.ports import keep_port, usable_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system gives a kept port to nobody")

# BentoML up to where its arbiter would open the ports on which it is told things.
BEGINNING = """
import socket, sys
import bentoml._internal.utils.circus as circus
from bentoml_cli.cli import cli

def begin(arbiter, cb=None):
    for endpoint in (arbiter.endpoint, arbiter.pubsub_endpoint):
        with socket.socket() as other:
            try:
                other.bind(("127.0.0.1", int(endpoint.rpartition(":")[2])))
                print("free")
            except OSError:
                print("kept")
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(("127.0.0.1", int(endpoint.rpartition(":")[2])))
            own.listen(1)
    sys.exit(0)

circus.Arbiter.start = begin
sys.argv = ["bentoml", "serve", "dlops.serve.service:Service", "--port", sys.argv[1]]
cli()
"""


def can_bind(port: int) -> bool:
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT], ids=["alone", "shared"])
def test_a_kept_port_is_given_to_nobody_and_opened_by_its_server(option: int) -> None:
    port = usable_port("127.0.0.1", 0)
    keeper = keep_port("127.0.0.1", port)
    assert not can_bind(port)
    assert usable_port("127.0.0.1", port) == port
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind(("127.0.0.1", port))
        server.listen(1)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
    keeper.close()


def test_a_port_that_was_taken_since_it_was_looked_for_is_said() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        port = server.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port} on 127.0.0.1 is in use .*--grpc-port"):
            keep_port("127.0.0.1", port, option="--grpc-port")


def test_the_ports_of_the_arbiter_are_kept_until_it_opens_them(digits_artifact) -> None:
    command = [sys.executable, "-c", BEGINNING, str(usable_port("127.0.0.1", 0))]
    env = os.environ | {"DLOPS_ARTIFACT": str(digits_artifact.directory), "BENTOML_DO_NOT_TRACK": "True"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.split() == ["kept", "kept"], ended.stderr


def test_the_ports_of_a_server_are_kept_while_it_starts_and_given_up_with_it(digits_artifact, monkeypatch) -> None:
    kept = []
    monkeypatch.setattr(
        ServerProcess,
        "_wait_until_ready",
        lambda server, *_: kept.extend(not can_bind(port) for port in (server.port, server.grpc_port)),
    )
    server = ServerProcess(digits_artifact, grpc_port=0)
    with server:
        pass
    assert kept == [True, True]
    assert can_bind(server.port)
    assert can_bind(server.grpc_port)
