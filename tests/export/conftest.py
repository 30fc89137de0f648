"""A small convolutional network on scikit-learn's scanned digits, trained in seconds: real weights, real images."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.export import to_onnx
from dlops.export.formats import ExportRequest
from dlops.export.pipeline import export_variants
from dlops.preprocess import Decode, Normalize, Preprocess, Scale
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.onnxruntime import OnnxSession
from dlops.samples import Samples
from dlops.saving import save_checkpoint

EVALUATION = 360
CALIBRATION = 400
PREPROCESS = Preprocess(
    input="image", shape=(1, 8, 8), steps=(Decode(mode="L"), Scale(factor=1 / 255), Normalize(mean=(0.3,), std=(0.35,)))
)


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.2)
        self.classify = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classify(self.dropout(self.features(x).mean(dim=(2, 3))))


def split() -> tuple[Samples, Samples, Samples]:
    """Train, calibration (a part of train) and evaluation samples, seeded."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    pixels = np.round(data.images[order] / 16 * 255).astype(np.uint8)
    # A few scans occur twice; a copy in both splits would be refused.
    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    pixels, targets = pixels[np.sort(first)], data.target[order][np.sort(first)].astype(np.int64)
    samples = Samples(raw=tuple(pixels), targets=targets)
    train = samples.take(range(EVALUATION, len(samples)))
    return train, train.take(range(CALIBRATION)), samples.take(range(EVALUATION))


def trained(train: Samples, *, epochs: int = 12) -> SmallNet:
    torch.manual_seed(0)
    model = SmallNet()
    inputs, targets = torch.from_numpy(PREPROCESS.batch(train.raw)), torch.from_numpy(train.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for indices in torch.randperm(len(inputs)).split(64):
            loss = nn.functional.cross_entropy(model(inputs[indices]), targets[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def save_digits(directory: Path, model: nn.Module, **changes: object) -> Checkpoint:
    _, calibration, evaluation = split()
    settings = {
        "evaluation": evaluation, "calibration": calibration, "preprocess": PREPROCESS, "name": "digits",
        "labels": tuple("0123456789"), "max_batch": 32, "seed": 0,
    }  # fmt: skip
    return save_checkpoint(model, directory, **{**settings, **changes})


DENSE = (
    "torchscript-fp32", "torchscript-bf16", "onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int8dyn", "onnx-int8wo",
    "onnx-fp8", "openvino-fp32", "openvino-fp16", "openvino-bf16", "openvino-int8",
)  # fmt: skip
PRUNED = (
    "onnx-fp32-pruned50", "onnx-int8-pruned50", "onnx-int8dyn-pruned50", "onnx-int8wo-pruned50",
    "torchscript-fp32-pruned50", "torchscript-bf16-pruned50", "openvino-int8-pruned50",
)  # fmt: skip
SaveDigits = Callable[..., Checkpoint]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on networks of this size wait for each other, on a busy machine for minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for runtime in ("eager", "onnxruntime", "openvino", "executorch"):
            patch.setattr(f"dlops.runtimes.{runtime}.available_cores", lambda: 1)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


_capture = to_onnx._to_fp32


@pytest.fixture(scope="session", autouse=True)
def one_graph_of_each_network() -> Iterator[None]:
    """SmallNet with the same weights and signature is captured once for all tests, 36 times otherwise."""
    captured: dict[object, bytes] = {}

    def once(request: ExportRequest) -> onnx.ModelProto:
        module = request.module
        if type(module) is not SmallNet:
            return _capture(request)
        weights = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            weights.update(name.encode() + tensor.numpy().tobytes())
        key = (weights.hexdigest(), str(module), request.signature.model_dump_json())
        if key not in captured:
            captured[key] = _capture(request).SerializeToString(deterministic=True)
        return onnx.load_from_string(captured[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "_to_fp32", once)
        yield


@pytest.fixture
def captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compare an export with an earlier one."""
    monkeypatch.setattr(to_onnx, "_to_fp32", _capture)


@pytest.fixture(scope="session")
def digits_model() -> nn.Module:
    """Trained; tests must not change it."""
    return trained(split()[0])


@pytest.fixture(scope="session")
def save_digits_checkpoint() -> SaveDigits:
    return save_digits


@pytest.fixture(scope="session")
def checkpoint(digits_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_digits(tmp_path_factory.mktemp("runs") / "digits", digits_model)


@pytest.fixture(scope="session")
def exported_dense(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Every variant of the digits checkpoint that is not pruned, by slug; tests must not change the folders."""
    return _exported(checkpoint, DENSE, tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, exported_dense: dict[str, Artifact]) -> dict[str, Artifact]:
    """Those and the pruned ones, whose recovery takes longer than all else."""
    return exported_dense | _exported(checkpoint, PRUNED, exported_dense["onnx-fp32"].directory.parents[1])


def _exported(checkpoint: Checkpoint, slugs: tuple[str, ...], out: Path) -> dict[str, Artifact]:
    made = export_variants(
        checkpoint, variants=slugs, out=out, model=SmallNet, max_drop=2.0,
        command=("/opt/venv/bin/dlops", "export", "--out=/opt/elsewhere/artifacts"),
    )  # fmt: skip
    return {artifact.slug: artifact for artifact in made}


def executed_operators(artifact: Artifact) -> Counter[str]:
    """How often each operator is in the graph that ONNX Runtime runs, after all its fusions."""
    options = SessionOptions(device="cpu", threads=1)
    with tempfile.TemporaryDirectory() as folder:
        profile = open_session(artifact, replace(options, profile_prefix=Path(folder, "profile")))
        assert isinstance(profile, OnnxSession)
        first = artifact.signature.inputs[0].name
        profile.run({first: artifact.samples().inputs[first][:1]})
        events = json.loads(profile.end_profile().read_text())
        profile.close()
    return Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time"))


@pytest.fixture
def small_net() -> type[nn.Module]:
    return SmallNet
