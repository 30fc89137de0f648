"""The page at / in a real browser: people ask, see the answer, where the time went, and the load."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from dlops.artifact import Artifact
from dlops.directory import DirectoryWriter
from dlops.serve import pages
from dlops.serve.launch import ServerProcess
from dlops.serve.routes import Application
from dlops.serve.settings import Settings
from tests.browser import Tab


@pytest.fixture
def visit(tab: Tab, server) -> Callable[[str], Tab]:
    """visit("?sample=0") opens the page of the digits service."""

    def go(query: str = "") -> Tab:
        tab.visit(f"{server.url}/{query}")
        tab.wait_for("document.getElementById('title').textContent.includes('digits')")
        return tab

    return go


def labels_in(tab: Tab) -> list[str]:
    tab.wait_for("document.querySelectorAll('#result .label').length > 0")
    return tab.tell("[...document.querySelectorAll('#result .label span')].map((one) => one.textContent)")


def test_it_says_what_is_served_and_asks_for_nothing_elsewhere(visit, server) -> None:
    page = visit()
    about = page.tell("document.getElementById('about').textContent")
    assert "CPUExecutionProvider" in about
    assert "version 1" in about
    page.wait_for("document.querySelectorAll('#samples img').length === 8")
    page.wait_for("[...document.querySelectorAll('#samples img')].every((one) => one.naturalWidth === 8)")
    asked = page.tell("performance.getEntriesByType('resource').map((one) => one.name)")
    assert asked
    assert all(one.startswith(server.url) for one in asked)


def test_a_sample_that_came_with_the_model_is_answered_as_predict_does(visit, client, digits_artifact) -> None:
    page = visit("?sample=2")
    png = pages.sample(digits_artifact, 2)
    assert png is not None
    (expected,) = client.post("/predict", content=png.content, headers={"Content-Type": png.kind}).json()["predictions"]
    assert labels_in(page) == [one["label"] for one in expected["top"]]
    first = page.tell("document.querySelector('#result .label b').textContent")
    assert first == f"{100 * expected['probability']:.1f} %"
    # Eight pixels are drawn large enough to be seen.
    assert page.tell("document.getElementById('canvas').width") == 200
    parts = page.tell("document.getElementById('timing-legend').textContent")
    for part in ("receive", "decode", "queue", "copy", "compute", "encode", "in all"):
        assert part in parts
    assert json.loads(page.tell("document.getElementById('raw').textContent"))["model"] == "digits"
    command = page.tell("document.getElementById('curl').textContent")
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(answer.stdout)["predictions"] == [expected]


def test_a_file_is_asked_about_and_the_curl_line_gives_the_same(visit, digit_pngs, tmp_path: Path) -> None:
    page = visit()
    path = tmp_path / "it's three.png"
    path.write_bytes(digit_pngs[5])
    page.choose_file("#file", path)
    found = labels_in(page)
    command = page.tell("document.getElementById('curl').textContent")
    answer = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    (prediction,) = json.loads(answer.stdout)["predictions"]
    assert [one["label"] for one in prediction["top"]] == found


def test_a_model_that_is_not_there_is_said_and_not_waited_for(tab: Tab, server) -> None:
    tab.visit(f"{server.url}/?model=nope")
    tab.wait_for("document.getElementById('about').textContent.includes('nope')")
    said = tab.tell("document.getElementById('about').textContent")
    assert "unknown model" in said
    assert "trying again" not in said


def test_the_curl_line_of_a_guarded_server_shows_the_token(tab: Tab, digits_artifact) -> None:
    token = "the token of the test"
    with ServerProcess(digits_artifact, env={"DLOPS_TOKEN": token}) as guarded:
        tab.ask("Network.enable")
        tab.ask("Network.setExtraHTTPHeaders", headers={"Authorization": f"Bearer {token}"})
        tab.visit(f"{guarded.url}/?sample=0")
        found = labels_in(tab)
        command = tab.tell("document.getElementById('curl').textContent")
        assert token not in command
        env = {**os.environ, "DLOPS_TOKEN": token}
        answer = subprocess.run(["bash", "-c", command], capture_output=True, env=env, timeout=60, check=True)
    assert [one["label"] for one in json.loads(answer.stdout)["predictions"][0]["top"]] == found


def test_an_image_that_cannot_be_read_is_said_and_the_next_one_works(visit, digit_pngs, tmp_path: Path) -> None:
    page = visit()
    for name, content in (("broken.png", b"no image <b>at all</b>"), ("good.png", digit_pngs[0])):
        (tmp_path / name).write_bytes(content)
    page.choose_file("#file", tmp_path / "broken.png")
    page.wait_for("!document.getElementById('error').hidden")
    assert page.tell("document.getElementById('error').textContent").startswith("400: ")
    assert page.tell("document.querySelectorAll('#result *').length") == 0
    page.choose_file("#file", tmp_path / "good.png")
    assert labels_in(page)
    assert page.tell("document.getElementById('error').hidden")


def test_load_appears_in_the_plots(visit, client, digit_pngs) -> None:
    page = visit()
    page.wait_for("document.querySelectorAll('#queue .line').length > 0")
    for _ in range(3):
        for png in digit_pngs:
            client.post("/predict", content=png, headers={"Content-Type": "image/png"})
        if "ms" in page.tell("document.getElementById('latency-text').textContent"):
            break
    text = page.wait_for(
        "document.getElementById('latency-text').textContent.includes('p99')"
        " && document.getElementById('latency-text').textContent"
    )
    assert "requests/s" in text
    assert page.tell("document.querySelectorAll('#latency .line').length") == 2


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (360, False)])
def test_nothing_is_cut_off_on_wide_and_narrow_screens(visit, tab, width: int, dark: bool) -> None:
    tab.be(width=width, dark=dark)
    page = visit("?sample=1")
    labels_in(page)
    assert page.tell("document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def numbers_server(digits_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same model for people who have tensors."""
    samples = digits_artifact.samples()
    with DirectoryWriter(tmp_path_factory.mktemp("numbers") / "digits" / "onnx-fp32") as writer:
        own = replace(samples, raw=tuple(samples.inputs["image"]))
        files = {
            "model": writer.add_file("model.onnx", digits_artifact.path("model")),
            "samples": writer.add("samples.safetensors", own.to_bytes()),
        }
        artifact = writer.commit(digits_artifact.model_copy(update={"preprocess": None, "files": files}))
    with ServerProcess(artifact) as running:
        yield running


def test_numbers_are_typed_and_what_is_no_json_is_said(tab, numbers_server) -> None:
    tab.visit(numbers_server.url)
    tab.wait_for("!document.getElementById('numbers-input').hidden")
    tab.wait_for("document.querySelectorAll('#samples button').length > 0")
    tab.tell("document.querySelector('#samples button').click()")
    first = labels_in(tab)
    tab.tell(
        "document.getElementById('numbers').value = '[1, 2'; document.querySelector('#numbers-input button').click()"
    )
    tab.wait_for("document.getElementById('error').textContent.startsWith('this is no JSON')")
    tab.tell("document.querySelector('#samples button').click()")
    assert labels_in(tab) == first


def test_a_sample_is_an_image_or_numbers_and_there_are_no_more_than_said(client) -> None:
    count = client.get("/ui/model.json").json()["samples"]
    for number in range(count):
        image = Image.open(io.BytesIO(client.get(f"/ui/samples/{number}").content))
        assert np.asarray(image).shape == (8, 8)
    assert client.get(f"/ui/samples/{count}").status_code == 404
    assert client.get("/ui/samples/one").status_code == 404
    assert client.get("/ui/page.py").status_code == 404


def test_before_the_model_is_loaded_the_page_is_there_and_says_so(monkeypatch) -> None:
    monkeypatch.delenv("DLOPS_CELLS_DIR", raising=False)
    application = Application(Settings())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=application.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.get("/")).status_code == 200
            assert (await client.get("/ui/live.json")).json()["requests"] == 0
            return await client.get("/ui/model.json")

    response = asyncio.run(ask())
    assert response.status_code == 503
    assert "not ready" in response.json()["error"]
