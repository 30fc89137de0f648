"""The binary protocol on the connection itself: the same answers as on the usual way, in order, and within limits."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import uvicorn

from dlops.artifact import Artifact
from dlops.serve.door import Door, install
from dlops.serve.guard import GuardMiddleware
from dlops.serve.handshake import count_handshakes
from dlops.serve.launch import ServerProcess
from dlops.serve.model import ServedModel
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from dlops.serve.ticket import Ticket
from dlops.serve.upgrade import without_upgrade
from tests.serve.held import HeldSession

ADDRESS = "/v2/models/digits/infer"


@contextmanager
def listening(app: Application, model: ServedModel, *, send_buffer: int | None = None, **config: Any) -> Iterator[int]:
    """The port of a server in a thread of this process, whose connections are doors. config: uvicorn's, besides."""
    app.models.replace([model])
    Door.application = app
    guarded = GuardMiddleware(app.asgi, app.guard, app.refuse)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if send_buffer is not None:
            # Its connections have it too.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        server = uvicorn.Server(uvicorn.Config(guarded, http=Door, lifespan="off", log_config=None, **config))
        thread = threading.Thread(target=_run, args=[server, listener])
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(server, listener))


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    count_handshakes(asyncio.get_running_loop(), timeout_s=Door.application.receive_timeout_s)
    await server.serve(sockets=[listener])


@pytest.fixture
def session(digits_artifact: Artifact) -> HeldSession:
    session = HeldSession(digits_artifact.signature)
    session.gate.set()
    return session


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Application:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    return Application(Settings(max_queue_rows=2, max_body_bytes=100_000, max_pending_bytes=120_000))


@pytest.fixture(params=[False, True], ids=["thread", "event loop"])
def port(request: pytest.FixtureRequest, app, session, digits_artifact) -> Iterator[int]:
    settings = Settings(max_queue_rows=2)
    model = ServedModel(digits_artifact, [session], settings, app.metrics, inline=request.param)
    with listening(app, model) as number:
        yield number
    session.gate.set()
    assert model.queue.close(timeout_s=10)


@pytest.fixture
def threaded_port(app, session, digits_artifact) -> Iterator[int]:
    model = ServedModel(digits_artifact, [session], Settings(max_queue_rows=2), app.metrics)
    with listening(app, model) as number:
        yield number
        session.gate.set()
    assert model.queue.close(timeout_s=10)


def body_of(pixels: np.ndarray, **more: object) -> tuple[bytes, int]:
    """A request's body and the length of its JSON."""
    tensor = {
        "name": "image", "datatype": "FP32", "shape": list(pixels.shape),
        "parameters": {"binary_data_size": pixels.nbytes},
    }  # fmt: skip
    wanted = [{"name": "logits", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": wanted} | more).encode()
    return head + pixels.tobytes(), len(head)


def request_of(pixels: np.ndarray, *, headers: str = "", path: str = ADDRESS, version: str = "1.1", **more) -> bytes:
    body, length = body_of(pixels, **more)
    head = (
        f"POST {path} HTTP/{version}\r\nHost: x\r\n{headers}Inference-Header-Content-Length: {length}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def images(*values: float) -> np.ndarray:
    return np.repeat(np.array(values, np.float32), 64).reshape(-1, 1, 8, 8)


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    """By names in lower case."""


class Client:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self._file = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[Response, bytes]:
        status = int(self._file.readline().split()[1])
        headers = {}
        while (line := self._file.readline().decode().strip()) != "":
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        return Response(status, headers), self._file.read(int(headers.get("content-length", 0)))

    def is_at_end(self) -> bool:
        return self._file.read(1) == b""

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextmanager
def connected(port: int) -> Iterator[Client]:
    client = Client(port)
    try:
        yield client
    finally:
        client.close()


def logits_in(response: Response, body: bytes) -> np.ndarray:
    assert response.status == 200, body
    length = int(response.headers["inference-header-content-length"])
    (output,) = json.loads(body[:length])["outputs"]
    return np.frombuffer(body[length:], np.float32).reshape(output["shape"])


def within(seconds: float, holds: Callable[[], object]) -> bool:
    """Whether it does, at last."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that took the usual way."""
    paths: list[str] = []
    start = Door._start_asgi_task

    def noted(self: Door, cycle, app) -> None:
        paths.append(cycle.scope["path"])
        start(self, cycle, app)

    monkeypatch.setattr(Door, "_start_asgi_task", noted)
    return paths


def test_requests_on_one_connection_are_answered_and_do_not_take_the_usual_way(port, usual) -> None:
    with connected(port) as connection:
        for value in (1, 2, 3):
            connection.send(request_of(images(value, value + 0.5)))
            logits = logits_in(*connection.answer())
            assert logits.tolist() == [[value] * 10, [value + 0.5] * 10]
        assert usual == []
        connection.send(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.answer()[0].status == 200
        connection.send(request_of(images(4), path="/v2/models/digits/versions/1/infer"))
        assert logits_in(*connection.answer())[0, 0] == 4
    assert usual == ["/v2/health/ready"]


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ("", {"id": "seven"}),
        ("Accept-Encoding: gzip\r\n", {}),
        ("X-Request-Timeout-Ms: 60000\r\n", {}),
        ("X-Request-Id: a-1\r\n", {}),
        ("X-Request-Id: caf\u00e9\r\n", {}),
        ("", {"parameters": {"timeout": 60_000_000}}),
        ("", {"outputs": [{"name": "logits"}]}),
        ("", {"outputs": [], "parameters": {"binary_data_output": True}}),
    ],
)
def test_the_answer_is_the_one_of_the_usual_way(port, usual, headers: str, more: dict[str, object]) -> None:
    pixels = images(1, 2)
    found = []
    # An Expect header is what the usual way takes.
    for unusual in ("", "Expect: 200-nothing\r\n"):
        with connected(port) as connection:
            for _ in range(2):
                connection.send(request_of(pixels, headers=headers + unusual, **more))
                response, body = connection.answer()
                kept = {name: value for name, value in response.headers.items() if name != "date"}
                found.append((response.status, kept, body))
    assert found[0][0] == 200
    assert all(one == found[0] for one in found)
    # The first two by the door, unless the header is one that it leaves to the usual way.
    assert len(usual) == (4 if "gzip" in headers else 2)


@pytest.mark.parametrize(
    ("build", "status", "said"),
    [
        (lambda: request_of(images(1)[:, :, :4]), 400, "shape"),
        (lambda: request_of(images(9)), 500, "internal error"),
        (lambda: request_of(images(1), headers="X-Request-Timeout-Ms: soon\r\n"), 400, "milliseconds"),
        (lambda: request_of(images(1)).replace(b"Header-Content-Length: ", b"Header-Content-Length: x"), 400, "bytes"),
        (lambda: request_of(images(1)).replace(b"Header-Content-Length: ", b"Header-Content-Length: 9"), 400, "body"),
        (lambda: request_of(images(1)).replace(b'"inputs"', b'"nothing"'), 400, "JSON"),
        (lambda: request_of(images(1)).replace(b'"inputs"', b'"imputs"'), 400, "inputs"),
    ],
    ids=["shape", "runtime", "deadline", "no number", "too long", "cut JSON", "no inputs"],
)
def test_what_is_wrong_is_said_and_the_next_request_works(
    port, usual, build: Callable[[], bytes], status: int, said: str
) -> None:
    with connected(port) as connection:
        request = build()
        head, _, body = request.partition(b"\r\n\r\n")
        # Where the body was changed its length is still right.
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
        request = b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])
        connection.send(request)
        response, text = connection.answer()
        assert response.status == status, text
        document = json.loads(text)
        assert said in document["error"]
        assert "secret" not in document["error"]
        connection.send(request_of(images(5)))
        assert logits_in(*connection.answer())[0, 0] == 5
    assert usual == []


def test_pipelined_requests_are_answered_in_order(port) -> None:
    with connected(port) as connection:
        connection.send(b"".join(request_of(images(value)) for value in range(1, 8)))
        found = [logits_in(*connection.answer())[0, 0] for _ in range(1, 8)]
    assert found == list(range(1, 8))


def waiting_bytes() -> int:
    (door,) = Door._swept.connections
    return sum(
        len(cycle.body) + sum(len(name) + len(value) for name, value in cycle.scope["headers"])
        for cycle, _ in list(door.pipeline)
    )


@pytest.mark.parametrize("where", ["body", "headers"])
def test_what_waits_behind_a_request_is_not_read_without_end(threaded_port, session, where: str) -> None:
    session.gate.clear()
    more: dict[str, Any] = {"parameters": {"pad": "x" * 60_000}} if where == "body" else {}
    headers = "" if where == "body" else "X: " + "x" * 60_000 + "\r\n"
    # What is read at once may be a quarter of a megabyte more.
    limit = 400_000
    with connected(threaded_port) as connection:
        connection.send(request_of(images(0)))
        assert session.entered.wait(10)
        values = [1 + place % 7 for place in range(120)]
        rest = b"".join(request_of(images(value), headers=headers, **more) for value in values)
        sending = threading.Thread(target=connection.send, args=(rest,))
        sending.start()
        (door,) = Door._swept.connections
        assert within(10, lambda: waiting_bytes() > 64 * 1024 and door.flow.read_paused)
        most = waiting_bytes()
        session.gate.set()
        for value in [0, *values]:
            response, body = connection.answer()
            assert logits_in(response, body)[0, 0] == value
            most = max(most, waiting_bytes())
        sending.join(10)
    assert most < limit


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["ours", "the usual way"])
@pytest.mark.parametrize(
    "behind", ["no request", "no address", "a tunnel", "an upgrade", "half a request", "half a request the usual way"]
)
def test_what_is_wrong_behind_a_request_is_said_after_its_answer(
    digits_artifact, session, monkeypatch, headers: str, behind: str
) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(receive_timeout_s=0.5)
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    more = {
        "no request": b"\x16\x03\x01 garbage\r\n\r\n",
        "no address": b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        "a tunnel": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        "an upgrade": b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUPGRADE: websocket\r\n\r\n",
        "half a request": request_of(images(2))[:-100],
        "half a request the usual way": request_of(images(2), headers="Accept-Encoding: gzip\r\n")[:-100],
    }[behind]
    session.gate.clear()
    with listening(app, model) as port, connected(port) as connection:
        connection.send(request_of(images(1), headers=headers))
        assert session.entered.wait(10)
        connection.send(request_of(images(3), headers=headers) + more)
        (door,) = Door._swept.connections
        assert within(10, lambda: door._refusal is not None)
        session.gate.set()
        assert [logits_in(*connection.answer())[0, 0] for _ in range(2)] == [1, 3]
        response, body = connection.answer()
        assert response.status == (408 if behind.startswith("half") else 400), body
        assert response.headers["connection"] == "close"
        assert connection.is_at_end()
    assert app.bodies.pending_bytes == 0
    assert model.queue.close(timeout_s=10)


def test_more_requests_in_a_row_than_may_wait_are_refused_after_those_that_may(threaded_port, session) -> None:
    session.gate.clear()
    with connected(threaded_port) as connection:
        connection.send(request_of(images(0)))
        assert session.entered.wait(10)
        connection.send(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        (door,) = Door._swept.connections
        assert within(10, lambda: door._refusal is not None)
        session.gate.set()
        assert logits_in(*connection.answer())[0, 0] == 0
        statuses = []
        while not statuses or statuses[-1] == 200:
            response, body = connection.answer()
            statuses.append(response.status)
        assert (len(statuses), statuses[-1]) == (257, 400)
        assert "more than 256 requests" in json.loads(body)["error"]
        assert connection.is_at_end()


def test_a_body_that_comes_in_pieces_is_put_together(port, usual) -> None:
    request = request_of(images(3))
    with connected(port) as connection:
        for begin in range(0, len(request), 97):
            connection.send(request[begin : begin + 97])
            time.sleep(0.002)
        assert logits_in(*connection.answer())[0, 0] == 3
    assert usual == []


def test_a_request_whose_body_still_comes_holds_its_model(port, app) -> None:
    """Until it is answered a model that leaves waits: what came to a version is answered by it."""
    model = app.models.find("digits")

    def wait_for_users(count: int) -> None:
        until = time.monotonic() + 10
        while model._users != count:
            assert time.monotonic() < until, model._users
            time.sleep(0.005)

    request = request_of(images(3))
    with connected(port) as connection:
        connection.send(request[:-10])
        wait_for_users(1)
        connection.send(request[-10:])
        assert logits_in(*connection.answer())[0, 0] == 3
        wait_for_users(0)
        # One that leaves before its body has come holds it no longer either.
        connection.send(request[:-10])
        wait_for_users(1)
    wait_for_users(0)


@pytest.mark.parametrize(("version", "headers"), [("1.1", "Connection: close\r\n"), ("1.0", "")])
def test_a_connection_that_is_to_close_does(port, version: str, headers: str) -> None:
    with connected(port) as connection:
        connection.send(request_of(images(3), version=version, headers=headers))
        response, body = connection.answer()
        assert logits_in(response, body)[0, 0] == 3
        assert response.headers["connection"] == "close"
        assert connection.is_at_end()


def test_what_is_too_large_is_refused_by_its_header(port, usual) -> None:
    with connected(port) as connection:
        connection.send(
            f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: 10\r\n"
            "Content-Length: 100001\r\n\r\n".encode()
        )
        # Not a byte of the body was sent.
        response, body = connection.answer()
        assert (response.status, json.loads(body)["field"]) == (413, "body")
    assert usual == []


def test_a_full_queue_says_so_before_the_body_and_goes_on(threaded_port, session, app) -> None:
    session.gate.clear()
    connections = [Client(threaded_port) for _ in range(4)]
    connections[0].send(request_of(images(0)))
    assert session.entered.wait(10)
    for value in (1, 2):
        connections[value].send(request_of(images(value)))
    while app.models.only().queue.refusal() is None:
        time.sleep(0.01)
    late = request_of(images(3))
    connections[3].send(late[:200])
    response, _ = connections[3].answer()
    assert response.status == 429
    assert response.headers["retry-after"] == "1"
    session.gate.set()
    assert [logits_in(*one.answer())[0, 0] for one in connections[:3]] == [0, 1, 2]
    # The rest of what was refused is read and left.
    connections[3].send(late[200:] + request_of(images(4)))
    assert logits_in(*connections[3].answer())[0, 0] == 4
    for one in connections:
        one.close()


def test_a_client_that_leaves_is_not_computed_for_and_gives_its_memory_back(threaded_port, session, app) -> None:
    session.gate.clear()
    with connected(threaded_port) as first:
        first.send(request_of(images(0)))
        assert session.entered.wait(10)
        with connected(threaded_port) as leaving:
            leaving.send(request_of(images(1)))
            while app.models.only().queue.rows_waiting == 0:
                time.sleep(0.01)
        with connected(threaded_port) as half:
            half.send(request_of(images(1))[:300])
            time.sleep(0.1)
        time.sleep(0.1)
        session.gate.set()
        assert logits_in(*first.answer())[0, 0] == 0
        first.send(request_of(images(2)))
        assert logits_in(*first.answer())[0, 0] == 2
    assert session.rows == [1, 1]
    assert app.bodies.pending_bytes == 0


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["ours before it", "both the usual way"])
def test_a_client_that_leaves_with_requests_in_a_row_is_not_computed_for(
    threaded_port, session, app, headers: str
) -> None:
    session.gate.clear()
    (model,) = app.models
    with connected(threaded_port) as first:
        first.send(request_of(images(0)))
        assert session.entered.wait(10)
        with connected(threaded_port) as leaving:
            behind = request_of(images(1), headers="Accept-Encoding: gzip\r\n")
            leaving.send(request_of(images(1), headers=headers) + behind)
            assert within(5, lambda: model.queue.rows_waiting == 1)
        assert within(5, lambda: model.queue.rows_waiting == 0)
        session.gate.set()
        assert logits_in(*first.answer())[0, 0] == 0
    assert session.rows == [1]


@pytest.mark.parametrize("sent", [0, 20, 100, 300])
@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"])
def test_a_slow_sender_is_not_waited_for_and_holds_nothing(
    monkeypatch, digits_artifact, session, sent: int, headers: str
) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(receive_timeout_s=0.5)
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    with listening(app, model) as port, connected(port) as slow, connected(port) as good:
        slow.send(request_of(images(1), headers=headers)[:sent])
        for value in range(10, 30):
            good.send(request_of(images(value)))
            assert logits_in(*good.answer())[0, 0] == value
            time.sleep(0.1)
        assert app.bodies.pending_bytes == 0
        if sent == 300 and not headers:
            response, body = slow.answer()
            assert (response.status, response.headers["connection"]) == (408, "close")
            assert "in time" in json.loads(body)["error"]
        assert slow.is_at_end()
    assert model.queue.close(timeout_s=10)


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n"], ids=["nothing", "a line", "two lines"])
def test_a_connection_that_begins_no_request_ends(monkeypatch, digits_artifact, session, before: bytes) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(receive_timeout_s=0.5)
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    with listening(app, model, timeout_keep_alive=1) as port, connected(port) as idle:
        idle.send(request_of(images(1)))
        assert logits_in(*idle.answer())[0, 0] == 1
        idle.send(before)
        assert idle.is_at_end()
    assert model.queue.close(timeout_s=10)


def chunked(*, trailers: bytes) -> bytes:
    body, length = body_of(images(3))
    head = f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {length}\r\n"
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b" % (len(body), body, trailers)


def test_trailers_are_no_headers(port) -> None:
    with connected(port) as connection:
        connection.send(chunked(trailers=b"X-Request-Id: behind\r\nContent-Encoding: gzip\r\n\r\n"))
        response, body = connection.answer()
        assert logits_in(response, body)[0, 0] == 3
        assert response.headers.get("x-request-id") != "behind"
        connection.send(request_of(images(4)))
        assert logits_in(*connection.answer())[0, 0] == 4


@pytest.mark.parametrize("trailers", [b"ab: cd\r\n" * 50_000, b"ab: " + b"x" * 400_000], ids=["many", "a long one"])
def test_trailers_without_end_are_refused(port, app, trailers: bytes) -> None:
    with connected(port) as connection:
        sending = threading.Thread(target=send_all_that_is_taken, args=(connection, chunked(trailers=trailers)))
        sending.start()
        response, body = connection.answer()
        sending.join(10)
        assert (response.status, response.headers["connection"]) == (431, "close"), body
    assert within(5, lambda: app.bodies.pending_bytes == 0)


def send_all_that_is_taken(connection: Client, data: bytes) -> None:
    for start in range(0, len(data), 10_000):
        try:
            connection.send(data[start : start + 10_000])
        except ConnectionError:
            return
        time.sleep(0.002)


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["ours", "the usual way"])
def test_who_leaves_leaves_nothing_until_the_deadline(threaded_port, session, app, headers: str) -> None:
    session.gate.clear()
    (model,) = app.models
    with connected(threaded_port) as first:
        first.send(request_of(images(0)))
        assert session.entered.wait(10)
        with connected(threaded_port) as leaving:
            leaving.send(request_of(images(123), headers=headers + "X-Request-Timeout-Ms: 999999999\r\n"))
            assert within(5, lambda: model.queue.rows_waiting == 1)
        assert within(5, lambda: model.queue.rows_waiting == 0)
        session.gate.set()
        assert logits_in(*first.answer())[0, 0] == 0
    gc.collect()
    left = [one for one in gc.get_objects() if isinstance(one, Ticket) and one.deadline_ns is not None]
    assert left == []


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"], ids=["ours", "the usual way"])
def test_requests_in_a_row_are_all_answered_while_the_server_ends(threaded_port, session, app, headers: str) -> None:
    session.gate.clear()
    with connected(threaded_port) as connection:
        connection.send(b"".join(request_of(images(value), headers=headers) for value in (1, 2, 3)))
        assert session.entered.wait(10)
        (door,) = Door._swept.connections
        assert within(5, lambda: len(door.pipeline) == 2)
        app.drain()
        session.gate.set()
        answers = [connection.answer() for _ in range(3)]
    assert [logits_in(*answer)[0, 0] for answer in answers] == [1, 2, 3]


def test_many_who_announce_much_and_send_little_keep_nobody_out(port, app) -> None:
    connections = [Client(port) for _ in range(8)]
    for one in connections:
        one.send(
            f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: 10\r\n"
            "Content-Length: 100000\r\n\r\n{".encode()
        )
    with connected(port) as good:
        good.send(request_of(images(7)))
        assert logits_in(*good.answer())[0, 0] == 7
    for one in connections:
        one.close()


@pytest.fixture
def crowded_port(monkeypatch, digits_artifact, session) -> Iterator[int]:
    """With room for three connections."""
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(max_connections=3)
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    with listening(app, model) as number:
        yield number
        session.gate.set()
    assert model.queue.close(timeout_s=10)
    assert b"dlops_crowded_connections_total 1.0" in app.metrics.render()


@pytest.mark.parametrize(
    ("sent", "status"), [(0, None), (20, None), (300, 429)], ids=["nothing", "half a head", "half a body"]
)
def test_of_too_many_connections_the_one_gives_way_that_is_waited_for_the_longest(
    crowded_port, sent: int, status: int | None
) -> None:
    with connected(crowded_port) as kept, connected(crowded_port) as slow, connected(crowded_port) as late:
        slow.send(request_of(images(1))[:sent])
        time.sleep(0.05)
        # As old, but waited for since its last answer only.
        for one in (late, kept):
            one.send(request_of(images(5)))
            assert logits_in(*one.answer())[0, 0] == 5
        with connected(crowded_port) as fourth:
            fourth.send(request_of(images(7)))
            assert logits_in(*fourth.answer())[0, 0] == 7
            if status is not None:
                response, body = slow.answer()
                assert (response.status, response.headers["connection"]) == (status, "close")
                assert "retry-after" in response.headers
                assert "more than 3 connections" in json.loads(body)["error"]
            assert slow.is_at_end()
            for one in (kept, late):
                one.send(request_of(images(6)))
                assert logits_in(*one.answer())[0, 0] == 6


def test_where_all_connections_are_being_answered_another_one_is_refused(crowded_port, session) -> None:
    session.gate.clear()
    with connected(crowded_port) as first, connected(crowded_port) as second, connected(crowded_port) as third:
        first.send(request_of(images(0)))
        assert session.entered.wait(10)
        second.send(request_of(images(1)))
        third.send(request_of(images(2), headers="Accept-Encoding: gzip\r\n"))
        (model,) = Door.application.models
        assert within(5, lambda: model.queue.rows_waiting == 2)
        with connected(crowded_port) as fourth:
            response, body = fourth.answer()
            assert (response.status, response.headers["retry-after"]) == (429, "1")
            assert "3 connections are open" in json.loads(body)["error"]
            assert fourth.is_at_end()
        session.gate.set()
        assert [logits_in(*one.answer())[0, 0] for one in (first, second, third)] == [0, 1, 2]


def test_half_open_connections_keep_nobody_out(monkeypatch, digits_artifact, session) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(max_connections=20)
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    with listening(app, model) as port, ExitStack() as stack:
        for number in range(200):
            stack.enter_context(connected(port)).send(b"GET /v2/health/live HTTP/1.1\r\n"[: number % 30])
        with connected(port) as good:
            good.send(request_of(images(7)))
            assert logits_in(*good.answer())[0, 0] == 7
        assert within(5, lambda: len(Door._swept.connections) <= 20)
    assert model.queue.close(timeout_s=10)


def test_a_deadline_that_passes_in_the_queue_is_told_and_not_run(threaded_port, session) -> None:
    session.gate.clear()
    with connected(threaded_port) as first, connected(threaded_port) as late:
        first.send(request_of(images(0)))
        assert session.entered.wait(10)
        late.send(request_of(images(1), headers="X-Request-Timeout-Ms: 20\r\n"))
        time.sleep(0.1)
        session.gate.set()
        assert logits_in(*first.answer())[0, 0] == 0
        response, _ = late.answer()
        assert response.status == 504
    assert session.rows == [1]


def test_shutting_down_answers_what_was_accepted_and_closes_what_is_idle(app, session, digits_artifact) -> None:
    model = ServedModel(digits_artifact, [session], Settings(max_queue_rows=2), app.metrics)
    answers: list[float] = []
    session.gate.clear()
    with listening(app, model) as port:
        idle = Client(port)
        idle.send(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.answer()[0].status == 200
        waiting = Client(port)
        waiting.send(request_of(images(6)))
        assert session.entered.wait(10)

        def read() -> None:
            answers.append(logits_in(*waiting.answer())[0, 0])
            answers.append(waiting.is_at_end())

        reader = threading.Thread(target=read)
        reader.start()
        threading.Timer(0.3, session.gate.set).start()
    reader.join(10)
    assert answers == [6, True]
    assert idle.is_at_end()
    idle.close()
    waiting.close()
    assert model.queue.close(timeout_s=10)


def test_metrics_and_statistics_count_what_the_door_answers(port, app) -> None:
    with connected(port) as connection:
        for _ in range(3):
            connection.send(request_of(images(1, 2)))
            logits_in(*connection.answer())
        connection.send(request_of(images(1)[:, :, :4]))
        assert connection.answer()[0].status == 400
    text = app.metrics.render().decode()
    assert 'dlops_requests_total{method="POST",model="digits",route="/v2/models/{name}/infer",status="200"} 3.0' in text
    assert 'dlops_requests_total{method="POST",model="digits",route="/v2/models/{name}/infer",status="400"} 1.0' in text
    assert 'dlops_request_seconds_count{model="digits",part="queue",route="/v2/models/{name}/infer"} 3.0' in text
    (model,) = app.statistics_of()["model_stats"]
    assert (model["inference_count"], model["inference_stats"]["fail"]["count"]) == (6, 1)


def test_a_thousand_requests_over_many_connections_get_their_own_answers(port) -> None:
    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for turn in range(40):
            value = number * 100 + turn + 0.25
            while True:
                writer.write(request_of(images(value)))
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(next(line for line in head.lower().split(b"\r\n") if b"content-length" in line[:14])[15:])
                body = await reader.readexactly(length)
                # The queue holds two: those who come too often are told, and come again.
                if not head.startswith(b"HTTP/1.1 429"):
                    break
                await asyncio.sleep(0.001)
            assert head.startswith(b"HTTP/1.1 200"), head
            assert (np.frombuffer(body[-40:], np.float32) == np.float32(value)).all()
        writer.close()
        await writer.wait_closed()

    async def all_of_them() -> None:
        await asyncio.gather(*(client(number) for number in range(25)))

    asyncio.run(all_of_them())


def test_a_uvicorn_that_takes_no_connections_of_ours_is_said(app, monkeypatch, capsys) -> None:
    monkeypatch.setattr("uvicorn.config.HTTP_PROTOCOLS", {"h11": "uvicorn.protocols.http.h11_impl:H11Protocol"})
    install(app)
    assert "will be slower" in capsys.readouterr().err


def test_a_server_of_bentoml_has_the_door_in_it(server: ServerProcess, digits_artifact: Artifact) -> None:
    pixels = digits_artifact.samples().inputs["image"][:1]
    with connected(server.port) as connection:
        connection.send(request_of(pixels))
        response, body = connection.answer()
        assert logits_in(response, body).shape == (1, 10)
        # The two ways write the same headers, and the door the length last.
        assert list(response.headers)[-1] == "content-length"
        connection.send(request_of(pixels, headers="Accept-Encoding: gzip\r\n"))
        response, _ = connection.answer()
        assert response.status == 200
        assert list(response.headers)[-1] != "content-length"


def test_what_was_answered_is_let_go_of_at_once(port, app) -> None:
    from dlops.serve.call import Call

    gc.collect()
    gc.disable()
    try:
        with connected(port) as connection:
            for value in range(10, 40):
                connection.send(request_of(images(value)))
                logits_in(*connection.answer())
            alive = [one for one in gc.get_objects() if isinstance(one, Call)]
            # The last one is the connection's, without its body.
            assert len(alive) <= 1
            assert all(one._wanted is None and one._ticket is None for one in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nLong: " + b"a" * 300_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 50_000 + b"\r\n", 431),
        (b"this is no HTTP\r\n\r\n", 400),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    ],
    ids=["address", "header", "headers", "no HTTP", "two lengths"],
)
def test_what_is_no_request_or_a_far_too_large_one_is_said_in_json(port, text: bytes, status: int) -> None:
    with connected(port) as connection:
        # In pieces, as the network brings it.
        for begin in range(0, len(text), 60_000):
            try:
                connection.send(text[begin : begin + 60_000])
            except OSError:  # it has been refused already
                break
            time.sleep(0.02)
        response, body = connection.answer()
        assert response.status == status
        assert json.loads(body)["error"]
        assert response.headers["x-content-type-options"] == "nosniff"
    with connected(port) as connection:
        connection.send(request_of(images(5)))
        assert logits_in(*connection.answer())[0, 0] == 5


def test_a_head_that_is_too_large_is_refused_however_it_comes(port, session) -> None:
    long = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nLong: " + b"a" * 70_000 + b"\r\n\r\n"
    with connected(port) as connection:
        connection.send(request_of(images(4)) + long)
        assert logits_in(*connection.answer())[0, 0] == 4
        response, body = connection.answer()
        assert response.status == 431
        assert json.loads(body)["error"]
        assert connection.is_at_end()
    with connected(port) as connection:
        connection.send(long)
        assert connection.answer()[0].status == 431


def test_of_a_header_that_comes_twice_the_first_holds_on_both_ways(digits_artifact, session, monkeypatch) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(token="the token of the test")
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    right, wrong = "Authorization: Bearer the token of the test\r\n", "Authorization: Bearer wrong\r\n"
    with listening(app, model) as port:
        for more in ("", "Accept-Encoding: gzip\r\n"):
            for headers, status in ((right + wrong, 200), (wrong + right, 401)):
                with connected(port) as connection:
                    connection.send(request_of(images(4), headers=headers + more))
                    assert connection.answer()[0].status == status
    assert model.queue.close(timeout_s=10)


def test_what_came_before_does_not_count_as_the_next_ones_head(port) -> None:
    # All in one, with the beginning of another behind it: more than a head may have, and none of it one.
    many = [request_of(images(value)) for value in np.linspace(0, 1, 200)]
    assert sum(map(len, many)) > 64 * 1024
    with connected(port) as client:
        client.send(b"".join(many) + b"GET /v2/health/live HT")
        statuses = [client.answer()[0].status for _ in many]
        assert statuses == [200] * len(many)
        client.send(b"TP/1.1\r\nHost: x\r\n\r\n")
        assert client.answer()[0].status == 200


def test_json_that_no_input_can_need_is_refused_before_it_is_read(port) -> None:
    numbers = ",".join(["1"] * 40_000)
    body = (
        f'{{"inputs": [{{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [{numbers}]}}]}}'.encode()
    )
    with connected(port) as connection:
        head = f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.send(head + body)
        response, text = connection.answer()
        assert response.status == 400
        assert "40000 values, shape [1, 1, 8, 8] takes 64" in json.loads(text)["error"]


@pytest.mark.parametrize("headers", ["", "Accept-Encoding: gzip\r\n"])
def test_an_answer_that_is_too_large_is_an_error_and_the_next_one_comes(
    monkeypatch, digits_artifact, session, headers: str
) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(max_response_bytes=100)
    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics)
    with listening(app, model) as port, connected(port) as client:
        for rows in (3, 1, 2):
            client.send(request_of(images(*range(10, 10 + rows)), headers=headers))
            response, body = client.answer()
            assert response.status == (200 if rows < 3 else 400)
            if rows == 3:
                assert json.loads(body)["field"] == "outputs"
                assert "120 bytes, at most 100 are sent" in json.loads(body)["error"]


@pytest.mark.parametrize("header", ["Upgrade", "upgrade"])
def test_a_wish_for_http_2_is_passed_over_and_the_body_read(port, header: str) -> None:
    wish = f"Connection: {header}, HTTP2-Settings\r\n{header}: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
    pixels = images(1)
    with connected(port) as client:
        for headers in (wish, "", wish):
            client.send(request_of(pixels, headers=headers))
            response, body = client.answer()
            assert response.status == 200
            assert len(logits_in(response, body)) == 1


def test_of_an_upgrade_only_the_wish_is_taken_away() -> None:
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: h2c\r\nX: y\r\n\r\n"
    assert without_upgrade(head + b"\r\nUpgrade: body") == (
        b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\nX: y\r\n\r\n\r\nUpgrade: body"
    )
    assert b"websocket" not in without_upgrade(head.replace(b"h2c", b"websocket"))
    assert without_upgrade(head[:40]) == head[:40]
