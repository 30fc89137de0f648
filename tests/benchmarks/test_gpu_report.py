"""A whole report of a ResNet-50 on a GPU, with its page, kept in docs/benchmarks/resnet50/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dlops
from dlops.bench.results import save_report
from dlops.workflows.calibration import calibrated
from tests.benchmarks.resnet50 import make_resnet50

from .conftest import PAGES

BATCHES = (1, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch.cuda.is_available() is false")
def test_a_resnet_50_on_a_gpu(tmp_path: Path) -> None:
    checkpoint = make_resnet50(tmp_path / "run", max_batch=max(BATCHES))
    variants = ["onnx-fp32", "onnx-fp16", "torchscript-fp32"]
    artifacts = dlops.export_variants(
        checkpoint, variants=variants, out=tmp_path / "artifacts", device="cuda", max_drop=100.0
    )
    parts = [
        dlops.measure(
            artifacts, checkpoint=checkpoint, compiled=True, device="cuda", batch=BATCHES, boundary=("host", "device"),
            title="ResNet-50 at 224×224",
        ),
        dlops.measure(artifacts[:2], device="cuda", batch=BATCHES, boundary=("device",), cuda_graph=True),
    ]  # fmt: skip
    for part, name in zip(parts, ("resnet50", "resnet50-graphs"), strict=True):
        report = save_report(calibrated(part), PAGES / name)
        assert {row.device for row in report.measurements} == {"cuda:0"}
        assert {row.load.batch for row in report.measurements} == set(BATCHES)
        assert report.telemetry
        assert "gpu0_power_mw" in report.telemetry[0].series
