"""A real server with several models, in versions that change while clients ask."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from dlops.artifact import Artifact
from dlops.serve.launch import ServerProcess
from tests.browser import Browser, Tab

WORKERS = 2


@pytest.fixture(scope="module")
def root(digits_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for where in ("digits/1", "numbers/5"):
        shutil.copytree(digits_artifact.directory, root / where)
    return root


@pytest.fixture(scope="module")
def several(root: Path) -> Iterator[ServerProcess]:
    with ServerProcess(root, workers=WORKERS, grpc_port=0, env={"DLOPS_MODEL_CONTROL": "explicit"}) as running:
        # Ready is the server as soon as one of its workers is.
        deadline = time.monotonic() + 60
        while f"dlops_ready {WORKERS}.0" not in httpx.get(f"{running.url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield running


@pytest.fixture
def triton(several: ServerProcess) -> Iterator[tritonclient.http.InferenceServerClient]:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{several.port}", concurrency=4)
    yield client
    client.close()


@pytest.fixture
def triton_grpc(several: ServerProcess) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{several.grpc_port}")
    yield client
    client.close()


def asked(client, tools, model: str, version: str = "") -> str:
    """The version that answered."""
    x = np.zeros((1, 1, 8, 8), np.float32)
    tensor = tools.InferInput("image", [1, 1, 8, 8], "FP32")
    tensor.set_data_from_numpy(x)
    result = client.infer(model, [tensor], model_version=version)
    assert result.as_numpy("logits").shape == (1, 10)
    response = result.get_response()
    return response["model_version"] if isinstance(response, dict) else response.model_version


def versions(index) -> dict[tuple[str, str], str]:
    rows = index if isinstance(index, list) else index["models"]
    return {(row["name"], row["version"]): row["state"] for row in rows}


def test_each_is_asked_by_its_name(several: ServerProcess, triton, triton_grpc, digit_pngs) -> None:
    assert asked(triton, tritonclient.http, "numbers") == asked(triton_grpc, tritonclient.grpc, "numbers") == "5"
    assert triton.get_model_metadata("numbers")["versions"] == ["5"]
    names = {one["name"] for one in triton.get_inference_statistics()["model_stats"]}
    assert {"digits", "numbers"} <= names
    assert [one.name for one in triton_grpc.get_inference_statistics("numbers").model_stats] == ["numbers"]
    png = {"Content-Type": "image/png"}
    with httpx.Client(base_url=several.url) as client:
        answer = client.post("/models/numbers/predict", content=digit_pngs[0], headers=png).json()
        assert (answer["model"], answer["version"]) == ("numbers", "5")
        assert client.post("/models/numbers/versions/5/predict", content=digit_pngs[0], headers=png).json() == answer
        refused = client.post("/predict", content=digit_pngs[0], headers=png)
        assert refused.status_code == 400
        assert refused.json()["error"].startswith("which model? this server has digits, numbers")
        for path in ("/models/other/predict", "/models/numbers/versions/4/predict"):
            assert client.post(path, content=digit_pngs[0], headers=png).status_code == 404
        # The server is ready with its first worker; the others come when they have loaded the model.
        wanted, until = f'dlops_instances{{model="numbers"}} {WORKERS}.0', time.monotonic() + 60
        while wanted not in (text := client.get("/metrics").text):
            assert time.monotonic() < until, text
            time.sleep(0.1)
        assert "/models/{name}/versions/{version}/infer" in client.get("/docs.json").text


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_unmodified_clients_load_unload_and_list(
    triton, triton_grpc, root: Path, digits_artifact: Artifact, way: str
) -> None:
    client, tools = (triton, tritonclient.http) if way == "http" else (triton_grpc, tritonclient.grpc)
    options = {} if way == "http" else {"as_json": True}
    name = f"by-{way}"
    shutil.copytree(digits_artifact.directory, root / name / "1")
    assert versions(client.get_model_repository_index(**options))[name, "1"] == "UNAVAILABLE"
    assert not client.is_model_ready(name)
    client.load_model(name)
    # Whichever worker is asked.
    for _ in range(10):
        assert asked(client, tools, name) == "1"
    assert client.is_model_ready(name, "1")
    assert versions(client.get_model_repository_index(**options))[name, "1"] == "READY"
    client.unload_model(name)
    assert not client.is_model_ready(name)
    with pytest.raises(InferenceServerException, match=f"unknown model '{name}'"):
        asked(client, tools, name)
    with pytest.raises(InferenceServerException, match="no model 'nothing' is in the repository"):
        client.load_model("nothing")
    with pytest.raises(InferenceServerException, match="from the repository alone"):
        client.load_model("digits", config='{"max_batch_size": 1}')


def test_a_version_that_fails_leaves_the_other_serving(triton, root: Path, make_digits_artifact) -> None:
    make_digits_artifact(root / "numbers/6", scale=1.5)
    with pytest.raises(InferenceServerException, match="outputs differ from the reference"):
        triton.load_model("numbers")
    for _ in range(10):
        assert asked(triton, tritonclient.http, "numbers") == "5"
    shutil.rmtree(root / "numbers/6")


def test_no_request_is_lost_while_a_version_takes_the_place_of_another(
    several: ServerProcess, root: Path, digits_artifact: Artifact, triton
) -> None:
    """Clients that never stop, over binary tensors, JSON and gRPC, by connections that stay and new ones."""
    stop, counts, failed = threading.Event(), dict.fromkeys(("http", "grpc", "json"), 0), []
    seen: set[str] = set()
    document = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0] * 64}]}

    def go_on(way: str, ask) -> None:
        while not stop.is_set():
            try:
                seen.add(ask())
                counts[way] += 1
            except Exception as error:
                failed.append(f"{way}: {error!r}")
                return

    def by_json() -> str:
        response = new_each_time.post("/v2/models/digits/infer", json=document)
        return str(response.raise_for_status().json()["model_version"])

    new_each_time = httpx.Client(base_url=several.url, headers={"Connection": "close"})
    one = tritonclient.http.InferenceServerClient(f"127.0.0.1:{several.port}")
    other = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{several.grpc_port}")
    ways = {
        "http": lambda: asked(one, tritonclient.http, "digits"),
        "grpc": lambda: asked(other, tritonclient.grpc, "digits"),
        "json": by_json,
    }
    threads = [threading.Thread(target=go_on, args=way) for way in ways.items()]
    for thread in threads:
        thread.start()
    try:
        for version in ("2", "3"):
            shutil.copytree(digits_artifact.directory, root / "digits" / version)
            triton.load_model("digits")
            for _ in range(10):
                assert asked(triton, tritonclient.http, "digits") == version
            if failed:
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for client in (new_each_time, one, other):
            client.close()
    assert not failed
    assert seen == {"1", "2", "3"}
    assert all(count > 10 for count in counts.values()), counts


def test_the_page_shows_each_of_them(several: ServerProcess, browser: Browser) -> None:
    tab = Tab(browser)
    tab.be(width=1100)
    try:
        tab.visit(f"{several.url}/")
        tab.wait_for("document.querySelectorAll('#models option').length >= 2")
        assert "digits" in tab.tell("document.getElementById('title').textContent")
        tab.tell(
            "(() => { const models = document.getElementById('models'); models.value = 'numbers'; "
            "models.dispatchEvent(new Event('change')); return true; })()"
        )
        tab.wait_for("document.getElementById('title').textContent === 'numbers/onnx-fp32'")
        assert "version 5" in tab.tell("document.getElementById('about').textContent")
        tab.wait_for("document.querySelectorAll('#samples button').length === 8")
        tab.tell("(document.querySelector('#samples button').click(), true)")
        tab.wait_for("document.querySelectorAll('#result .label').length > 0")
        curl = tab.tell("document.getElementById('curl').textContent")
        assert "/models/numbers/predict" in curl
        shell = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=30, check=True)
        assert json.loads(shell.stdout)["model"] == "numbers"
    finally:
        tab.close()
