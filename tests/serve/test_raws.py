"""Pictures and texts in BYTES tensors, by unmodified tritonclient: decoded and prepared by the server."""

from __future__ import annotations

import io
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dlops
from dlops.artifact import Artifact
from dlops.errors import InputError
from dlops.preprocess import Preprocess, Utf8
from dlops.samples import Samples
from dlops.serve.launch import ServerProcess
from dlops.serve.raws import RawInput

http = pytest.importorskip("tritonclient.http", reason="tritonclient is in the triton extra")
grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is in the triton extra")
from tritonclient.utils import InferenceServerException  # noqa: E402

PICTURES = RawInput(name="image", kind="image", most=4)
TEXTS = RawInput(name="ids", kind="text", most=4)


class Letters(nn.Module):
    """The sum of a text's bytes, doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.scale.weight, 2.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.scale(ids.sum(dim=1, keepdim=True).float())


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("letters")
    raw = (b"a", b"bc", "é".encode(), b"")
    targets = np.array([[2 * sum(text)] for text in raw], np.float32)
    checkpoint = dlops.save_checkpoint(
        Letters(), folder / "run", evaluation=Samples(raw=raw, targets=targets), name="letters", max_batch=4,
        task="regression", preprocess=Preprocess(input="text", shape=(8,), dtype="int64", steps=(Utf8(),)),
    )  # fmt: skip
    [made] = dlops.export_variants(checkpoint, variants=["onnx-fp32"], model=Letters, out=folder / "artifacts")
    return made


@pytest.fixture(scope="module")
def server(digits_artifact: Artifact, letters: Artifact) -> Iterator[ServerProcess]:
    with ServerProcess(digits_artifact, letters, grpc_port=0, env={"DLOPS_MAX_PIXELS": "10000"}) as running:
        yield running


@pytest.fixture(params=["http", "grpc"])
def triton(request, server: ServerProcess):
    """The client's module and a client."""
    module = http if request.param == "http" else grpc
    port = server.port if module is http else server.grpc_port
    with module.InferenceServerClient(url=f"127.0.0.1:{port}") as client:
        yield module, client


def asked(module, rows: list[bytes], *, name: str = "image", two: bool = False):
    array = np.array(rows, np.object_)
    tensor = module.InferInput(name, [len(rows), 1] if two else [len(rows)], "BYTES")
    tensor.set_data_from_numpy(array[:, None] if two else array)
    return [tensor]


@pytest.mark.parametrize("two", [False, True], ids=["[n]", "[n, 1]"])
def test_pictures_are_decoded_and_prepared(triton, digit_pngs, digits_artifact, two: bool) -> None:
    module, client = triton
    found = client.infer("digits", asked(module, digit_pngs[:16], two=two)).as_numpy("logits")
    np.testing.assert_allclose(found, digits_artifact.samples().outputs["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_pixels_are_prepared_as_the_pictures_they_are_of(triton, digit_pngs, digits_artifact, channels) -> None:
    module, client = triton
    pictures = [Image.open(io.BytesIO(png)) for png in digit_pngs[:8]]
    pixels = np.stack([np.asarray(one.convert("RGB" if channels == 3 else "L")) for one in pictures])
    pixels = pixels[..., None] if channels == 1 else pixels
    tensor = module.InferInput("image", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels)
    found = client.infer("digits", [tensor]).as_numpy("logits")
    np.testing.assert_allclose(found, digits_artifact.samples().outputs["logits"][:8], rtol=1e-4, atol=1e-4)


def test_pixels_come_in_json(server: ServerProcess, digit_pngs, digits_artifact) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(digit_pngs[0])).convert("L"))
    expected = digits_artifact.samples().outputs["logits"][0]
    for data in (pixels.ravel().tolist(), [pixels.tolist()]):
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, *pixels.shape], "data": data}
        answer = httpx.post(f"{server.url}/v2/models/digits/infer", json={"inputs": [tensor]}).json()
        np.testing.assert_allclose(answer["outputs"][0]["data"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "data", "said"),
    [
        ([1, 8], [0] * 8, "expected [n, height, width]"),
        ([1, 2, 2, 2], [0] * 8, "expected [n, height, width]"),
        ([0, 2, 2], [], "0 to 255"),
        ([1, 2, 2], [0] * 5, "5 values do not have the shape [1, 2, 2]"),
        ([1, 10**4000 - 1, 10**4000 - 1], [0] * 5, "5 values do not have the shape [1, 999"),
        ([1, 2, 2], [0, 1, 2, 256], "0 to 255"),
        ([1, 2, 2], [0, 1, 2, 0.5], "0 to 255"),
        ([1, 2, 2], "text", "0 to 255"),
        ([9999, 1, 1], [0] * 9999, "rows, one to"),
        ([1, 101, 100], [0] * 10100, "10100 pixels up to here, at most 10000"),
    ],
)
def test_pixels_that_cannot_be_are_said(server: ServerProcess, shape, data, said: str) -> None:
    document = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": shape, "data": data}]}
    answer = httpx.post(f"{server.url}/v2/models/digits/infer", json=document)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_texts_are_too(triton, letters: Artifact) -> None:
    module, client = triton
    (output,) = letters.signature.outputs
    answer = client.infer("letters", asked(module, [b"abc", "é".encode(), b""], name="input"))
    assert answer.as_numpy(output.name).ravel().tolist() == [588, 728, 0]


def test_texts_come_in_json(server: ServerProcess) -> None:
    document = {"inputs": [{"name": "input", "datatype": "BYTES", "shape": [2], "data": ["abc", "é"]}]}
    answer = httpx.post(f"{server.url}/v2/models/letters/infer", json=document)
    assert answer.json()["outputs"][0]["data"] == [588, 728]


def test_what_is_no_picture_names_its_row(triton, digit_pngs) -> None:
    module, client = triton
    with pytest.raises(InferenceServerException, match=r"inputs\[1\].*image"):
        client.infer("digits", asked(module, [digit_pngs[0], b"no picture"]))


def test_pixels_are_counted_before_anything_is_decoded(triton) -> None:
    module, client = triton
    buffer = io.BytesIO()
    Image.new("L", (101, 100)).save(buffer, "PNG")
    with pytest.raises(InferenceServerException, match="10100 pixels up to here, at most 10000"):
        client.infer("digits", asked(module, [buffer.getvalue()]))


def test_many_connections_share_batches_and_get_their_own_answers(server, digit_pngs, digits_artifact) -> None:
    expected = digits_artifact.samples().outputs["logits"]
    with http.InferenceServerClient(url=f"127.0.0.1:{server.port}", concurrency=8) as client:
        waiting = [
            (row, client.async_infer("digits", asked(http, [digit_pngs[row]]))) for _ in range(6) for row in range(16)
        ]
        for row, answer in waiting:
            found = answer.get_result().as_numpy("logits")[0]
            np.testing.assert_allclose(found, expected[row], rtol=1e-4, atol=1e-4)


def test_a_client_that_leaves_while_its_pictures_are_decoded_harms_nobody(server, digit_pngs) -> None:
    rows = digit_pngs[:16]
    body = b"".join(struct.pack("<I", len(row)) + row for row in rows)
    parameters = {"binary_data_size": len(body)}
    entry = {"name": "image", "datatype": "BYTES", "shape": [16], "parameters": parameters}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    request = (
        f"POST /v2/models/digits/infer HTTP/1.1\r\nHost: here\r\nInference-Header-Content-Length: {len(head)}\r\n"
        f"Content-Length: {len(head) + len(body)}\r\n\r\n"
    )
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(request.encode() + head + body)
    answer = httpx.post(f"{server.url}/v2/models/digits/infer", content=head + body, headers=headers)
    assert answer.status_code == 200
    log = Path(server.log_path).read_text()
    assert "Traceback" not in log
    assert "never retrieved" not in log


@pytest.mark.parametrize(
    ("shape", "data", "said"),
    [
        ((2,), b"\x01\0\0\0a", "the bytes end before row 1"),
        ((1,), b"\x05\0\0\0ab", "row 0 is to have 5 bytes, 2 are left"),
        ((1,), b"\x01\0\0\0ab", "1 bytes follow the last row"),
        ((1,), b"\xff\xff\xff\xff", "row 0 is to have 4294967295 bytes"),
        ((5,), b"", "5 rows, one to 4"),
        ((0,), b"", "0 rows, one to 4"),
        ((2, 2), b"", r"BYTES of shape \[2, 2\], expected \[n\] or \[n, 1\]"),
        ((), b"", r"expected \[n\] or \[n, 1\]"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(shape: tuple[int, ...], data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        PICTURES.from_binary(memoryview(data), shape)
    assert refused.value.field == "image"


def test_json_holds_texts_and_no_pictures() -> None:
    assert TEXTS.from_json(["a", "b"], (2,)) == ["a", "b"]
    assert TEXTS.from_json([["a"], ["b"]], (2, 1)) == ["a", "b"]
    for data in (["a"], ["a", 1], "ab", None, [["a", "b"]]):
        with pytest.raises(InputError, match="data must be 3 texts"):
            TEXTS.from_json(data, (3,))
    with pytest.raises(InputError, match="JSON holds no image"):
        PICTURES.from_json(["a"], (1,))


def test_a_model_without_preprocessing_takes_no_bytes(digits_artifact: Artifact) -> None:
    assert RawInput.of(digits_artifact) == RawInput(name="image", kind="image", most=64, takes_pixels=True)
    assert RawInput.of(digits_artifact.model_copy(update={"preprocess": None})) is None
