"""Tokens, security headers, names of requests and what is not supported, on every way into a real server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from dlops.errors import UsageError
from dlops.serve.answers import error_response
from dlops.serve.guard import Guard, GuardMiddleware, request_id
from dlops.serve.launch import ServerProcess
from dlops.serve.settings import Settings
from dlops.serve.time_limit import TimeLimit

TOKEN = "a secret of thirty-two characters"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def guarded(digits_artifact) -> Iterator[httpx.Client]:
    with (
        ServerProcess(digits_artifact, env={"DLOPS_TOKEN": TOKEN}) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


@pytest.fixture
def binary(digits_artifact) -> dict[str, object]:
    """Content and headers of a request that the door takes."""
    image = digits_artifact.samples().inputs["image"][:1]
    tensor = {
        "name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "parameters": {"binary_data_size": image.nbytes}
    }  # fmt: skip
    head = json.dumps({"inputs": [tensor]}).encode()
    return {"content": head + image.tobytes(), "headers": {"Inference-Header-Content-Length": str(len(head))}}


def ask(client: httpx.Client, method: str, path: str, binary: dict, headers: dict[str, str]) -> httpx.Response:
    if path == "binary":
        own = {**binary["headers"], **headers}
        return client.post("/v2/models/digits/infer", content=binary["content"], headers=own)
    return client.request(method, path, headers=headers)


PATHS = [
    ("POST", "binary"), ("POST", "/v2/models/digits/infer"), ("POST", "/predict"), ("GET", "/"), ("GET", "/docs.json"),
    ("GET", "/metrics"), ("GET", "/v2"), ("GET", "/v2/models/digits/stats"), ("GET", "/nothing"),
    # BentoML's own.
    ("GET", "/schema.json"), ("GET", "/static_content/swagger-ui.css"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "given", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer"}]
)
def test_nobody_is_answered_without_the_token(guarded, binary, method: str, path: str, given: dict[str, str]) -> None:
    response = ask(guarded, method, path, binary, given)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].split(" ")[:2] == ["Bearer,", "Basic"]
    assert "token" in response.json()["error"]
    assert TOKEN not in response.text


@pytest.mark.parametrize("path", ["/", "/docs.json", "binary"])
def test_a_browser_sends_the_token_as_a_password(guarded, binary, path: str) -> None:
    method = "POST" if path == "binary" else "GET"
    for user, password, status in (("anybody", TOKEN, 200), ("", TOKEN, 200), (TOKEN, "", 401), ("a", "wrong", 401)):
        given = base64.b64encode(f"{user}:{password}".encode()).decode()
        assert ask(guarded, method, path, binary, {"Authorization": f"Basic {given}"}).status_code == status


def test_a_page_of_another_site_changes_nothing(guarded, binary) -> None:
    for path in ("binary", "/predict", "/v2/repository/models/digits/unload"):
        refused = ask(guarded, "POST", path, binary, {**BEARER, "Sec-Fetch-Site": "cross-site"})
        assert refused.status_code == 403, path
        assert "another site" in refused.json()["error"]
    # Another port of this host is another's page.
    same_site = ask(guarded, "POST", "binary", binary, {**BEARER, "Sec-Fetch-Site": "same-site"})
    assert same_site.status_code == 403
    host = {"Host": "10.0.0.5:3000"}
    # Where a browser says nothing else, over plain HTTP, it says whose page it is.
    for origin, status in (
        ("http://evil.example", 403), ("null", 403), ("http://10.0.0.5:80", 403), ("http://10.0.0.5:3000", 200),
    ):  # fmt: skip
        for path in ("binary", "/v2/repository/index"):
            answer = ask(guarded, "POST", path, binary, {**BEARER, **host, "Origin": origin})
            assert answer.status_code == status, (path, origin)
    for site in ("same-origin", "none"):
        assert ask(guarded, "POST", "binary", binary, {**BEARER, "Sec-Fetch-Site": site}).status_code == 200
    # A link to the page may be followed.
    assert ask(guarded, "GET", "/", binary, {**BEARER, "Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_a_number_without_end_is_answered_at_once(guarded) -> None:
    began = time.monotonic()
    for number in ("9" * 5000, "-1", "1e3", "x", "٣"):
        answer = guarded.get(f"/ui/samples/{number}", headers=BEARER)
        assert answer.status_code == 404
        assert answer.json()["error"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_with_the_token_all_is_as_ever(guarded, binary, method: str, path: str) -> None:
    response = ask(guarded, method, path, binary, {"authorization": f"bearer {TOKEN}"})
    assert response.status_code != 401
    if path in ("binary", "/", "/docs.json", "/metrics", "/schema.json"):
        assert response.status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_health_needs_no_token(guarded, path: str) -> None:
    assert guarded.get(path).status_code == 200


def test_a_misspelt_variable_is_not_passed_over() -> None:
    with pytest.raises(UsageError, match="DLOPS_TOKNE is no setting") as caught:
        Settings.from_environment({"DLOPS_TOKNE": TOKEN})
    assert caught.value.hint == "did you mean DLOPS_TOKEN?"
    # Others of this name's kind are somebody's own.
    others = ("PHOTOS", "PEERS", "CELLS_DIR", "ARBITER_PID", "FAILURE_FILE", "STOP_ON_STDIN_EOF")
    assert Settings.from_environment({f"DLOPS_{name}": "x" for name in others}) == Settings()
    with pytest.raises(UsageError, match=r"variables: tls_cert and tls_key go together"):
        Settings.from_environment({"DLOPS_TLS_KEY": "x"})


def test_a_short_token_is_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="token"):
        Settings.from_environment({"DLOPS_TOKEN": "short"})
    with pytest.raises(UsageError, match="printable"):
        Settings.from_environment({"DLOPS_TOKEN": "ein geheimes w\u00f6rtchen"})
    # A secret that is missing must not open the server.
    for empty in ("", " \n"):
        with pytest.raises(UsageError, match=r"token: .*is empty; unset it where anybody may ask$"):
            Settings.from_environment({"DLOPS_TOKEN": empty})
    assert Settings.from_environment({"DLOPS_LOG": ""}).token is None
    # A file's last line's end is none of the secret's.
    settings = Settings.from_environment({"DLOPS_TOKEN": f"{TOKEN}\n"})
    assert TOKEN not in repr(settings)
    assert settings.to_environment() == {"DLOPS_TOKEN": TOKEN}


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_answer_says_that_it_is_what_it_says(guarded, binary, method: str, path: str) -> None:
    response = ask(guarded, method, path, binary, BEARER | {"X-Request-Id": "order-7"})
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Request-Id"] == "order-7"
    if response.headers.get("content-type", "").startswith("text/html"):
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        assert response.headers["Referrer-Policy"] == "no-referrer"


@pytest.mark.parametrize("name", ["", "x" * 129, "caf\u00e9", "two\tcolumns"])
def test_what_can_stand_in_no_header_names_no_request(name: str) -> None:
    assert request_id(name) is None


@pytest.mark.parametrize("path", ["binary", "/v2/models/digits/infer", "/predict"])
def test_the_parts_of_a_requests_time_come_back_on_demand(client, binary, digit_pngs, path: str) -> None:
    def ask_for(headers: dict[str, str]) -> httpx.Response:
        if path == "/predict":
            return client.post(path, content=digit_pngs[0], headers={"Content-Type": "image/png", **headers})
        return ask(
            client, "POST", "binary", binary, headers | ({} if path == "binary" else {"Accept-Encoding": "gzip"})
        )

    assert "Server-Timing" not in ask_for({}).headers
    response = ask_for({"X-Server-Timing": "1"})
    assert response.status_code == 200
    parts = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
    assert list(parts) == ["total", "receive", "decode", "queue", "copy", "compute", "encode"]
    times = {name: float(ms) for name, ms in parts.items()}
    assert times["compute"] > 0
    assert sum(times.values()) - times["total"] == pytest.approx(times["total"], abs=0.01)


@pytest.mark.parametrize("path", ["binary", "/predict"])
def test_the_time_in_which_a_request_arrives_is_its_own_part(client, server, binary, digit_pngs, path: str) -> None:
    def counted_ns() -> int:
        (stats,) = client.get("/v2/models/digits/stats").json()["model_stats"]
        return stats["inference_stats"]["success"]["ns"]

    before_ns = counted_ns()
    if path == "binary":
        path, headers, body = "/v2/models/digits/infer", binary["headers"], binary["content"]
    else:
        headers, body = {"content-type": "image/png"}, digit_pngs[0]
    lines = {**headers, "host": "here", "content-length": str(len(body)), "x-server-timing": "1"}
    head = "".join([f"POST {path} HTTP/1.1\r\n", *[f"{name}: {value}\r\n" for name, value in lines.items()], "\r\n"])
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode() + body[:10])
        time.sleep(0.3)
        connection.sendall(body[10:])
        answer = connection.recv(65536).decode("latin-1")
    timing = next(line for line in answer.splitlines() if line.lower().startswith("server-timing:"))
    times = {name: float(ms) for name, ms in (part.split(";dur=") for part in timing.partition(": ")[2].split(", "))}
    assert times["receive"] >= 290
    assert times["total"] >= times["receive"]
    # Not in Triton's statistics, whose clock starts once a request is there.
    assert counted_ns() - before_ns < 200e6


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/systemsharedmemory/status"), ("POST", "/v2/systemsharedmemory/region/a/register"),
        ("GET", "/v2/cudasharedmemory/region/a/status"), ("GET", "/v2/trace/setting"), ("POST", "/v2/trace/setting"),
        ("GET", "/v2/models/digits/trace/setting"), ("GET", "/v2/logging"), ("POST", "/v2/logging"),
    ],
)  # fmt: skip
def test_what_is_not_supported_answers_501(client, method: str, path: str) -> None:
    response = client.request(method, path, json={} if method == "POST" else None)
    assert response.status_code == 501
    assert "not supported" in response.json()["error"]


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_tensors_in_shared_memory_answer_501(client, where: str) -> None:
    region = {"parameters": {"shared_memory_region": "a", "shared_memory_byte_size": 256}}
    tensor: dict[str, object] = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8]}
    document = {"inputs": [tensor | region]}
    if where == "outputs":
        document = {"inputs": [tensor | {"data": [0.0] * 64}], "outputs": [{"name": "logits"} | region]}
    response = client.post("/v2/models/digits/infer", json=document)
    assert response.status_code == 501
    assert "shared" in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "target", "status", "says"),
    [
        ("GET", "/static_content/nothing", 404, "no route GET /static_content/nothing"),
        ("DELETE", "/static_content/nothing", 405, "DELETE is not allowed here, but GET, HEAD"),
        ("PUT", "/livez", 405, "PUT is not allowed here, but GET, HEAD"),
        ("OPTIONS", "*", 404, "no route OPTIONS *"),
    ],
)
def test_errors_of_bentomls_own_routes_are_json_and_counted(
    server: ServerProcess, client: httpx.Client, method: str, target: str, status: int, says: str
) -> None:
    counted = f'dlops_requests_total{{method="{method}",model="",route="other",status="{status}"}}'
    before = count_of(client, counted)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as opened:
        opened.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\nX-Request-Id: a-1\r\n\r\n".encode())
        response = http.client.HTTPResponse(opened, method=method)
        response.begin()
        assert (response.status, json.loads(response.read())) == (status, {"error": says})
        assert (response.headers["x-content-type-options"], response.headers["x-request-id"]) == ("nosniff", "a-1")
        # The connection is good for another.
        opened.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        response = http.client.HTTPResponse(opened)
        response.begin()
        assert response.status == 200
    assert count_of(client, counted) == before + 1


def test_a_wish_for_websockets_is_passed_over(server: ServerProcess) -> None:
    wish = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }  # fmt: skip
    assert httpx.get(f"{server.url}/v2/health/ready", headers=wish).status_code == 200
    response = httpx.get(f"{server.url}/nothing", headers=wish)
    assert (response.status_code, response.json()) == (404, {"error": "no route GET /nothing"})


def test_junk_is_answered_and_fills_no_log(server: ServerProcess) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as opened:
            opened.sendall(b"no HTTP at all\r\n\r\n")
            response = http.client.HTTPResponse(opened)
            response.begin()
            assert response.status == 400
    assert "Invalid HTTP" not in server.log_path.read_text()


def count_of(client: httpx.Client, series: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(series)), 0.0)


def test_what_no_route_handles_is_answered_in_json_and_not_left_waiting() -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise ValueError("while routes are matched")

    async def refuse(scope, receive, send) -> None:
        assert isinstance(scope["dlops.error"], ValueError)
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    asyncio.run(GuardMiddleware(broken, Guard(None), refuse)(scope, None, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]


@pytest.fixture
def told() -> list[dict]:
    return []


def limited(app, told: list[dict], *, within_s: float) -> None:
    """What `app` tells a client whose request BentoML gives that long."""

    async def refuse(scope, receive, send) -> None:
        response = error_response(scope["dlops.error"])
        await response(scope, receive, send)

    async def send(message: dict) -> None:
        told.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    asyncio.run(TimeLimit(GuardMiddleware(app, Guard(None), refuse), timeout=within_s)(scope, None, send))


def test_what_does_not_begin_in_time_is_cancelled_and_answered(told) -> None:
    cancelled = []

    async def slow(scope, receive, send) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    limited(slow, told, within_s=0.05)
    assert cancelled
    start, body = told
    assert start["status"] == 504
    assert (b"x-content-type-options", b"nosniff") in start["headers"]
    assert json.loads(body["body"]) == {"error": "no answer within 0.05 s"}


def test_what_has_begun_in_time_may_take_as_long_as_it_needs(told) -> None:
    async def streaming(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"all"})

    limited(streaming, told, within_s=0.05)
    assert [message["type"] for message in told] == ["http.response.start", "http.response.body"]
    assert told[1]["body"] == b"all"


def test_what_is_said_too_late_is_not_said_twice(told) -> None:
    async def stubborn(scope, receive, send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    limited(stubborn, told, within_s=0.05)
    assert [message.get("status") for message in told if message["type"] == "http.response.start"] == [504]


def test_bentomls_time_limit_is_kept_by_us(digits_artifact) -> None:
    """Its own keeps every request until the limit has passed."""
    with ServerProcess(digits_artifact, env={"BENTOML_CONFIG_OPTIONS": "services.dlops.traffic.timeout=1"}) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"the rest does not come")
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (504, {"error": "no answer within 1 s"})
        connection.close()
        assert httpx.get(f"{server.url}/v2").status_code == 200
