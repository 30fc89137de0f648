"""A real server, asked as clients ask, well and badly."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from dlops.directory import DirectoryWriter
from dlops.samples import Samples
from dlops.serve.launch import ServerProcess

INFER = "/v2/models/digits/infer"


def answer_works(client: httpx.Client, png: bytes) -> None:
    response = client.post("/predict", content=png, headers={"Content-Type": "image/png"})
    assert response.status_code == 200, response.text


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def tensor_of(*pngs: bytes) -> np.ndarray:
    return np.stack([pixels_of(png)[None] for png in pngs]).astype(np.float32) * np.float32(1 / 255)


def same(got: list[dict], expected: list[dict]) -> bool:
    """Equal labels and probabilities, up to what another batch size changes in the last digits."""
    return [p["label"] for p in got] == [p["label"] for p in expected] and np.allclose(
        [p["probability"] for p in got], [p["probability"] for p in expected], rtol=1e-4
    )


def infer_json(x: np.ndarray, **more: object) -> dict:
    return {"inputs": [{"name": "image", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}], **more}


def infer_binary(x: np.ndarray, *, size: int | None = None, shape: list[int] | None = None) -> tuple[bytes, dict]:
    parameters = {"binary_data_size": x.nbytes if size is None else size}
    entry = {"name": "image", "datatype": "FP32", "shape": shape or list(x.shape), "parameters": parameters}
    head = json.dumps({"inputs": [entry]}).encode()
    return head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream"])
def test_predict_reads_image_bytes_and_is_right(client, digit_pngs, digit_targets, kind: str) -> None:
    right = 0
    for png, target in zip(digit_pngs, digit_targets, strict=True):
        response = client.post("/predict", content=png, headers={"Content-Type": kind})
        assert response.status_code == 200
        (prediction,) = response.json()["predictions"]
        right += prediction["label"] == str(target)
        assert len(prediction["top"]) == 5
        assert 0 < prediction["probability"] <= 1
    assert right >= 34


def test_predict_reads_forms_of_one_and_of_several_images(client, digit_pngs) -> None:
    one = client.post("/predict", files={"file": ("a.png", digit_pngs[0], "image/png")})
    several = client.post("/predict", files=[("image", (f"{i}.png", digit_pngs[i])) for i in range(3)])
    assert [p["label"] for p in one.json()["predictions"]] == ["0"]
    assert len(several.json()["predictions"]) == 3
    assert several.json()["predictions"][0] == one.json()["predictions"][0]


def test_predict_reads_pixels_as_json_one_or_a_batch(client, digit_pngs) -> None:
    by_bytes = client.post("/predict", content=digit_pngs[1], headers={"Content-Type": "image/png"}).json()
    grey = pixels_of(digit_pngs[1])
    for inputs in (grey, grey[:, :, None], np.repeat(grey[:, :, None], 3, axis=2)):
        one = client.post("/predict", json={"inputs": inputs.tolist()})
        assert same(one.json()["predictions"], by_bytes["predictions"])
        batch = client.post("/predict", json={"inputs": [inputs.tolist(), inputs.tolist()]})
        assert len(batch.json()["predictions"]) == 2


def test_images_of_other_sizes_and_modes_are_preprocessed(client) -> None:
    for mode, size in (("RGB", (31, 17)), ("RGBA", (8, 8)), ("L", (200, 300)), ("P", (9, 9))):
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, "PNG")
        answer_works(client, buffer.getvalue())


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 60,000 × 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


FORM = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nx\r\n--x--\r\n'
PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "status", "field"),
    [
        (b"", PNG, 400, "body"),
        (b"not an image", PNG, 400, "inputs[0]"),
        (b"\x89PNG\r\n\x1a\n" + b"junk" * 10, PNG, 400, "inputs[0]"),
        (bomb(), PNG, 400, "inputs[0]"),
        (pickle.dumps({"inputs": [1]}), {"Content-Type": "application/vnd.bentoml+pickle"}, 415, "Content-Type"),
        (b"http://127.0.0.1/image.png", {"Content-Type": "text/uri-list"}, 415, "Content-Type"),
        (b"{", JSON, 400, "body"),
        (b"[1, 2]", JSON, 400, "body"),
        (b"{}", JSON, 400, "inputs"),
        (b'{"inputs": []}', JSON, 400, "inputs"),
        (b'{"inputs": "http://127.0.0.1/image.png"}', JSON, 400, "inputs"),
        (b'{"inputs": ["http://127.0.0.1/image.png"]}', JSON, 400, "inputs[0]"),
        (b'{"inputs": [[1, 2], [3]]}', JSON, 400, "inputs[0]"),
        (b'{"inputs": [[1, 256]]}', JSON, 400, "inputs[0]"),
        (b'{"inputs": [[0.5, 1]]}', JSON, 400, "inputs[0]"),
        (b'{"inputs": [[NaN, 1]]}', JSON, 400, "inputs[0]"),
        (b'{"inputs": [[1]], "more": 1}', JSON, 400, "more"),
        (b"[" * 100_000, JSON, 400, "body"),
        (b"--x\r\n\r\n", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "body"),
        (b"--x--", {"Content-Type": "multipart/form-data; boundary=x"}, 400, "image"),
        (b"--x--", {"Content-Type": "multipart/form-data"}, 400, "body"),
        (FORM, {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}, 400, "body"),
        (bytes(300_000), PNG, 413, "body"),
        (b"x", PNG | {"Content-Encoding": "br"}, 400, "Content-Encoding"),
        (b"x", PNG | {"Content-Encoding": "gzip"}, 400, "body"),
        (gzip.compress(bytes(300_000), mtime=0), PNG | {"Content-Encoding": "gzip"}, 413, "body"),
        (gzip.compress(bytes(100), mtime=0)[:-4], PNG | {"Content-Encoding": "gzip"}, 400, "body"),
        (b"x", PNG | {"X-Request-Timeout-Ms": "soon"}, 400, "X-Request-Timeout-Ms"),
    ],
)
def test_bad_predict_requests_get_a_json_error_with_the_field_and_the_next_works(
    client, digit_pngs, content: bytes, headers: dict, status: int, field: str
) -> None:
    response = client.post("/predict", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["field"] == field
    assert "Traceback" not in response.text
    answer_works(client, digit_pngs[0])


def test_a_truncated_image_is_refused(client, digit_pngs) -> None:
    response = client.post("/predict", content=digit_pngs[0][:-30], headers=PNG)
    assert (response.status_code, response.json()["field"]) == (400, "inputs[0]")


def test_a_form_that_is_cut_short_is_refused_and_not_answered_as_a_shorter_one(client, digit_pngs) -> None:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png + b"\r\n"
        for png in digit_pngs[:2]
    ]
    whole = b"".join(parts) + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert len(client.post("/predict", content=whole, headers=headers).json()["predictions"]) == 2
    for length in (len(whole) - 4, len(whole) - 7, len(whole) - 40, len(parts[0]), len(parts[0]) - 2, 20):
        response = client.post("/predict", content=whole[:length], headers=headers)
        assert (response.status_code, response.json()["field"]) == (400, "body"), length


def test_a_form_with_another_field_or_too_many_files_is_refused(client, digit_pngs) -> None:
    other = client.post("/predict", files={"picture": ("a.png", digit_pngs[0])})
    assert (other.status_code, other.json()["field"]) == (400, "image")
    many = client.post("/predict", files=[("image", ("a.png", digit_pngs[0]))] * 65)
    assert many.status_code == 400


def test_more_inputs_than_the_largest_batch_are_refused(client) -> None:
    response = client.post("/predict", json={"inputs": [[[0, 0]]] * 65})
    assert (response.status_code, response.json()["field"]) == (400, "inputs")


def test_a_body_of_unknown_length_is_counted_while_it_is_read(server, client, digit_pngs) -> None:
    def endless():
        for _ in range(100):
            yield bytes(10_000)

    response = client.post("/predict", content=endless(), headers=PNG)
    assert (response.status_code, response.json()["field"]) == (413, "body")
    answer_works(client, digit_pngs[0])


def test_a_client_that_leaves_half_way_costs_nothing(server, client, digit_pngs) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\nabc"
        )
    answer_works(client, digit_pngs[0])


def test_infer_by_json_equals_infer_by_binary(client, digit_pngs) -> None:
    x = tensor_of(*digit_pngs[:3])
    by_json = client.post(INFER, json=infer_json(x, id="one"))
    assert by_json.status_code == 200, by_json.text
    document = by_json.json()
    assert (document["id"], document["model_name"], document["model_version"]) == ("one", "digits", "1")
    body, headers = infer_binary(x)
    by_binary = client.post(INFER, content=body, headers=headers)
    assert by_binary.json()["outputs"] == document["outputs"]
    assert document["outputs"][0]["shape"] == [3, 10]


def test_infer_answers_equal_what_the_artifact_recorded(client, digits_artifact) -> None:
    samples = digits_artifact.samples()
    response = client.post(INFER, json=infer_json(samples.inputs["image"]))
    got = np.array(response.json()["outputs"][0]["data"], np.float32).reshape(16, 10)
    np.testing.assert_allclose(got, samples.outputs["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_requests_and_responses(client, digit_pngs, encoding: str) -> None:
    x = tensor_of(*digit_pngs[:30])
    body, headers = infer_binary(x)
    packed = gzip.compress(body, mtime=0) if encoding == "gzip" else zlib.compress(body)
    headers |= {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    response = client.post(INFER, content=packed, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Encoding"] == encoding
    assert response.json()["outputs"][0]["shape"] == [30, 10]


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip;q=0", None), ("gzip; q=0.000, identity", None), ("gzip;Q=0, deflate;q=0.5", "deflate"),
        ("gzip;q=0.1", "gzip"), ("br, gzip;q=1.0", "gzip"), ("identity", None),
    ],
)  # fmt: skip
def test_what_a_client_weighs_with_0_it_does_not_get(client, digit_pngs, accepted: str, encoding: str | None) -> None:
    body, headers = infer_binary(tensor_of(*digit_pngs[:30]))
    response = client.post(INFER, content=body, headers=headers | {"Accept-Encoding": accepted})
    assert response.status_code == 200
    assert response.headers.get("Content-Encoding") == encoding


def test_a_method_that_a_route_has_not_is_counted(client) -> None:
    response = client.put("/predict")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")
    assert "PUT" in response.json()["error"]
    counted = 'dlops_requests_total{method="PUT",model="",route="/predict",status="405"} 1.0'
    assert counted in client.get("/metrics").text
    # No new series for whatever else a client calls a method.
    client.request("PROPFIND", "/metrics")
    assert 'method="other",model="",route="/metrics",status="405"' in client.get("/metrics").text


def test_bad_infer_requests_get_a_json_error_with_the_field_and_the_next_works(client, digit_pngs) -> None:
    x = tensor_of(digit_pngs[0])
    cases = [
        (infer_binary(x, size=x.nbytes + 4), "image"),
        (infer_binary(x, size=x.nbytes - 4), "image"),
        (infer_binary(x, shape=[1, 64]), "image"),
        (infer_binary(x, shape=[1, 1, 8, 9]), "image"),
        ((infer_binary(x)[0][:-1], infer_binary(x)[1]), "image"),
        ((infer_binary(x)[0], {"Inference-Header-Content-Length": "99999"}), "Inference-Header-Content-Length"),
        ((infer_binary(x)[0], {"Inference-Header-Content-Length": "-1"}), "Inference-Header-Content-Length"),
        ((infer_binary(x)[0], {}), "body"),
        ((b"", {}), "body"),
    ]
    for shape in ([0, 10**30, 8, 8], [2**31, 2**31, 4, 0]):
        entry = {"name": "image", "datatype": "FP32", "shape": shape}
        cases.append(((json.dumps({"inputs": [entry | {"data": []}]}).encode(), {}), "image"))
        cases.append((infer_binary(x[:0], shape=shape), "image"))
    for (body, headers), field in cases:
        response = client.post(INFER, content=body, headers=headers)
        assert (response.status_code, response.json()["field"]) == (400, field), response.text
    assert client.post(INFER, json=infer_json(x)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/other/ready", 404),
        ("GET", "/v2/models/digits/versions/9", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/digits/versions/9/infer", 404),
        ("GET", "/v2/nonsense", 404),
        ("POST", "/v2/systemsharedmemory/region/r/register", 501),
        ("GET", "/v2/models/digits/infer", 405),
        ("DELETE", "/v2/models/digits", 405),
        ("POST", "/v2/health/live", 405),
        ("GET", "/v2/repository/index", 405),
        ("PUT", "/v2/models/digits/versions/1/infer", 405),
        ("GET", "/predict", 405),
        ("GET", "/nope", 404),
        ("POST", "/nope/nope", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/nope/", 404),
    ],
)
def test_unknown_routes_models_and_methods_are_json_errors(client, method: str, path: str, status: int) -> None:
    response = client.request(method, path, follow_redirects=True)
    assert response.status_code == status
    assert response.json()["error"]


def test_an_address_is_never_sent_on_to_another_host(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET //example.com/ HTTP/1.1\r\nHost: here\r\n\r\n")
        assert b"\r\nlocation: http://here/example.com\r\n" in connection.recv(4096)


def test_bentomls_own_routes_are_there(client) -> None:
    for path in ("/livez", "/readyz", "/healthz", "/schema.json", "/static_content/swagger-ui.css"):
        assert client.get(path).status_code == 200, path
    assert client.get("/livez/", follow_redirects=True).status_code == 200
    assert client.post("/livez").status_code == 405


def test_health_metadata_and_statistics(client, digits_artifact) -> None:
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/digits/ready"):
        assert client.get(path).status_code == 200, path
    assert client.get("/v2").json()["name"] == "dlops"
    metadata = client.get("/v2/models/digits/versions/1").json()
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    before = client.get("/v2/models/digits/stats").json()["model_stats"][0]
    client.post(INFER, json=infer_json(np.zeros((5, 1, 8, 8), np.float32)))
    client.post(INFER, json={})
    after = client.get("/v2/models/stats").json()["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 1
    for part, more in (("success", 1), ("fail", 1), ("queue", 1), ("compute_infer", 1)):
        assert after["inference_stats"][part]["count"] - before["inference_stats"][part]["count"] == more, part
    assert any(entry["batch_size"] == 5 for entry in after["batch_stats"])


def test_metrics_have_bounded_labels(client, digit_pngs) -> None:
    for junk in range(20):
        client.get(f"/v2/junk{junk}")
        client.get(f"/v2/models/junk{junk}")
        client.get(f"/junk{junk}")
    answer_works(client, digit_pngs[0])
    text = client.get("/metrics").text
    assert "junk" not in text
    assert 'dlops_requests_total{method="POST",model="digits",route="/predict",status="200"}' in text
    for part in ("total", "decode", "queue", "compute"):
        assert f'dlops_request_seconds_count{{model="digits",part="{part}",route="/predict"}}' in text
    assert 'dlops_queue_rows{model="digits"} 0.0' in text
    assert "dlops_ready 1.0" in text
    assert 'variant="onnx-fp32"' in text


def test_the_api_page_describes_predict_and_loads_nothing_from_elsewhere(client, digit_pngs) -> None:
    document = client.get("/docs.json").json()
    assert set(document["paths"]["/predict"]["post"]["requestBody"]["content"]) == {
        "image/*", "application/octet-stream", "multipart/form-data", "application/json",
    }  # fmt: skip
    assert "/v2/models/{name}/infer" in document["paths"]
    schemas = document["components"]["schemas"]
    answer = client.post("/predict", content=digit_pngs[0], headers=PNG).json()
    assert set(schemas["Predictions"]["required"]) <= set(answer)
    kinds = [one["$ref"].rpartition("/")[2] for one in schemas["Prediction"]["oneOf"]]
    found = set(answer["predictions"][0])
    assert [kind for kind in kinds if set(schemas[kind]["required"]) <= found] == ["Classification"]
    page = client.get("/docs").text
    assert "http" not in page
    assert client.get("/static_content/swagger-ui-bundle.js").status_code == 200


def test_concurrent_clients_get_their_own_answers(client, digit_pngs, digits_artifact) -> None:
    expected = [client.post("/predict", content=png, headers=PNG).json()["predictions"] for png in digit_pngs]

    def ask(i: int) -> bool:
        png = digit_pngs[i % len(digit_pngs)]
        got = client.post("/predict", content=png, headers=PNG).json()["predictions"]
        return same(got, expected[i % len(digit_pngs)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(160)))


def test_it_listens_on_this_machine_only(server: ServerProcess) -> None:
    from pathlib import Path

    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    addresses = {entry.split(":")[0] for entry in listening if int(entry.split(":")[1], 16) == server.port}
    assert addresses == {"0100007F"}


def test_the_log_says_what_is_served_and_where(server: ServerProcess) -> None:
    assert "serving digits version 1 (onnx-fp32) on CPUExecutionProvider" in server.log_path.read_text()


def test_a_body_announced_too_large_is_refused_before_it_is_sent(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_model_whose_output_is_not_finite_gives_no_label(digits_artifact, tmp_path) -> None:
    inputs = digits_artifact.preprocess.batch(digits_artifact.samples().raw)
    samples = Samples(raw=tuple(inputs), inputs={"image": inputs}, outputs=digits_artifact.samples().outputs)
    with DirectoryWriter(tmp_path / "numbers") as writer:
        files = {
            "model": writer.add_file("model.onnx", digits_artifact.path("model")),
            "samples": writer.add("samples.safetensors", samples.to_bytes()),
        }
        # Without preprocessing any finite number is an input, and the largest overflow.
        artifact = writer.commit(digits_artifact.model_copy(update={"preprocess": None, "files": files}))
    with ServerProcess(artifact) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        too_much = [[[3e38] * 8] * 8]
        refused = client.post("/predict", json={"inputs": [too_much]})
        assert refused.status_code == 400
        assert "the model's logits is not finite" in refused.json()["error"]
        fine = client.post("/predict", json={"inputs": [inputs[0].tolist()]})
        assert fine.status_code == 200
        json.loads(fine.text, parse_constant=pytest.fail)
        # Triton's clients get the numbers as they are.
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [3e38] * 64}
        passed_on = client.post(f"/v2/models/{artifact.name}/infer", json={"inputs": [tensor]})
        assert passed_on.status_code == 200
        assert not np.isfinite(np.array(passed_on.json()["outputs"][0]["data"], float)).all()


def test_what_is_asked_of_the_repository_is_a_few_words(client: httpx.Client) -> None:
    body = b'{"a": "' + b"x" * 70_000 + b'"}'
    for path in ("/v2/repository/index", "/v2/repository/models/digits/load"):
        answer = client.post(path, content=body)
        assert answer.status_code == 413
        assert answer.json()["error"].startswith("the body is larger than 65536 bytes")
