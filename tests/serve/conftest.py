from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlops.artifact import Artifact
from dlops.directory import DirectoryWriter
from dlops.serve.launch import ServerProcess
from tests.browser import Browser, Tab


@pytest.fixture(scope="session")
def server(digits_artifact: Artifact) -> Iterator[ServerProcess]:
    """A real `bentoml serve`, with a small body limit so that tests can reach it."""
    with ServerProcess(digits_artifact, env={"DLOPS_MAX_BODY_BYTES": "200000"}) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    opened = Tab(browser)
    opened.be(width=1100)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def slow_artifact(digits_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The digits artifact, which takes a round of a loop for every whole number in its brightest pixel.

    Pixels reach 1 at most, so its own samples are as fast as ever; a tensor with one of 1e8 takes a minute.
    """
    model = onnx.load(digits_artifact.path("model"))
    scalar = numpy_helper.from_array(np.array(0, np.float32), "zero")
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Cos", ["state"], ["next"])],
        "round",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, []),
        ],
    )
    graph = model.graph
    graph.initializer.append(scalar)
    graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    graph.node[-1].output[0] = "fast"
    graph.node.extend(
        [
            helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0),
            helper.make_node("Cast", ["brightest"], ["rounds"], to=TensorProto.INT64),
            helper.make_node("Loop", ["rounds", "always", "zero"], ["spent"], body=body),
            helper.make_node("Mul", ["spent", "zero"], ["nothing"]),
            helper.make_node("Add", ["fast", "nothing"], ["logits"]),
        ]
    )
    onnx.checker.check_model(model)
    with DirectoryWriter(tmp_path_factory.mktemp("slow") / "digits" / "onnx-fp32") as writer:
        files = {
            "model": writer.add("model.onnx", model.SerializeToString()),
            "samples": writer.add("samples.safetensors", digits_artifact.path("samples").read_bytes()),
        }
        return writer.commit(digits_artifact.model_copy(update={"files": files}))


@pytest.fixture(scope="session")
def slow_request() -> Callable[[float], dict[str, object]]:
    """slow_request(rounds), for /v2/models/digits/infer of the slow artifact: a million take about half a second."""

    def make(rounds: float) -> dict[str, object]:
        data = [0.0] * 63 + [rounds]
        return {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": data}]}

    return make


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A server's own and its key, as uvicorn takes them."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=x -days 2 -keyout key.pem -out own.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return {"ssl_certfile": folder / "own.pem", "ssl_keyfile": folder / "key.pem"}
