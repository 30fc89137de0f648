"""One suite for two servers: what a client sees of ours is what it sees of a real tritonserver."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from dlops.artifact import Artifact, open_artifact
from dlops.signature import BFLOAT16
from tests.benchmarks.peers.environments import is_made
from tests.conformance.servers import DTYPES, Server, make_halves, make_types, ours, tritons


@pytest.fixture(scope="module", params=["dlops", "tritonserver"])
def server(
    request: pytest.FixtureRequest, digits_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    for where in ("digits/1", "digits/2", "spare/1"):
        shutil.copytree(digits_artifact.directory, models / where)
    types = make_types(models / "types" / "1")
    made = make_halves(tmp_path_factory.mktemp("checkpoint") / "run", tmp_path_factory.mktemp("artifacts"))
    shutil.copytree(made.directory, models / "halves" / "1")
    halves = open_artifact(models / "halves" / "1")
    if request.param == "dlops":
        with ours(models) as running:
            yield running
        return
    if not is_made("tritonserver"):
        pytest.skip("tritonserver is not installed: python tests/benchmarks/peers/environments.py")
    artifacts = {"digits": digits_artifact, "spare": digits_artifact, "types": types, "halves": halves}
    with tritons(models, tmp_path_factory.mktemp("triton"), artifacts) as running:
        yield running


@pytest.fixture(scope="module")
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def x(digits_artifact: Artifact) -> np.ndarray:
    return digits_artifact.samples().inputs["image"]


@pytest.fixture(scope="module")
def logits(digits_artifact: Artifact) -> np.ndarray:
    return digits_artifact.samples().outputs["logits"]


class Blocking:
    """tritonclient.http and tritonclient.grpc."""

    def __init__(self, client: Any, tools: Any) -> None:
        self._client, self._tools = client, tools
        self.is_grpc = tools is tritonclient.grpc

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        if self.is_grpc and name.startswith("get_"):
            options["as_json"] = True
        return getattr(self._client, name)(*args, **options)

    def input(self, name: str, array: np.ndarray, datatype: str | None = None) -> Any:
        tensor = self._tools.InferInput(
            name, list(array.shape), datatype or tritonclient.utils.np_to_triton_dtype(array.dtype)
        )
        tensor.set_data_from_numpy(array)
        return tensor

    def output(self, name: str, **options: Any) -> Any:
        return self._tools.InferRequestedOutput(name, **options)

    def infer(self, model: str, inputs: list[Any], **options: Any) -> Any:
        return self.call("infer", model, inputs, **options)

    def close(self) -> None:
        self._client.close()


class Asynchronous(Blocking):
    """tritonclient.http.aio."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()

        async def connect() -> Any:
            return tritonclient.http.aio.InferenceServerClient(address)

        super().__init__(self._loop.run_until_complete(connect()), tritonclient.http)

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self._loop.run_until_complete(getattr(self._client, name)(*args, **options))

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


@pytest.fixture(scope="module", params=["http", "aio", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Blocking]:
    match request.param:
        case "http":
            made = Blocking(tritonclient.http.InferenceServerClient(server.http), tritonclient.http)
        case "aio":
            made = Asynchronous(server.http)
        case _:
            made = Blocking(tritonclient.grpc.InferenceServerClient(server.grpc), tritonclient.grpc)
    yield made
    made.close()


def number(told: int | str | None) -> int:
    """protobuf's JSON has numbers of 64 bits as text, and leaves zeros out."""
    return int(told or 0)


def numbers(told: list[int | str]) -> list[int]:
    return [number(one) for one in told]


def test_health(client: Blocking) -> None:
    assert client.call("is_server_live")
    assert client.call("is_server_ready")
    for version in ("", "1", "2"):
        assert client.call("is_model_ready", "digits", version)
    for name, version in (("digits", "3"), ("nothing", ""), ("spare", "")):
        assert not client.call("is_model_ready", name, version)


def test_metadata(client: Blocking) -> None:
    server = client.call("get_server_metadata")
    assert {"name", "version"} <= set(server)
    assert {
        "classification", "model_repository", "model_repository(unload_dependents)", "model_configuration",
        "binary_tensor_data", "statistics",
    } <= set(server["extensions"])  # fmt: skip
    model = client.call("get_model_metadata", "digits")
    assert (model["name"], model["versions"]) == ("digits", ["1", "2"])
    (image,), (logits,) = model["inputs"], model["outputs"]
    assert (image["name"], image["datatype"], numbers(image["shape"])) == ("image", "FP32", [-1, 1, 8, 8])
    assert (logits["name"], logits["datatype"], numbers(logits["shape"])) == ("logits", "FP32", [-1, 10])
    types = client.call("get_model_metadata", "types")
    assert [one["datatype"] for one in types["inputs"]] == [
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"
    ]  # fmt: skip
    with pytest.raises(InferenceServerException):
        client.call("get_model_metadata", "nothing")


def test_config(client: Blocking) -> None:
    config = client.call("get_model_config", "digits")
    config = config.get("config", config)
    assert (config["name"], config["max_batch_size"]) == ("digits", 64)
    (image,) = config["input"]
    assert (image["name"], image["data_type"], numbers(image["dims"])) == ("image", "TYPE_FP32", [1, 8, 8])


def test_statistics(client: Blocking, x: np.ndarray) -> None:
    def of(version: str) -> dict[str, Any]:
        found = client.call("get_inference_statistics", "digits", version)["model_stats"]
        (one,) = [model for model in found if model["version"] == version]
        return one

    before = of("1")
    for _ in range(3):
        client.infer("digits", [client.input("image", x[:4])], model_version="1")
    after = of("1")
    assert number(after["inference_count"]) - number(before.get("inference_count")) == 12
    parts = after["inference_stats"]
    assert number(parts["success"]["count"]) - number(before["inference_stats"].get("success", {}).get("count")) == 3
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert number(parts[part]["ns"]) > 0, part
    listed = {(one["name"], one["version"]) for one in client.call("get_inference_statistics")["model_stats"]}
    assert {("digits", "1"), ("digits", "2"), ("types", "1")} <= listed
    assert {one["version"] for one in client.call("get_inference_statistics", "digits")["model_stats"]} == {"1", "2"}


@pytest.mark.parametrize("version", ["", "1", "2"])
def test_infer_in_the_newest_version_and_in_each(
    client: Blocking, x: np.ndarray, logits: np.ndarray, version: str
) -> None:
    result = client.infer("digits", [client.input("image", x)], model_version=version, request_id="an id")
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-4, atol=1e-4)
    response = result.get_response()
    told = response if isinstance(response, dict) else {"id": response.id, "model_version": response.model_version}
    assert (told["id"], told["model_version"]) == ("an id", version or "2")


def test_every_datatype_comes_back_as_it_was(client: Blocking) -> None:
    draw = np.random.default_rng(0)
    arrays = {}
    for dtype in DTYPES:
        kind = np.dtype(dtype)
        if kind.kind == "f":
            # Masks have infinities in them.
            arrays[dtype] = np.array([[np.nan, np.inf], [-np.inf, 0], draw.normal(size=2)], kind)
        elif kind.kind == "b":
            arrays[dtype] = draw.random((3, 2)) > 0.5
        else:
            limits = np.iinfo(kind)
            arrays[dtype] = np.array([[limits.min, limits.max], [0, 1], [2, 3]], kind)
    result = client.infer("types", [client.input(f"in_{dtype}", array) for dtype, array in arrays.items()])
    for dtype, array in arrays.items():
        found = result.as_numpy(f"out_{dtype}")
        assert found.dtype == (np.uint8 if dtype == "bool" else array.dtype)
        np.testing.assert_array_equal(found, array)


def test_bfloat16_comes_back_as_it_was(client: Blocking) -> None:
    told = client.call("get_model_metadata", "halves")
    assert [(one["datatype"], numbers(one["shape"])) for one in (*told["inputs"], *told["outputs"])] == [
        ("BF16", [-1, 2])
    ] * 2
    config = client.call("get_model_config", "halves")
    assert config.get("config", config)["input"][0]["data_type"] == "TYPE_BF16"
    values = np.array([[1.5, -2.25], [1e30, -1e-30], [0, 448]], BFLOAT16)
    # Some versions of the client take and give float32 for it, which is the same numbers.
    taken = values.astype(tritonclient.utils.triton_to_np_dtype("BF16"))
    result = client.infer("halves", [client.input("x", taken, "BF16")])
    np.testing.assert_array_equal(result.as_numpy("logits").astype(np.float32), values.astype(np.float32))
    with pytest.raises(InferenceServerException):
        client.infer("halves", [client.input("x", values.astype(np.float32), "FP32")])


def test_the_outputs_that_are_asked_for_in_their_order(client: Blocking) -> None:
    inputs = [client.input(f"in_{dtype}", np.ones((1, 2), dtype)) for dtype in DTYPES]
    asked = ["out_int64", "out_bool"]
    result = client.infer("types", inputs, outputs=[client.output(name) for name in asked])
    response = result.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [one["name"] if isinstance(one, dict) else one.name for one in outputs]
    assert sorted(names) == sorted(asked)


@pytest.mark.parametrize("count", [1, 3, 10, 12])
def test_classification(client: Blocking, x: np.ndarray, logits: np.ndarray, count: int) -> None:
    result = client.infer("digits", [client.input("image", x)], outputs=[client.output("logits", class_count=count)])
    found = result.as_numpy("logits")
    assert found.shape == (len(x), min(count, 10))
    for row, values in zip(found, logits, strict=True):
        parts = [text.decode().split(":") for text in row]
        order = np.argsort(-values)[:count]
        assert [int(index) for _, index, _ in parts] == order.tolist()
        assert [label for _, _, label in parts] == [str(index) for index in order]
        np.testing.assert_allclose([float(value) for value, _, _ in parts], values[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "ask",
    [
        lambda c, x: c.infer("nothing", [c.input("image", x)]),
        lambda c, x: c.infer("digits", [c.input("image", x)], model_version="9"),
        lambda c, x: c.infer("spare", [c.input("image", x)]),
        lambda c, x: c.infer("digits", [c.input("picture", x)]),
        lambda c, x: c.infer("digits", [c.input("image", x.astype(np.float64))]),
        lambda c, x: c.infer("digits", [c.input("image", x.reshape(len(x), 64))]),
        lambda c, x: c.infer("digits", [c.input("image", np.repeat(x, 5, axis=0))]),
        lambda c, x: c.infer("digits", []),
        lambda c, x: c.infer("digits", [c.input("image", x), c.input("image", x)]),
        lambda c, x: c.infer("digits", [c.input("image", x)], outputs=[c.output("labels")]),
        lambda c, x: c.infer("types", [c.input("in_bool", np.ones((1, 2), bool))]),
    ],
    ids=[
        "model", "version", "not loaded", "input", "datatype", "shape", "too many rows", "no input", "twice", "output",
        "some inputs",
    ],
)  # fmt: skip
def test_what_is_wrong_is_an_error_with_a_text_and_the_next_request_works(
    client: Blocking, x: np.ndarray, ask: Callable[[Blocking, np.ndarray], Any]
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, x)
    assert caught.value.message()
    assert client.infer("digits", [client.input("image", x)]).as_numpy("logits").shape == (len(x), 10)


def states(client: Blocking) -> dict[str, str]:
    found = client.call("get_model_repository_index")
    rows = found.get("models", []) if isinstance(found, dict) else found
    return {f"{row['name']}/{row['version']}": row.get("state", "") for row in rows if "version" in row}


def test_the_repository(client: Blocking, x: np.ndarray) -> None:
    assert states(client)["digits/1"] == states(client)["digits/2"] == "READY"
    assert states(client).get("spare/1", "UNAVAILABLE") == "UNAVAILABLE"
    client.call("load_model", "spare")
    assert states(client)["spare/1"] == "READY"
    assert client.call("is_model_ready", "spare")
    assert client.infer("spare", [client.input("image", x)]).as_numpy("logits").shape == (len(x), 10)
    # Once more is no error.
    client.call("load_model", "spare")
    client.call("unload_model", "spare")
    assert not client.call("is_model_ready", "spare")
    deadline = time.monotonic() + 20
    while states(client)["spare/1"] == "UNLOADING":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert states(client)["spare/1"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException):
        client.infer("spare", [client.input("image", x)])
    with pytest.raises(InferenceServerException):
        client.call("load_model", "nothing")


# From here on the bytes themselves, where clients hide what the server does.


def tensor(x: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "FP32", "shape": list(x.shape), **more}


def binary(head: dict[str, Any], data: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(head).encode()
    return text + data, {"Inference-Header-Content-Length": str(len(text))}


def read(response: httpx.Response) -> tuple[dict[str, Any], bytes]:
    assert response.status_code == 200, response.text
    length = response.headers.get("Inference-Header-Content-Length")
    if length is None:
        return response.json(), b""
    return json.loads(response.content[: int(length)]), response.content[int(length) :]


def test_json_both_ways(web: httpx.Client, x: np.ndarray, logits: np.ndarray) -> None:
    body = {"id": "7", "inputs": [tensor(x, data=x.reshape(-1).tolist())]}
    response = web.post("/v2/models/digits/infer", json=body)
    assert response.headers["content-type"].startswith("application/json")
    document, rest = read(response)
    assert rest == b""
    assert (document["id"], document["model_name"], document["model_version"]) == ("7", "digits", "2")
    (output,) = document["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [len(x), 10])
    np.testing.assert_allclose(np.reshape(output["data"], (-1, 10)), logits, rtol=1e-4, atol=1e-4)
    # The numbers may be nested, too.
    nested, _ = read(web.post("/v2/models/digits/infer", json={"inputs": [tensor(x, data=x.tolist())]}))
    assert nested["outputs"] == document["outputs"]


@pytest.mark.parametrize("in_binary", [True, False])
@pytest.mark.parametrize("out_binary", [True, False])
@pytest.mark.parametrize("said_of", ["all", "each"])
def test_binary_and_json_mixed(
    web: httpx.Client, x: np.ndarray, logits: np.ndarray, in_binary: bool, out_binary: bool, said_of: str
) -> None:
    head: dict[str, Any] = {}
    data = b""
    if in_binary:
        head["inputs"] = [tensor(x, parameters={"binary_data_size": x.nbytes})]
        data = x.tobytes()
    else:
        head["inputs"] = [tensor(x, data=x.reshape(-1).tolist())]
    if said_of == "all":
        head["parameters"] = {"binary_data_output": out_binary}
    else:
        head["outputs"] = [{"name": "logits", "parameters": {"binary_data": out_binary}}]
    content, headers = binary(head, data)
    document, rest = read(web.post("/v2/models/digits/infer", content=content, headers=headers if in_binary else {}))
    (output,) = document["outputs"]
    if out_binary:
        assert output["parameters"]["binary_data_size"] == len(rest) == 40 * len(x)
        found = np.frombuffer(rest, np.float32).reshape(-1, 10)
    else:
        assert rest == b""
        found = np.reshape(output["data"], (-1, 10))
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_bytes_alone(web: httpx.Client, x: np.ndarray, logits: np.ndarray) -> None:
    response = web.post(
        "/v2/models/digits/infer", content=x[:1].tobytes(), headers={"Inference-Header-Content-Length": "0"}
    )
    document, rest = read(response)
    (output,) = document["outputs"]
    assert (output["shape"], output["parameters"]["binary_data_size"]) == ([1, 10], 40)
    np.testing.assert_allclose(np.frombuffer(rest, np.float32)[None], logits[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed(web: httpx.Client, x: np.ndarray, logits: np.ndarray, encoding: str) -> None:
    content, headers = binary(
        {"inputs": [tensor(x, parameters={"binary_data_size": x.nbytes})], "parameters": {"binary_data_output": False}},
        x.tobytes(),
    )
    packed = gzip.compress(content) if encoding == "gzip" else zlib.compress(content)
    headers |= {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    response = web.post("/v2/models/digits/infer", content=packed, headers=headers)
    assert response.headers["Content-Encoding"] == encoding
    found = np.reshape(response.json()["outputs"][0]["data"], (-1, 10))
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v2/models/digits/infer", b"{"),
        ("POST", "/v2/models/digits/infer", b"[]"),
        ("POST", "/v2/models/digits/infer", b"{}"),
        ("POST", "/v2/models/digits/infer", b'{"inputs": [{"name": "image"}]}'),
        (
            "POST",
            "/v2/models/digits/infer",
            b'{"inputs": [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32"}]}',
        ),
        ("POST", "/v2/models/nothing/infer", b"{}"),
        ("POST", "/v2/models/digits/versions/9/infer", b"{}"),
        ("GET", "/v2/models/nothing", b""),
        ("GET", "/v2/models/digits/versions/9", b""),
        ("GET", "/v2/models/nothing/config", b""),
        ("GET", "/v2/models/nothing/stats", b""),
        ("POST", "/v2/repository/models/nothing/load", b""),
    ],
)
def test_errors_are_json(web: httpx.Client, method: str, path: str, body: bytes) -> None:
    response = web.request(method, path, content=body)
    assert response.status_code >= 400
    assert isinstance(response.json()["error"], str)
    assert response.json()["error"]


def test_it_is_ready_without_a_body(web: httpx.Client) -> None:
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/digits/ready",
        "/v2/models/digits/versions/1/ready",
    ):
        response = web.get(path)
        assert (response.status_code, response.content) == (200, b""), path
    assert web.get("/v2/models/nothing/ready").status_code >= 400


def test_an_unknown_model_or_version_is_404(web: httpx.Client) -> None:
    paths = ["/v2/models/nothing", "/v2/models/nothing/config", "/v2/models/nothing/versions/7"]
    for path in [*paths, "/v2/models/digits/versions/7"]:
        response = web.get(path)
        assert response.status_code == 404, f"{path}: {response.status_code} {response.text}"
        assert response.json()["error"]
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}
    response = web.post("/v2/models/nothing/infer", json={"inputs": [tensor]})
    assert response.status_code == 404, response.text
    # The one where tritonserver says 400.
    assert web.get("/v2/models/nothing/stats").status_code in (400, 404)
