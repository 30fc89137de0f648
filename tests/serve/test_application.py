"""The routes over a session that can be held back, without a server: overload, deadlines, clients that leave."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics
from dlops.serve.model import ServedModel
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from tests.serve.held import HeldSession

PNG = {"Content-Type": "image/png"}


@pytest.fixture
def session(digits_artifact) -> HeldSession:
    return HeldSession(digits_artifact.signature)


@pytest.fixture
def application(digits_artifact, session, monkeypatch) -> Iterator[Application]:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(max_queue_rows=2, max_body_bytes=10_000, max_pending_bytes=12_000)
    app = Application(settings)
    app.models.replace([ServedModel(digits_artifact, [session], settings, app.metrics)])
    yield app
    session.gate.set()
    app.models.only().close()


@asynccontextmanager
async def connected(app: Application) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app.asgi)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=10) as client:
        yield client


def test_a_full_queue_answers_429_with_retry_after_and_takes_again(application, session, digit_pngs) -> None:
    async def scenario() -> None:
        async with connected(application) as client:
            ask = lambda: asyncio.create_task(client.post("/predict", content=digit_pngs[0], headers=PNG))  # noqa: E731
            taken = [ask()]
            await asyncio.to_thread(session.entered.wait, 10)
            taken += [ask(), ask()]
            while application.models.only().queue.refusal() is None:
                await asyncio.sleep(0.01)
            refused = await ask()
            assert refused.status_code == 429
            assert refused.headers["Retry-After"] == "1"
            assert "rows wait already" in refused.json()["error"]
            session.gate.set()
            assert [response.status_code for response in await asyncio.gather(*taken)] == [200, 200, 200]
            assert (await ask()).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize("door", ["header", "parameter"])
def test_a_request_past_its_deadline_answers_504_and_is_not_run(application, session, digit_pngs, door: str) -> None:
    x = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0] * 64}

    async def scenario() -> None:
        async with connected(application) as client:
            first = asyncio.create_task(client.post("/predict", content=digit_pngs[0], headers=PNG))
            await asyncio.to_thread(session.entered.wait, 10)
            if door == "header":
                late = client.post("/predict", content=digit_pngs[0], headers=PNG | {"X-Request-Timeout-Ms": "20"})
            else:
                document = {"inputs": [x], "parameters": {"timeout": 20_000}}
                late = client.post("/v2/models/digits/infer", json=document)
            waiting = asyncio.create_task(late)
            await asyncio.sleep(0.1)
            session.gate.set()
            assert (await first).status_code == 200
            response = await waiting
            assert response.status_code == 504
            assert "deadline" in response.json()["error"]

    asyncio.run(scenario())
    assert session.rows == [1]


def test_a_client_that_leaves_takes_its_request_out_of_the_queue(application, session, digit_pngs) -> None:
    async def leave_after_sending() -> None:
        messages = [
            {"type": "http.request", "body": digit_pngs[0], "more_body": False},
            {"type": "http.disconnect"},
        ]

        async def receive():
            if len(messages) == 1:
                await asyncio.sleep(0.1)
            return messages.pop(0)

        async def send(message) -> None:
            sent.append(message)

        sent: list[dict] = []
        scope = {
            "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
            "headers": [(b"content-type", b"image/png")], "http_version": "1.1", "scheme": "http", "root_path": "",
            "client": ("test", 1), "server": ("test", 80), "asgi": {"version": "3.0"},
        }  # fmt: skip
        await asyncio.wait_for(application.asgi(scope, receive, send), 5)
        assert sent[0]["status"] == 499

    async def scenario() -> None:
        async with connected(application) as client:
            first = asyncio.create_task(client.post("/predict", content=digit_pngs[0], headers=PNG))
            await asyncio.to_thread(session.entered.wait, 10)
            await leave_after_sending()
            session.gate.set()
            assert (await first).status_code == 200

    asyncio.run(scenario())
    assert session.rows == [1]


def test_bodies_held_at_once_are_bounded(application, session) -> None:
    large = b"P5 90 90 255\n" + bytes(8100)

    async def scenario() -> None:
        async with connected(application) as client:
            ask = lambda: client.post("/predict", content=large, headers=PNG)  # noqa: E731
            first = asyncio.create_task(ask())
            await asyncio.to_thread(session.entered.wait, 10)
            refused = await ask()
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            session.gate.set()
            assert (await first).status_code == 200
            assert (await ask()).status_code == 200

    asyncio.run(scenario())


def test_a_runtime_that_fails_answers_500_without_its_text(application, session, digit_pngs, capfd) -> None:
    session.gate.set()
    session.broken = True

    async def scenario() -> None:
        async with connected(application) as client:
            response = await client.post("/predict", content=digit_pngs[0], headers=PNG)
            assert response.status_code == 500
            assert "secret" not in response.text
            session.broken = False
            assert (await client.post("/predict", content=digit_pngs[0], headers=PNG)).status_code == 200

    asyncio.run(scenario())
    assert "the secret text of a runtime" in capfd.readouterr().err


def test_nothing_is_ready_before_the_model_is(digits_artifact, digit_pngs) -> None:
    app = Application(Settings())

    async def scenario() -> None:
        async with connected(app) as client:
            assert (await client.get("/v2/health/live")).status_code == 200
            for path in ("/v2/health/ready", "/v2/models/digits/ready", "/v2/models/digits"):
                response = await client.get(path)
                assert response.status_code == 503, path
                assert response.json()["error"]
            assert (await client.post("/predict", content=digit_pngs[0], headers=PNG)).status_code == 503
            assert (await client.get("/docs.json")).status_code == 200

    asyncio.run(scenario())


def test_requests_during_shutdown_answer_503(application, session, digit_pngs) -> None:
    session.gate.set()
    application.models.only().queue.close()

    async def scenario() -> None:
        async with connected(application) as client:
            response = await client.post("/predict", content=digit_pngs[0], headers=PNG)
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")

    asyncio.run(scenario())


def test_dynamic_int8_is_never_batched(make_digits_artifact, tmp_path) -> None:
    artifact = make_digits_artifact(tmp_path / "a", precision="int8dyn")
    served = ServedModel(artifact, [HeldSession(artifact.signature)], Settings(), Metrics(Cells()))
    assert not served.queue.batching
    served.close()


def test_a_session_that_fails_again_and_again_is_opened_anew(digits_artifact, session, digit_pngs, monkeypatch) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    session.gate.set()
    settings, fresh = Settings(), HeldSession(digits_artifact.signature)
    fresh.gate.set()
    opened: list[HeldSession] = []

    def renew(old: HeldSession) -> HeldSession:
        if not old.broken:
            return old
        if not opened:
            raise RuntimeError("no memory for another one")
        return opened[0]

    app = Application(settings)
    model = ServedModel(digits_artifact, [session], settings, app.metrics, renew=renew)
    app.models.replace([model])

    async def scenario() -> None:
        async with connected(app) as client:

            async def ask() -> int:
                return (await client.post("/predict", content=digit_pngs[0], headers=PNG)).status_code

            async def ready() -> list[int]:
                paths = ("/v2/health/ready", "/v2/models/digits/ready")
                return [(await client.get(path)).status_code for path in paths]

            assert await ask() == 200
            # Two that are at fault themselves, and one that is not: nothing is wrong with the session.
            nines = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [9] * 64}]}
            for _ in range(4):
                assert (await client.post("/v2/models/digits/infer", json=nines)).status_code == 500
            assert await ready() == [200, 200]
            session.broken = True
            answers = [await ask() for _ in range(8)]
            assert answers[0] == 500
            assert answers[-1] == 503
            assert await ready() == [503, 503]
            assert not app.is_ready
            assert 'dlops_broken_instances{model="digits"} 1.0' in (await client.get("/metrics")).text
            # It is tried again by itself.
            opened.append(fresh)
            monkeypatch.setattr("dlops.serve.routes._EXAMINE_TURNS", 1)
            keeping = asyncio.ensure_future(app.keep_gauges())
            async with asyncio.timeout(10):
                while not app.is_ready:
                    await asyncio.sleep(0.01)
            keeping.cancel()
            assert await ready() == [200, 200]
            assert await ask() == 200
            assert fresh.rows

    asyncio.run(scenario())
    model.close()


@pytest.mark.parametrize(
    ("limit", "pictures", "size"),
    # Of three rows the outputs alone are larger, of one its JSON.
    [(100, 3, "120"), (100, 1, r"\d{3}"), (600, 4, r"\d{4}"), (600, 1, None)],
    ids=["outputs", "answer", "answers", "small"],
)
def test_an_answer_of_predict_has_a_limit_too(
    monkeypatch, digits_artifact, session, digit_pngs, limit: int, pictures: int, size: str | None
) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(max_response_bytes=limit)
    app = Application(settings)
    app.models.replace([ServedModel(digits_artifact, [session], settings, app.metrics)])
    session.gate.set()

    async def scenario() -> httpx.Response:
        async with connected(app) as client:
            return await client.post("/predict", files=[("image", png) for png in digit_pngs[:pictures]])

    response = asyncio.run(scenario())
    app.models.only().close()
    if size is None:
        assert response.status_code == 200
        assert len(response.content) <= limit
    else:
        assert (response.status_code, response.json()["field"]) == (400, "inputs")
        assert re.search(f"would have some {size} bytes, at most {limit} are sent", response.json()["error"])
