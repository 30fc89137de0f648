"""What images cost is bounded: pixels a request, pixels waiting, and no work for nobody."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from dlops.environment import available_cores
from dlops.errors import InputError
from dlops.jpeg_scans import count_scans
from dlops.preprocess import Decode, Preprocess, Resize, Scale
from dlops.runtimes import SessionOptions, open_session
from dlops.serve.cells import Cells
from dlops.serve.decoding import count_pixels
from dlops.serve.metrics import Metrics
from dlops.serve.model import ServedModel
from dlops.serve.routes import Application
from dlops.serve.settings import Settings

BOUNDARY = {"Content-Type": "multipart/form-data; boundary=x"}


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def form(*pictures: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return b"".join(head + one + b"\r\n" for one in pictures) + b"--x--\r\n"


@pytest.fixture
def application(digits_artifact, monkeypatch) -> Iterator[Application]:
    from dlops.runtimes import SessionOptions, open_session

    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    settings = Settings(max_pixels=1_000_000)
    app = Application(settings)
    session = open_session(digits_artifact, SessionOptions(device="cpu", threads=1))
    app.models.replace([ServedModel(digits_artifact, [session], settings, app.metrics)])
    yield app
    app.models.only().close()


@pytest.fixture
def held(monkeypatch) -> Iterator[threading.Event]:
    """Decoding waits for it."""
    import dlops.serve.decoding

    gate, real = threading.Event(), dlops.serve.decoding.to_feed

    def wait_first(*args, **options):
        assert gate.wait(20)
        return real(*args, **options)

    monkeypatch.setattr(dlops.serve.decoding, "to_feed", wait_first)
    yield gate
    gate.set()


@pytest.fixture
def slow(monkeypatch) -> list[float]:
    """Every picture takes 50 ms; when each was begun."""
    begun: list[float] = []
    real = Preprocess.apply

    def apply(self, raw):
        begun.append(time.monotonic())
        time.sleep(0.05)
        return real(self, raw)

    monkeypatch.setattr(Preprocess, "apply", apply)
    return begun


def client_of(app: Application) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app.asgi), base_url="http://test", timeout=30)


def test_a_form_of_pictures_that_are_small_in_the_file_and_huge_decoded_is_refused(client, digit_pngs) -> None:
    huge = picture(8000, 8000)
    assert len(huge) < 10_000
    began = time.monotonic()
    response = client.post("/predict", content=form(*[huge] * 16), headers=BOUNDARY)
    assert time.monotonic() - began < 1
    assert (response.status_code, response.json()["field"]) == (400, "inputs[1]")
    assert "at most 64000000 allowed in one request" in response.json()["error"]
    assert client.post("/predict", content=form(*digit_pngs), headers=BOUNDARY).status_code == 200


def test_pixels_are_those_of_the_largest_step() -> None:
    steps = (Decode(mode="L"), Resize(size=100), Scale())
    preprocess = Preprocess(input="image", shape=(1, 100, 100), steps=steps)
    assert count_pixels(preprocess, [picture(200, 300)], limit=10**9) == 60_000
    # 1 × 5000 becomes 100 × 500,000.
    assert count_pixels(preprocess, [picture(1, 5000)], limit=10**9) == 50_000_000
    assert count_pixels(preprocess, [[[0] * 5000]], limit=10**9) == 50_000_000
    with pytest.raises(InputError) as caught:
        count_pixels(preprocess, [picture(200, 300), b"no picture", picture(1, 5000)], limit=50_000_000)
    assert caught.value.field == "inputs[2]"


def test_where_too_many_pictures_wait_requests_are_turned_away_until_they_are_decoded(application, held) -> None:
    large, small = picture(1000, 1000), picture(8, 8)

    async def scenario() -> None:
        async with client_of(application) as client:
            ask = lambda content: asyncio.create_task(  # noqa: E731
                client.post("/predict", content=content, headers={"Content-Type": "image/png"})
            )
            taken = [ask(large) for _ in range(4)]
            while application.models.only().decoder._pending_pixels < 4_000_000:
                await asyncio.sleep(0.01)
            refused = await ask(small)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert "wait to be decoded" in refused.json()["error"]
            held.set()
            assert [response.status_code for response in await asyncio.gather(*taken)] == [200] * 4
            assert (await ask(large)).status_code == 200

    asyncio.run(scenario())
    assert application.models.only().decoder._pending_pixels == 0


def test_a_deadline_ends_the_work_between_two_pictures(application, slow, digit_pngs) -> None:
    async def scenario() -> None:
        async with client_of(application) as client:
            headers = BOUNDARY | {"X-Request-Timeout-Ms": "150"}
            response = await client.post("/predict", content=form(*digit_pngs[:20]), headers=headers)
            assert response.status_code == 504
            assert "deadline" in response.json()["error"]

    asyncio.run(scenario())
    assert 1 <= len(slow) <= 5


def test_a_late_request_that_waits_for_a_thread_hears_of_it_at_once(application, held, digit_pngs) -> None:
    async def scenario() -> None:
        async with client_of(application) as client:
            usual = [
                asyncio.create_task(client.post("/predict", content=form(digit_pngs[0]), headers=BOUNDARY))
                for _ in range(available_cores())
            ]
            while len(application.models.only().decoder._threads._threads) < len(usual):
                await asyncio.sleep(0.01)
            late = await client.post(
                "/predict", content=form(digit_pngs[1]), headers=BOUNDARY | {"X-Request-Timeout-Ms": "100"}
            )
            assert late.status_code == 504
            assert "deadline" in late.json()["error"]
            # None of the others has gone on meanwhile.
            assert not any(one.done() for one in usual)
            held.set()
            assert [response.status_code for response in await asyncio.gather(*usual)] == [200] * len(usual)

    asyncio.run(scenario())
    assert application.models.only().decoder._pending_pixels == 0


def test_nothing_more_is_decoded_for_a_client_that_has_left(application, slow, digit_pngs) -> None:
    messages = [{"type": "http.request", "body": form(*digit_pngs[:20]), "more_body": False}]
    sent: list[dict] = []

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.15)
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async def scenario() -> None:
        scope = {
            "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in BOUNDARY.items()],
            "http_version": "1.1", "scheme": "http", "root_path": "", "client": ("test", 1), "server": ("test", 80),
            "asgi": {"version": "3.0"},
        }  # fmt: skip
        await asyncio.wait_for(application.asgi(scope, receive, send), 5)
        assert sent[0]["status"] == 499
        await asyncio.sleep(0.2)

    asyncio.run(scenario())
    assert 1 <= len(slow) <= 5
    assert application.models.only().decoder._pending_pixels == 0


def test_what_was_given_up_before_a_thread_came_by_is_not_kept(application, held, digit_pngs) -> None:
    decoder = application.models.only().decoder

    async def scenario() -> None:
        # One for each thread, all of which wait.
        busy = [asyncio.ensure_future(decoder.decode(list(digit_pngs[:1]))) for _ in range(available_cores())]
        await asyncio.sleep(0.1)
        raws = list(digit_pngs[:4])
        waiting = asyncio.ensure_future(decoder.decode(raws))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert raws == []
        held.set()
        await asyncio.gather(*busy)

    asyncio.run(scenario())


def progressive(scans: int) -> bytes:
    """A picture with one of its scans so often."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (scans - content.count(b"\xff\xda") + 1) + content[-2:]


def test_a_jpeg_whose_scans_go_on_and_on_is_refused_unread(client) -> None:
    for scans, status in ((10, 200), (100, 200), (101, 400), (150, 400)):
        began = time.monotonic()
        answer = client.post("/predict", content=progressive(scans), headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == status, answer.text
        assert time.monotonic() - began < 5
    assert "over 100 scans" in answer.text


def test_scans_are_counted_as_the_decoder_meets_them() -> None:
    plain = progressive(10)
    assert count_scans(plain) == (10, True)
    # A preview in the metadata, and what follows the picture's end, are no scans of it.
    preview = b"\xff\xe1" + (2 + len(plain)).to_bytes(2, "big") + plain
    assert count_scans(plain[:2] + preview + plain[2:] + plain) == (10, True)
    assert count_scans(plain[:-2]) == (10, False)
    assert count_scans(b"\xff\xd8") == (0, False)


def test_where_nothing_says_how_many_rows_wait_64_of_the_largest_requests_do(digits_artifact) -> None:
    session = open_session(digits_artifact, SessionOptions(device="cpu", threads=1))
    for given, most in ((None, 64 * digits_artifact.signature.max_batch), (7, 7)):
        model = ServedModel(digits_artifact, [session], Settings(max_queue_rows=given), Metrics(Cells()))
        assert model.queue._max_rows == most
        model.decoder.close()
