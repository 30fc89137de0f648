"""Variants with preprocessing inside: the same tensors as Pillow and numpy make, and the same answers everywhere."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from dlops.artifact import Artifact, Variant
from dlops.bench.run import measure
from dlops.checkpoint import Checkpoint
from dlops.embedded import read_embedded
from dlops.errors import GateError, UsageError
from dlops.export.graft import graft
from dlops.export.pipeline import export_variants
from dlops.export.raw_inputs import RawInputs, plan_raw
from dlops.export.reproduce import reproduce_artifact
from dlops.export.resampling import taken_pixels
from dlops.export.to_onnx import OPSET
from dlops.export.verify import verify_artifact
from dlops.inspect import describe
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale, Step, resized_size
from dlops.runtimes import SessionOptions
from dlops.samples import Samples
from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics
from dlops.serve.model import load_model
from dlops.serve.predict import to_feed
from dlops.serve.repository import entry_of
from dlops.serve.settings import Settings
from dlops.signature import DimRange, Signature, TensorSpec

CPU = SessionOptions(device="cpu", threads=1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def raw_inputs(preprocess: Preprocess, outside: Preprocess, inside: tuple[Step, ...]) -> RawInputs:
    """Around a core that gives its tensor, flat, as logits."""
    dims = {"batch": DimRange(max=4)}
    count = int(np.prod(preprocess.shape))
    core = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", *preprocess.shape)),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", count)),), dims=dims,
    )  # fmt: skip
    outer = Signature(
        inputs=(TensorSpec(name="pixels", dtype=outside.dtype, shape=("batch", *outside.shape)),),
        outputs=(
            TensorSpec(name="probabilities", dtype="float32", shape=("batch", count)),
            TensorSpec(name="label", dtype="int64", shape=("batch",)),
        ),
        dims=dims,
    )  # fmt: skip
    return RawInputs(signature=outer, outside=outside, inside=inside, core=core)


def tensors(raw: RawInputs, inputs: np.ndarray) -> np.ndarray:
    """What the grafted nodes hand to the model inside."""
    shape = list(raw.core.inputs[0].shape)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", int(np.prod(shape[1:]))])
    graph = helper.make_graph([helper.make_node("Flatten", ["x"], ["logits"])], "core", [value], [logits])
    model = graft(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), raw)
    model.graph.output.append(value)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["x"], {raw.signature.inputs[0].name: inputs})[0])


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "steps"),
    [
        ((37, 53), (Resize(size=(16, 20), interpolation="bilinear"),)),
        ((9, 7), (Resize(size=(31, 33), interpolation="bilinear"),)),
        ((40, 64), (Resize(size=24, interpolation="bilinear"), CenterCrop(size=(20, 21)))),
        ((16, 12), (Resize(size=(16, 30), interpolation="bilinear"), CenterCrop(size=(22, 9)))),
        ((5, 6), (CenterCrop(size=(8, 9)), Resize(size=(4, 4), interpolation="bilinear"))),
        ((8, 8), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_tensor_made_in_the_graph_is_the_training_transforms_to_the_last_bit(
    size: tuple[int, int], steps: tuple[Step, ...], interpolation: str, mode: str
) -> None:
    channels = 3 if mode == "RGB" else 1
    geometry = tuple(
        step.model_copy(update={"interpolation": interpolation}) if isinstance(step, Resize) else step for step in steps
    )
    tail = (Scale(), Normalize(mean=MEAN[:channels], std=STD[:channels]))
    # Noise, which rounding and overshoot in between do not leave as it is, and full black beside full white.
    images = np.random.default_rng(0).integers(0, 256, (4, *size, channels)).astype(np.uint8)
    images[3] = np.where(images[3] > 127, 255, 0)
    height, width = size
    for step in geometry:
        if isinstance(step, Resize):
            width, height = resized_size(step, width, height)
        else:
            height, width = step.size
    whole = Preprocess(input="image", shape=(channels, height, width), steps=(Decode(mode=mode), *geometry, *tail))
    outside = Preprocess(input="image", dtype="uint8", shape=(*size, channels), steps=(Decode(mode=mode),))
    found = tensors(raw_inputs(whole, outside, (*geometry, *tail)), outside.batch(images))
    np.testing.assert_array_equal(found, whole.batch(images))


def test_nearest_takes_the_pixels_that_pillow_takes() -> None:
    assert taken_pixels(4, 2).tolist() == [1, 3]
    assert taken_pixels(2, 4).tolist() == [0, 0, 1, 1]


def test_numbers_are_scaled_and_normalized_in_the_graph() -> None:
    steps = (Scale(factor=0.5), Normalize(mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0)))
    whole = Preprocess(input="numbers", shape=(5, 3), steps=steps)
    raw = raw_inputs(whole, Preprocess(input="numbers", shape=(5, 3)), steps)
    numbers = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(tensors(raw, numbers), whole.batch(numbers))


@pytest.fixture(scope="module")
def made(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    from .conftest import SmallNet

    out = tmp_path_factory.mktemp("raw")
    artifacts = export_variants(
        checkpoint, variants=["onnx-fp32-raw", "onnx-int8-raw", "onnx-fp16-raw"], out=out, model=SmallNet, max_drop=2.0
    )
    return {artifact.slug: artifact for artifact in artifacts}


def test_every_precision_takes_pixels_and_gives_labels_as_the_plain_variant_does(
    made: dict[str, Artifact], exported_dense: dict[str, Artifact]
) -> None:
    for slug, artifact in made.items():
        plain = exported_dense[slug.removesuffix("-raw")]
        assert artifact.variant == Variant.parse(slug) == plain.variant.model_copy(update={"raw": True})
        assert [(spec.name, spec.dtype, spec.shape) for spec in artifact.signature.inputs] == [
            ("pixels", "uint8", ("batch", 8, 8, 1))
        ]
        assert [spec.name for spec in artifact.signature.outputs] == ["probabilities", "label"]
        assert artifact.preprocess is not None
        assert [step.kind for step in artifact.preprocess.steps] == ["decode"]
        assert artifact.accuracy == plain.accuracy
        assert artifact.parity.samples == 360
        # The same weights in the same precision, and next to nothing around them.
        assert abs(artifact.model_bytes - plain.model_bytes) < 4000
        assert read_embedded(artifact.path("model"))[1].signature == artifact.signature
        assert "takes raw inputs" in describe(artifact.directory).facts["Model"]["variant"]


@pytest.mark.usefixtures("captured_anew")
def test_it_is_verified_with_its_checkpoint_and_made_again_byte_for_byte(
    made: dict[str, Artifact], checkpoint: Checkpoint, small_net: type[nn.Module]
) -> None:
    artifact = made["onnx-int8-raw"]
    found = verify_artifact(artifact, options=CPU, checkpoint=checkpoint, model=small_net)
    assert found.accuracy == artifact.accuracy
    again = reproduce_artifact(artifact, checkpoint, model=small_net)
    assert again.same == "file"


def test_it_is_served_from_encoded_images_to_labels(
    made: dict[str, Artifact], checkpoint: Checkpoint, exported_dense: dict[str, Artifact]
) -> None:
    evaluation = checkpoint.samples("evaluation")
    assert evaluation is not None
    bodies = []
    for pixels in evaluation.raw[:5]:
        encoded = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(encoded, "PNG")
        bodies.append(encoded.getvalue())
    answers = []
    for artifact in (made["onnx-fp32-raw"], exported_dense["onnx-fp32"]):
        served = load_model(entry_of(artifact), Settings(device="cpu", threads=1), Metrics(Cells()))
        session = served.instances[0].session
        try:
            answers.append(served.answers(session.run(to_feed(artifact, bodies))))
        finally:
            served.close()
    raw, plain = answers
    assert [one["label"] for one in raw] == [one["label"] for one in plain]
    for one, other in zip(raw, plain, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_it_is_measured_from_the_raw_image(made: dict[str, Artifact]) -> None:
    measured = measure([made["onnx-fp32-raw"]], boundary=("preprocessing",), duration_s=0.1, threads=1, device="cpu")
    (row,) = measured.report.measurements
    assert row.error_count == 0
    assert row.artifact == "onnx-fp32-raw"


def test_a_file_that_scales_otherwise_than_training_fails_its_gates(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto, raw: RawInputs) -> onnx.ModelProto:
        *rest, last = raw.inside
        assert isinstance(last, Normalize)
        inside = (*rest, last.model_copy(update={"mean": (0.5,)}))
        changed = RawInputs(signature=raw.signature, outside=raw.outside, inside=inside, core=raw.core)
        return graft(model, changed)

    monkeypatch.setattr("dlops.export.to_onnx.graft", wrong)
    with pytest.raises(GateError, match="outputs differ from the reference"):
        export_variants(checkpoint, variants=["onnx-fp32-raw"], out=tmp_path, model=small_net)
    assert not list(tmp_path.iterdir())


def resizing(save_digits_checkpoint, digits_model: nn.Module, directory: Path, *, size: int = 10) -> Checkpoint:
    """Digits enlarged to 10 × 10, of which the middle goes in."""
    steps = (Decode(mode="L"), Resize(size=size, interpolation="bicubic"), CenterCrop(size=(8, 8)), Scale(),
             Normalize(mean=(0.3,), std=(0.35,)))  # fmt: skip
    return save_digits_checkpoint(
        directory, digits_model, preprocess=Preprocess(input="image", shape=(1, 8, 8), steps=steps)
    )


def test_resizing_goes_in_where_the_size_of_images_is_named_and_stays_outside_else(
    save_digits_checkpoint, digits_model: nn.Module, small_net: type[nn.Module], tmp_path: Path
) -> None:
    checkpoint = resizing(save_digits_checkpoint, digits_model, tmp_path / "runs")
    arguments = {"variants": ["onnx-fp32-raw"], "out": tmp_path / "out", "model": small_net, "max_drop": 100.0}
    (outside,) = export_variants(checkpoint, **arguments)
    assert outside.preprocess is not None
    assert [step.kind for step in outside.preprocess.steps] == ["decode", "resize", "center_crop"]
    first = outside.samples()
    # Another size decides the outcome, so what lies there is not kept.
    (inside,) = export_variants(checkpoint, image_size=(8, 8), **arguments)
    assert inside.preprocess is not None
    assert [step.kind for step in inside.preprocess.steps] == ["decode"]
    assert inside.accuracy == outside.accuracy
    np.testing.assert_array_equal(first.outputs["probabilities"], inside.samples().outputs["probabilities"])
    assert verify_artifact(inside, options=CPU).parity.agreement == 1.0
    assert reproduce_artifact(inside, checkpoint, model=small_net).same == "file"
    with pytest.raises(UsageError, match=r"shape \[8, 8, 1\], expected \[9, 8, 1\]"):
        export_variants(checkpoint, image_size=(9, 8), **arguments)


@pytest.mark.parametrize(
    ("variants", "size", "said"),
    [
        (["torchscript-fp32-raw"], None, "preprocessing goes into onnx files alone"),
        (["onnx-fp32"], (8, 8), "no variant takes raw images"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_any_work(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, variants: list[str],
    size: tuple[int, int] | None, said: str,
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=said):
        export_variants(checkpoint, variants=variants, out=tmp_path, model=small_net, image_size=size)


def test_a_model_without_preprocessing_or_with_other_outputs_is_refused_with_the_reason(checkpoint: Checkpoint) -> None:
    bare = checkpoint.model_copy(update={"spec": checkpoint.spec.model_copy(update={"preprocess": None})})
    with pytest.raises(UsageError, match="has no preprocessing"):
        plan_raw(bare, image_size=None)
    whole = checkpoint.signature
    two = whole.model_copy(
        update={"outputs": (*whole.outputs, TensorSpec(name="more", dtype="float32", shape=("batch",)))}
    )
    with pytest.raises(UsageError, match="1 inputs and 2 outputs"):
        plan_raw(checkpoint.model_copy(update={"signature": two}), image_size=None)
    taken = whole.model_copy(update={"outputs": (whole.outputs[0].model_copy(update={"name": "label"}),)})
    with pytest.raises(UsageError, match="its tensor label has a name"):
        plan_raw(checkpoint.model_copy(update={"signature": taken}), image_size=None)


def test_a_label_that_differs_lowers_the_agreement_and_not_the_signal_to_noise() -> None:
    from dlops.parity import compare
    from dlops.tasks import open_task

    reference = {"probabilities": np.array([[0.9, 0.1], [0.2, 0.8]], np.float32), "label": np.array([0, 1])}
    other = {**reference, "label": np.array([1, 1])}
    found = compare(reference, other, task=open_task("classification"))
    assert (found.sqnr_db, found.max_abs, found.agreement) == (None, 0.0, 0.5)


def test_pixels_are_neither_scaled_nor_turned_outside() -> None:
    pixels = Preprocess(input="image", dtype="uint8", shape=(4, 6, 3), steps=(Decode(), Resize(size=(4, 6))))
    given = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(given).resize((6, 4), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(pixels.apply(given), expected)
    with pytest.raises(ValueError, match="neither scaled nor normalized"):
        Preprocess(input="image", dtype="uint8", shape=(4, 6, 3), steps=(Decode(), Scale()))
    with pytest.raises(ValueError, match=r"gives \[height, width, 3\]"):
        Preprocess(input="image", dtype="uint8", shape=(3, 4, 6), steps=(Decode(),))
    with pytest.raises(ValueError, match="numbers become float32"):
        Preprocess(input="numbers", dtype="uint8", shape=(3,))


def test_samples_of_a_raw_variant_travel_with_it(made: dict[str, Artifact], tmp_path: Path) -> None:
    shutil.copytree(made["onnx-fp32-raw"].directory, tmp_path / "copy")
    samples: Samples = made["onnx-fp32-raw"].located_at(tmp_path / "copy").samples()
    assert samples.inputs["pixels"].dtype == np.uint8
    assert samples.outputs["label"].dtype == np.int64
    np.testing.assert_array_equal(samples.outputs["probabilities"].argmax(axis=1), samples.outputs["label"])
