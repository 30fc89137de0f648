"""Sizes that nothing was captured with, and inputs at the edges: each variant is held to its reference there, too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.cli import run
from dlops.errors import InputError, LossError, UsageError
from dlops.export.cases import Case, check_cases, make_cases
from dlops.export.pipeline import export_variants
from dlops.parity import tolerance_for
from dlops.runtimes import open_session
from dlops.saving import save_checkpoint
from dlops.signature import Array, DimRange, TensorSpec
from dlops.sizes import other_sizes, resized
from dlops.tasks import open_task
from dlops.workflows.source_words import parse_dims

CLASSES = 3
IMAGE = TensorSpec(name="image", dtype="float32", shape=("batch", 3, "height", "width"))
DIMS = {"height": DimRange(min=8, max=40), "width": DimRange(min=8, max=48, step=4)}


class FullyConvolutional(nn.Module):
    """Logits a pixel at half the size, and one vector for the whole image."""

    def __init__(self, ceiling: float | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, CLASSES, 1))
        self.ceiling = ceiling

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(image)
        if self.ceiling is not None:
            logits = logits.clamp(-self.ceiling, self.ceiling)
        return {"logits": logits, "mean": logits.mean(dim=(2, 3)), "same": image.amax(dim=1)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return FullyConvolutional()


def images(count: int = 6, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, height, width)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    from dlops.samples import Samples

    draw = images(12)
    halves = [Samples(raw=tuple(part), inputs={"image": part}) for part in (draw[:6], draw[6:])]
    return save_checkpoint(
        network(), tmp_path_factory.mktemp("open") / "run", evaluation=halves[0], calibration=halves[1],
        task="segmentation", name="open", inputs=[IMAGE], dims=DIMS, max_batch=4,
    )  # fmt: skip


def test_the_signature_says_which_sizes_follow_which(checkpoint: Checkpoint) -> None:
    signature = checkpoint.signature
    shapes = {spec.name: spec.shape for spec in signature.outputs}
    assert shapes["logits"] == ("batch", CLASSES, "logits_2", "logits_3")
    assert shapes["mean"] == ("batch", CLASSES)
    assert shapes["same"] == ("batch", "height", "width")
    assert signature.dims["logits_2"] == DimRange(min=4, max=20)


@pytest.fixture(scope="module")
def made(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    artifacts = export_variants(
        checkpoint, variants=["onnx-fp32", "onnx-fp16", "onnx-int8", "torchscript-fp32"], model=network,
        out=tmp_path_factory.mktemp("artifacts"), max_drop=100,
    )  # fmt: skip
    return {artifact.slug: artifact.directory for artifact in artifacts}


@pytest.mark.parametrize("slug", ["onnx-fp32", "torchscript-fp32"])
def test_every_size_in_the_range_is_computed_and_recorded(made: dict[str, Path], slug: str) -> None:
    artifact = open_artifact(made[slug])
    names = [case.name for case in artifact.parity.cases]
    assert "height 8, width 8" in names
    assert "height 40, width 48" in names
    assert names[-4:] == ["black", "saturated", "tiny", "huge"]
    assert all(case.held for case in artifact.parity.cases)
    session = open_session(artifact)
    try:
        outputs = session.run({"image": images(2, 9, 44)})
    finally:
        session.close()
    with torch.no_grad():
        expected = network()(torch.from_numpy(images(2, 9, 44)))
    for name, array in outputs.items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_the_file_calls_its_dims_as_the_signature_does(made: dict[str, Path]) -> None:
    graph = onnx.load(open_artifact(made["onnx-fp32"]).path("model")).graph
    assert [dim.dim_param or dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim] == [
        "batch", CLASSES, "logits_2", "logits_3",
    ]  # fmt: skip


def test_what_fewer_bits_cannot_hold_is_recorded_and_not_held(made: dict[str, Path]) -> None:
    half = {case.name: case.held for case in open_artifact(made["onnx-fp16"]).parity.cases}
    assert half["black"]
    assert not half["huge"]
    integers = open_artifact(made["onnx-int8"]).parity.cases
    assert [case.held for case in integers if case.name in ("black", "saturated", "tiny", "huge")] == [False] * 4
    assert all(case.held for case in integers if case.name.startswith("height"))


def test_an_edge_that_is_computed_otherwise_is_refused(made: dict[str, Path]) -> None:
    artifact = open_artifact(made["onnx-fp32"])
    with pytest.raises(LossError, match="at huge: outputs differ"):
        held_edges(artifact, clamped_cases(artifact), "fp32")


def clamped_cases(artifact: Artifact) -> list[Case]:
    """Of a network that answers the samples as the artifact does, and what is huge otherwise."""
    torch.manual_seed(0)
    clamped = FullyConvolutional(ceiling=50.0).eval()
    clamped.load_state_dict(network().state_dict())
    return make_cases(clamped, {"image": images()}, artifact.signature)


def held_edges(artifact: Artifact, cases: list[Case], precision: str) -> set[str]:
    session = open_session(artifact)
    try:
        found = check_cases(
            session, cases, task=open_task("segmentation"), precision=precision,
            tolerance=tolerance_for("segmentation", precision), title="it",
        )  # fmt: skip
    finally:
        session.close()
    return {case.name for case in found if case.held and not case.name.startswith("height")}


@pytest.mark.parametrize(
    ("precision", "held"),
    [
        ("fp32", {"black", "saturated", "tiny", "huge"}), ("fp16", {"black", "saturated", "tiny"}),
        ("bf16", {"black", "saturated", "tiny"}), ("int8", set()),
    ],
)  # fmt: skip
def test_which_edges_each_precision_is_held_to(made: dict[str, Path], precision: str, held: set[str]) -> None:
    artifact = open_artifact(made["onnx-fp32"])
    cases = make_cases(network().eval(), {"image": images()}, artifact.signature)
    assert held_edges(artifact, cases, precision) == held


def test_an_edge_where_the_module_itself_is_rounding_is_not_held(made: dict[str, Path]) -> None:
    artifact = open_artifact(made["onnx-fp32"])
    cases = clamped_cases(artifact)
    with pytest.raises(LossError, match="at huge: outputs differ"):
        held_edges(artifact, cases, "fp32")
    rounding = [replace(case, own_error=1e-3) if case.name == "huge" else case for case in cases]
    assert held_edges(artifact, rounding, "fp32") == {"black", "saturated", "tiny"}


class Cubes(nn.Module):
    """A hundredfold input is answered 10^12 times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer = self.layer(image) ** 2
        return answer**3


def test_where_the_answer_leaves_all_scale_nothing_is_demanded(made: dict[str, Path], checkpoint: Checkpoint) -> None:
    growths = {case.name: case.growth for case in cases_of_one_size(Cubes(), checkpoint)}
    assert growths["huge"] == pytest.approx(1e12, rel=0.5)
    assert growths["saturated"] < 1e6
    artifact = open_artifact(made["onnx-fp32"])
    beyond = [replace(case, growth=1e7) if case.name == "huge" else case for case in clamped_cases(artifact)]
    assert held_edges(artifact, beyond, "fp32") == {"black", "saturated", "tiny"}


def own_errors(module: nn.Module, checkpoint: Checkpoint) -> dict[str, float]:
    return {case.name: case.own_error for case in cases_of_one_size(module, checkpoint)}


def cases_of_one_size(module: nn.Module, checkpoint: Checkpoint) -> list[Case]:
    """Of a module that takes images of one size."""
    signature = checkpoint.signature.model_copy(update={"outputs": checkpoint.signature.outputs[:1], "dims": {
        "batch": DimRange(max=4), "height": DimRange(min=20, max=20), "width": DimRange(min=24, max=24),
        "logits_2": DimRange(min=18, max=18), "logits_3": DimRange(min=22, max=22),
    }})  # fmt: skip
    return make_cases(module.eval(), {"image": images()}, signature)


class NormalizesEachImage(nn.Module):
    """Divides the rounding errors of an even image by their own deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, eps=1e-30), nn.Conv2d(8, CLASSES, 1), nn.InstanceNorm2d(CLASSES)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def test_where_the_module_itself_is_rounding_nothing_is_demanded(checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    errors = own_errors(NormalizesEachImage(), checkpoint)
    assert errors["saturated"] > 1e-2
    assert errors["huge"] < 1e-5


class Wave(nn.Module):
    """Of a large input the last bit is a large part of a turn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.sin(20 * self.layer(image))


def test_the_last_bit_of_a_huge_input_is_its_own(checkpoint: Checkpoint) -> None:
    torch.manual_seed(0)
    errors = own_errors(Wave(), checkpoint)
    # A hundred times as large, and so is what the last bit changes.
    assert errors["huge"] > 30 * errors["saturated"] > 0


class Baked(nn.Module):
    """Its answer depends on the height that it was captured with, which no exporter says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height = image.stride(1) / image.stride(2)
        return self.layer(image) * (height / 10)


def test_a_size_that_was_baked_in_is_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Baked().eval()
    from dlops.samples import Samples

    saved = save_checkpoint(
        model, tmp_path / "run", evaluation=Samples(raw=tuple(images()), inputs={"image": images()}),
        task="segmentation", name="baked", inputs=[IMAGE], dims={**DIMS, "height": DimRange(min=20, max=40)},
    )  # fmt: skip
    with pytest.raises(LossError, match=r"baked/torchscript-fp32 at height 40, width 48: outputs differ"):
        export_variants(saved, variants=["torchscript-fp32"], model=model, out=tmp_path / "artifacts")
    assert not list((tmp_path / "artifacts").rglob("artifact.json"))


TOKENS = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, tokens, mask):
        mixed, _ = self.mix(self.table(tokens) * mask[:, :, None])
        return self.head(mixed.mean(dim=1))

def make():
    torch.manual_seed(1)
    return Tagger()
"""


def test_a_sequence_of_any_length_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tagger.py").write_text(TOKENS)
    draw = np.random.default_rng(0)
    tensors = {"tokens": draw.integers(0, 20, (8, 12)), "mask": draw.random((8, 12)).astype(np.float32)}
    save_file(tensors, tmp_path / "samples.safetensors")
    command = [
        "export", "python:tagger:make", "--samples", "samples.safetensors", "--format", "onnx",
        "--input", "tokens:int64[batch,length]", "--input", "mask:float32[batch,length]", "--dim", "length=2:30",
    ]  # fmt: skip
    assert run(command) == 0
    artifact = open_artifact(tmp_path / "artifacts" / "make" / "onnx-fp32")
    assert {"length 2", "length 30"} <= {case.name for case in artifact.parity.cases}
    session = open_session(artifact)
    try:
        assert session.run({"tokens": np.ones((3, 17), np.int64), "mask": np.ones((3, 17), np.float32)})
    finally:
        session.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("height", "expected NAME=MIN:MAX"),
        ("height=9:3", "from 9 to 3 there is nothing"),
        ("height=8:33:8", "whole steps of 8"),
    ],
)
def test_ranges_that_are_none(given: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_dims([given])


def test_ranges_without_an_input_and_inputs_without_a_range(tmp_path: Path) -> None:
    save_file({"image": images()}, tmp_path / "samples.safetensors")

    def refused(*options: str) -> int:
        return run(["export", "torchvision:fcn_resnet50", "--weights", "random",
                    "--samples", str(tmp_path / "samples.safetensors"), *options])  # fmt: skip

    assert refused("--input", "image:float32[batch,3,height,24]") == 2
    assert refused("--input", "image:float32[batch,3,20,24]", "--dim", "height=8:40") == 2
    assert refused("--input", "image:float32[batch,3,height,24]", "--dim", "height=32:64") == 2


def test_a_size_between_the_steps_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        checkpoint.signature.check({"image": images(1, 20, 26)})


def test_sizes_between_are_odd_and_inputs_are_continued() -> None:
    assert other_sizes(DimRange(min=8, max=40)) == (8, 19, 40)
    assert other_sizes(DimRange(min=32, max=96, step=32)) == (32, 64, 96)
    array: Array = np.arange(6).reshape(1, 1, 2, 3)
    wider = resized({"image": array}, [IMAGE], {"height": 3, "width": 5})["image"]
    assert wider[0, 0].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4], [0, 1, 2, 0, 1]]
