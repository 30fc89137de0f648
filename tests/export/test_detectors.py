"""torchvision's detectors through the whole of export: suppression in the graph, boxes matched, nothing vacuous."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

from dlops.adapters import Detector, adapted
from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, UsageError
from dlops.export.pipeline import export_variants
from dlops.parity import self_test
from dlops.runtimes import open_session
from dlops.saving import save_checkpoint
from dlops.workflows.sources import adopt
from dlops.workflows.untrained import scale_weights
from dlops.workflows.zoo import coloured_noise

MOST = 20


def images(count: int = 6, size: int = 64) -> np.ndarray:
    return np.clip(0.5 + 0.2 * coloured_noise(count, size), 0, 1).astype(np.float32)


class Backbone(torch.nn.Module):
    """Two maps of features, as SSD wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, stride=8, padding=1), torch.nn.ReLU())
        self.second = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, stride=2, padding=1), torch.nn.ReLU())
        self.out_channels = [16, 16]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = self.first(x)
        return {"0": first, "1": self.second(first)}


def small_detector(*, score_thresh: float = 0.01) -> torch.nn.Module:
    torch.manual_seed(3)
    detector = SSD(
        Backbone(), DefaultBoxGenerator([[2], [2]]), (64, 64), num_classes=4, score_thresh=score_thresh,
        detections_per_img=MOST,
    ).eval()  # fmt: skip
    scale_weights(adapted(detector), {"images": images()})
    return detector


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    model = small_detector()
    with torch.no_grad():
        found = adapted(model)(torch.from_numpy(images()))
    targets = torch.cat([found["boxes"], found["labels"].unsqueeze(2)], dim=2)[:, :5].numpy()
    return save_checkpoint(
        model, tmp_path_factory.mktemp("detector") / "run", evaluation=(images(), targets), task="detection",
        name="small",
    )  # fmt: skip


@pytest.fixture(scope="module")
def artifacts(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    made = export_variants(
        checkpoint, variants=["onnx-fp32", "torchscript-fp32"], model=small_detector,
        out=tmp_path_factory.mktemp("artifacts"),
    )  # fmt: skip
    return {artifact.slug: artifact for artifact in made}


def operators(graph: onnx.GraphProto) -> Iterator[str]:
    """Those in branches, too."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            yield from operators(attribute.g)


@pytest.mark.parametrize("slug", ["onnx-fp32", "torchscript-fp32"])
def test_a_detector_is_exported_with_its_suppression(artifacts: dict[str, Artifact], slug: str) -> None:
    artifact = open_artifact(artifacts[slug].directory)
    assert [spec.shape for spec in artifact.signature.outputs] == [("batch", MOST, 4), ("batch", MOST), ("batch", MOST)]
    assert artifact.signature.max_batch == 1
    assert artifact.parity.agreement >= 0.98
    assert artifact.parity.tolerance.min_iou == 0.9
    assert artifact.accuracy is not None
    assert artifact.accuracy.metric == "AP"
    # Against boxes that it found itself: the lower ones of a class are false alarms.
    assert artifact.accuracy.value == pytest.approx(artifact.accuracy.reference, abs=0.02)
    session = open_session(artifact)
    try:
        assert self_test(artifact, session).agreement >= 0.98
        found = session.run({"input": images(1)})
        assert (found["scores"] > 0).sum() > 5
        # Zeros, where nothing is found, are filled in.
        assert found["boxes"].shape == (1, MOST, 4)
    finally:
        session.close()


def test_the_graph_suppresses_and_holds_one_image(artifacts: dict[str, Artifact]) -> None:
    model = onnx.load(artifacts["onnx-fp32"].path("model"))
    assert "NonMaxSuppression" in set(operators(model.graph))
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_torchscript_says_that_it_needs_torchvision(artifacts: dict[str, Artifact]) -> None:
    assert artifacts["torchscript-fp32"].requires == ("torch", "torchvision")
    assert artifacts["onnx-fp32"].requires == ("onnxruntime",)


def test_a_detector_that_finds_nothing_proves_nothing(tmp_path: Path) -> None:
    def blind() -> torch.nn.Module:
        return small_detector(score_thresh=0.9999)

    checkpoint = save_checkpoint(
        blind(),
        tmp_path / "run",
        evaluation=(images(), np.zeros((6, 1, 5), np.float32)),
        task="detection",
        name="blind",
    )
    with pytest.raises(GateError, match="no detection on either side"):
        export_variants(checkpoint, variants=["onnx-fp32"], model=blind, out=tmp_path / "artifacts")
    assert not list((tmp_path / "artifacts").rglob("artifact.json"))


def test_bfloat16_is_refused_for_detectors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="boxes are chosen by comparisons"):
        export_variants(checkpoint, variants=["torchscript-bf16"], model=small_detector, out=tmp_path)


def test_a_detector_by_name_gives_boxes_of_random_weights(tmp_path: Path) -> None:
    save_file({"input": images(4, 96)}, tmp_path / "samples.safetensors")
    adopted = adopt(
        "torchvision:ssdlite320_mobilenet_v3_large", samples=str(tmp_path / "samples.safetensors"), weights="random",
        root=tmp_path / "runs",
    )  # fmt: skip
    assert adopted.checkpoint.spec.task == "detection"
    module = adopted.checkpoint.build_module()
    assert isinstance(module, Detector)
    with torch.no_grad():
        scores = module(torch.from_numpy(images(1, 96)))["scores"]
    # Not all alike, as plain random weights give them.
    assert float(scores[scores > 0].std()) > 1e-3


def test_published_names_of_weights_fit_the_adapted_module(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    save_file({"input": images(4, 96)}, tmp_path / "samples.safetensors")
    adopted = adopt(
        "torchvision:ssdlite320_mobilenet_v3_large", samples=str(tmp_path / "samples.safetensors"),
        weights=str(tmp_path / "weights.pth"), root=tmp_path / "runs",
    )  # fmt: skip
    built = adopted.checkpoint.build_module().state_dict()
    assert all(torch.equal(tensor, built[f"detector.{name}"]) for name, tensor in plain.state_dict().items())
