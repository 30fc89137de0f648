"""What /predict says for each task but classification, over HTTP and on the page, by real models that are tiny.

A detector that finds the bright square, a segmentation by the strongest colour, and a model that inverts a picture.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from dlops.artifact import Artifact, Parity, Provenance, Tolerance, Variant
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.preprocess import CenterCrop, Decode, Preprocess, Resize, Scale
from dlops.samples import Samples
from dlops.serve.launch import ServerProcess
from dlops.signature import DimRange, Signature, TensorSpec
from tests.browser import Tab

SIDE = 32
COLOURS = ("red", "green", "blue")


def node(operator: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], **attributes)


def finding() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, list[int]]]:
    """One box a picture: from the first bright row and column to the last."""
    nodes = [node("ReduceMax", ["image", "channels"], "grey", keepdims=0)]
    for name, axis in (("x", "rows"), ("y", "columns")):
        nodes += [
            node("ReduceMax", ["grey", axis], f"{name}.line", keepdims=0),
            node("Greater", [f"{name}.line", "half"], f"{name}.bright"),
            node("Cast", [f"{name}.bright"], f"{name}.on", to=TensorProto.FLOAT),
            node("ArgMax", [f"{name}.on"], f"{name}.first", axis=1, keepdims=1),
            node("ArgMax", [f"{name}.on"], f"{name}.last", axis=1, keepdims=1, select_last_index=1),
            node("Add", [f"{name}.last", "one"], f"{name}.end"),
        ]
    nodes += [
        node("Concat", ["x.first", "y.first", "x.end", "y.end"], "edges", axis=1),
        node("Cast", ["edges"], "whole", to=TensorProto.FLOAT),
        node("Unsqueeze", ["whole", "middle"], "boxes"),
        node("ReduceMax", ["grey", "both"], "brightest", keepdims=0),
        node("Unsqueeze", ["brightest", "middle"], "scores"),
        node("Cast", ["scores"], "counted", to=TensorProto.INT64),
        node("Mul", ["counted", "zero"], "labels"),
    ]
    constants = {
        "channels": np.array([1]), "rows": np.array([1]), "columns": np.array([2]), "both": np.array([1, 2]),
        "half": np.float32(0.5), "one": np.array([1]), "middle": np.array([1]), "zero": np.array([0]),
    }  # fmt: skip
    return nodes, constants, {"boxes": [1, 4], "scores": [1], "labels": [1]}


def colouring() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, list[int]]]:
    return [node("Mul", ["image", "ten"], "logits")], {"ten": np.float32(10)}, {"logits": [3, SIDE, SIDE]}


def inverting() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, list[int]]]:
    return [node("Sub", ["white", "image"], "inverse")], {"white": np.float32(1)}, {"inverse": [3, SIDE, SIDE]}


def square(width: int, height: int, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.paste(colour, box)
    return image


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


SAMPLES = tuple(
    as_png(square(90, 60, (left, top, left + 20, top + 16), colour))
    for left, top, colour in ((20, 10, (255, 0, 0)), (40, 30, (0, 255, 0)), (24, 20, (0, 0, 255)))
)


def write(directory: Path, task: str, make: Callable[..., tuple], labels: tuple[str, ...]) -> Artifact:
    """An artifact of an ONNX graph, with samples and what ONNX Runtime says to them."""
    nodes, constants, shapes = make()
    types = {"labels": (TensorProto.INT64, "int64")}
    outputs = {name: types.get(name, (TensorProto.FLOAT, "float32")) for name in shapes}
    graph = helper.make_graph(
        nodes, task,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, outputs[name][0], ["batch", *shapes[name]]) for name in shapes],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    preprocess = Preprocess(
        input="image", shape=(3, SIDE, SIDE),
        steps=(Decode(), Resize(size=SIDE), CenterCrop(size=(SIDE, SIDE)), Scale()),
    )  # fmt: skip
    inputs = preprocess.batch(SAMPLES)
    answers = ort.InferenceSession(content, providers=["CPUExecutionProvider"]).run(list(shapes), {"image": inputs})
    samples = Samples(raw=SAMPLES, inputs={"image": inputs}, outputs=dict(zip(shapes, answers, strict=True)))
    with DirectoryWriter(directory) as writer:
        files = {
            "model": writer.add("model.onnx", content),
            "samples": writer.add("samples.safetensors", samples.to_bytes()),
        }
        return writer.commit(
            Artifact(
                name=task, created=datetime.now(UTC), variant=Variant(format="onnx"),
                signature=Signature(
                    inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 3, SIDE, SIDE)),),
                    outputs=tuple(
                        TensorSpec(name=name, dtype=outputs[name][1], shape=("batch", *shapes[name]))
                        for name in shapes
                    ),
                    dims={"batch": DimRange(max=8)},
                ),
                preprocess=preprocess, labels=labels, task=task, requires=("onnxruntime",),
                parity=Parity(
                    provider="CPUExecutionProvider", batches=(1,), samples=3, max_abs=0.0, max_rel=0.0, sqnr_db=None,
                    agreement=1.0, tolerance=Tolerance(max_abs=1e-3),
                ),
                accuracy=None,
                provenance=Provenance(checkpoint=task, checkpoint_sha256="0" * 64, environment=describe_environment()),
                files=files,
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("tasks")
    models = [
        write(root / "detection", "detection", finding, ("square",)),
        write(root / "segmentation", "segmentation", colouring, COLOURS),
        write(root / "generation", "generation", inverting, ()),
    ]
    with ServerProcess(*models) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as opened:
        yield opened


def ask(client: httpx.Client, model: str, content: bytes, **headers: str) -> httpx.Response:
    return client.post(f"/models/{model}/predict", content=content, headers={"Content-Type": "image/png", **headers})


def test_boxes_are_in_pixels_of_the_picture_that_was_sent(client: httpx.Client) -> None:
    # Its middle third is what the model sees, at a sixth of its size.
    box = (250, 60, 340, 140)
    (found,) = ask(client, "detection", as_png(square(600, 200, box, (255, 255, 255)))).json()["predictions"]
    (one,) = found["detections"]
    assert one["label"] == "square"
    assert one["score"] == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(one["box"], box, atol=200 / SIDE)


def test_several_pictures_have_boxes_of_their_own(client: httpx.Client) -> None:
    boxes = [(20, 10, 40, 30), (100, 50, 160, 110)]
    sizes = [(60, 60), (200, 150)]
    files = [
        ("image", (f"{i}.png", as_png(square(*size, box, (255, 255, 255))), "image/png"))
        for i, (size, box) in enumerate(zip(sizes, boxes, strict=True))
    ]
    found = client.post("/models/detection/predict", files=files).json()["predictions"]
    for one, box, (_, height) in zip(found, boxes, sizes, strict=True):
        np.testing.assert_allclose(one["detections"][0]["box"], box, atol=height / SIDE)


def test_pixels_as_json_have_boxes_in_those_pixels(client: httpx.Client) -> None:
    pixels = np.asarray(square(64, 64, (16, 8, 40, 32), (255, 255, 255))).tolist()
    answer = client.post("/models/detection/predict", json={"inputs": pixels})
    np.testing.assert_allclose(answer.json()["predictions"][0]["detections"][0]["box"], (16, 8, 40, 32), atol=2)


def test_a_mask_says_where_in_the_picture_it_lies(client: httpx.Client) -> None:
    image = square(96, 64, (0, 0, 96, 64), (0, 255, 0))
    image.paste((0, 0, 255), (0, 32, 96, 64))
    (found,) = ask(client, "segmentation", as_png(image)).json()["predictions"]
    assert found["size"] == [SIDE, SIDE]
    assert {one["label"]: round(one["share"], 2) for one in found["classes"]} == {"green": 0.5, "blue": 0.5}
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"]))))
    assert set(mask[:15].flat) == {COLOURS.index("green")}
    assert set(mask[17:].flat) == {COLOURS.index("blue")}
    # The middle of the picture, from top to bottom.
    np.testing.assert_allclose(found["area"], (16, 0, 80, 64), atol=1)


def test_a_generated_picture_comes_as_json_or_as_a_png(client: httpx.Client) -> None:
    sent = square(SIDE, SIDE, (4, 4, 20, 20), (255, 0, 0))
    wanted = 255 - np.asarray(sent)
    (found,) = ask(client, "generation", as_png(sent)).json()["predictions"]
    assert found["size"] == [SIDE, SIDE]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(found["image"])))), wanted)
    alone = ask(client, "generation", as_png(sent), Accept="image/png")
    assert alone.headers["Content-Type"] == "image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(alone.content))), wanted)


def test_several_pictures_do_not_fit_into_one_png(client: httpx.Client) -> None:
    files = [("image", (f"{i}.png", SAMPLES[i], "image/png")) for i in range(2)]
    answer = client.post("/models/generation/predict", files=files, headers={"Accept": "image/png"})
    assert answer.status_code == 400
    assert "2 inputs" in answer.json()["error"]
    assert len(client.post("/models/generation/predict", files=files).json()["predictions"]) == 2


def test_the_document_of_the_routes_has_each_task(client: httpx.Client) -> None:
    schemas = client.get("/docs.json").json()["components"]["schemas"]
    kinds = {one["$ref"].rpartition("/")[2] for one in schemas["Prediction"]["oneOf"]}
    assert kinds == {"Classification", "Detection", "Generation", "Regression", "Segmentation"}
    assert kinds <= set(schemas)
    # "oneOf": what one task answers must not pass for another's.
    for task in ("detection", "segmentation", "generation"):
        (found,) = ask(client, task, as_png(square(96, 64, (0, 0, 96, 64), (0, 255, 0)))).json()["predictions"]
        assert [kind for kind in kinds if set(schemas[kind]["required"]) <= set(found)] == [task.capitalize()]


def drawn(tab: Tab, server: ServerProcess, model: str, *, once: str = "true") -> np.ndarray:
    """The canvas after the model's first sample was asked about, (height, width, 3). once: what is true of it then."""
    tab.visit(f"{server.url}/?model={model}&sample=0")
    tab.wait_for("document.querySelectorAll('#result .label, #result .generated').length > 0")
    tab.wait_for("document.getElementById('canvas').width > 10")
    tab.wait_for(once)
    url = tab.tell("document.getElementById('canvas').toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_the_page_draws_boxes_where_they_are(tab: Tab, server: ServerProcess) -> None:
    canvas = drawn(tab, server, "detection")
    zoom = canvas.shape[0] // 60
    assert zoom == 2
    assert tab.tell("document.querySelector('#result .label span').textContent") == "square"
    # The frame is of neither colour of the sample, and on the edges of its square, to a pixel of the tensor.
    other = ~((canvas == (0, 0, 0)).all(axis=2) | (canvas == (255, 0, 0)).all(axis=2))
    across, down = np.flatnonzero(other[18 * zoom]), np.flatnonzero(other[:, 36 * zoom])
    # Above it is its caption.
    np.testing.assert_allclose((across[0] / zoom, across[-1] / zoom, down[-1] / zoom), (20, 40, 26), atol=60 / SIDE + 1)


def test_the_page_lays_the_mask_over_the_picture(tab: Tab, server: ServerProcess) -> None:
    # The mask is decoded, and comes after the picture and the labels.
    pixel = "document.getElementById('canvas').getContext('2d').getImageData(60, 100, 1, 1).data.slice(0, 3)"
    canvas = drawn(tab, server, "segmentation", once=f"{pixel}.some(Boolean)")
    # What the model saw is the middle of 90 × 60; what lies beside it was not judged and stays as it is.
    np.testing.assert_array_equal(canvas[100, 10], (0, 0, 0))
    assert canvas[100, 60].any()
    assert tab.tell("[...document.querySelectorAll('#result .label span')].map((one) => one.textContent)")[0] == "red"


def test_the_page_shows_the_picture_that_was_made(tab: Tab, server: ServerProcess) -> None:
    drawn(tab, server, "generation")
    tab.wait_for("document.querySelector('#result .generated').naturalWidth === 32")
