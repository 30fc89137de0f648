"""Unmodified tritonclient against our server."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

http = pytest.importorskip("tritonclient.http", reason="tritonclient is in the triton extra")
from tritonclient.utils import InferenceServerException  # noqa: E402


@pytest.fixture
def triton(server) -> Iterator[http.InferenceServerClient]:
    client = http.InferenceServerClient(url=f"127.0.0.1:{server.port}", concurrency=2)
    yield client
    client.close()


@pytest.fixture
def x(digit_pngs) -> np.ndarray:
    pixels = [np.asarray(Image.open(io.BytesIO(png))) for png in digit_pngs[:20]]
    return np.stack(pixels)[:, None].astype(np.float32) * np.float32(1 / 255)


def an_input(x: np.ndarray, *, binary: bool = True) -> http.InferInput:
    tensor = http.InferInput("image", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return tensor


def test_health_and_metadata(triton) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("digits")
    assert triton.is_model_ready("digits", "1")
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["name"] == "dlops"
    metadata = triton.get_model_metadata("digits")
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    config = triton.get_model_config("digits")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (64, [1, 8, 8])
    assert triton.get_inference_statistics("digits")["model_stats"][0]["version"] == "1"
    assert triton.get_inference_statistics()["model_stats"][0]["name"] == "digits"


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_infer_in_every_form(triton, x, digits_artifact, binary_in: bool, binary_out: bool | None) -> None:
    outputs = None if binary_out is None else [http.InferRequestedOutput("logits", binary_data=binary_out)]
    result = triton.infer("digits", [an_input(x, binary=binary_in)], outputs=outputs, request_id="r")
    expected = digits_artifact.samples().outputs["logits"]
    np.testing.assert_allclose(result.as_numpy("logits")[:16], expected, rtol=1e-4, atol=1e-4)
    assert result.get_response()["id"] == "r"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_infer_compressed_both_ways(triton, x, algorithm: str) -> None:
    result = triton.infer(
        "digits", [an_input(x)], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    assert result.as_numpy("logits").shape == (20, 10)


def test_async_infer_by_version_with_a_timeout(triton, x) -> None:
    pending = [triton.async_infer("digits", [an_input(x)], model_version="1", timeout=10_000_000) for _ in range(4)]
    assert all(request.get_result().as_numpy("logits").shape == (20, 10) for request in pending)


def test_errors_arrive_as_the_clients_own_exception_with_our_text(triton, x) -> None:
    with pytest.raises(InferenceServerException, match="unknown model 'other'"):
        triton.infer("other", [an_input(x)])
    with pytest.raises(InferenceServerException, match=r"shape \[20, 1, 64\], expected \[batch, 1, 8, 8\]"):
        triton.infer("digits", [an_input(x.reshape(20, 1, 64))])
    with pytest.raises(InferenceServerException, match="unknown output 'nothing'"):
        triton.infer("digits", [an_input(x)], outputs=[http.InferRequestedOutput("nothing")])
    with pytest.raises(InferenceServerException, match="classification must be a number of classes"):
        triton.infer("digits", [an_input(x)], outputs=[http.InferRequestedOutput("logits", class_count=-3)])
    assert triton.infer("digits", [an_input(x)]).as_numpy("logits").shape == (20, 10)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("count", [3, 10, 40])
def test_an_output_as_its_strongest_classes(triton, x, binary: bool, count: int) -> None:
    output = http.InferRequestedOutput("logits", binary_data=binary, class_count=count)
    found = triton.infer("digits", [an_input(x)], outputs=[output]).as_numpy("logits")
    logits = triton.infer("digits", [an_input(x)]).as_numpy("logits")
    assert found.shape == (20, min(count, 10))
    for row, values in zip(found, logits, strict=True):
        order = np.argsort(-values)[:count]
        texts = [text.decode() if isinstance(text, bytes) else text for text in row]
        # The labels of the digits are the digits.
        assert texts == [f"{values[index]:f}:{index}:{index}" for index in order]
