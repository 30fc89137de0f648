"""Networks whose own rounding breaks the fixed tolerance of fp32: a right export passes, a wrong one is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.directory import DirectoryWriter
from dlops.errors import GateError, LossError
from dlops.export import parity as export_parity
from dlops.export import to_onnx
from dlops.export.pipeline import export_variants
from dlops.export.verify import verify_artifact
from dlops.facts import facts_of
from dlops.parity import TOLERANCES, self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.samples import Samples
from dlops.saving import save_checkpoint

CPU = SessionOptions(device="cpu", threads=1)
FIXED, CEILING = TOLERANCES["fp32"], TOLERANCES["fp16"]
# Own errors of about 1e-6, 3e-4 and 1e-2 of the largest output.
WELL, ILL, BEYOND = 0.0, 3e3, 1e5
CHANNELS, CLASSES = 16, 3


class Cancels(nn.Module):
    """Sums that cancel all but a rest, whose rounding is `gain` times as large as it would be.

    The last layer is a small one, and `gain` times one that gives zero for whatever the first two can give. What folds
    the normalization into the convolution rounds otherwise.
    """

    def __init__(self, gain: float) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(1, CHANNELS, 3)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.last = nn.Conv2d(CHANNELS, CLASSES, 1, bias=False)
        with torch.no_grad():
            for tensor in (*self.first.parameters(), self.norm.bias, self.norm.running_mean, self.last.weight):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) / 2)
            for tensor in (self.norm.weight, self.norm.running_var):
                tensor.copy_(1 + torch.rand(tensor.shape, generator=draw))
            scale = (self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()).double()
            shift = scale * (self.first.bias - self.norm.running_mean) + self.norm.bias
            reached = torch.cat([scale[:, None] * self.first.weight.flatten(1), shift[:, None]], dim=1)
            cancelling = torch.linalg.svd(reached.T)[2][-CLASSES:]
            self.last.weight += gain * cancelling[:, :, None, None].float()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(image)))


class CancelsInFloat32(Cancels):
    """The same, and its author wrote down the dtype."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image.float())


def ill() -> nn.Module:
    return Cancels(ILL)


def saved(model: nn.Module, directory: Path) -> Checkpoint:
    images = np.random.default_rng(0).normal(size=(12, 1, 8, 8)).astype(np.float32)
    return save_checkpoint(
        model.eval(), directory / "run", evaluation=Samples(raw=tuple(images), inputs={"image": images}),
        task="segmentation", name="cancels", max_batch=4,
    )  # fmt: skip


def exported(model: nn.Module, directory: Path, *slugs: str) -> dict[str, Artifact]:
    made = export_variants(
        saved(model, directory), variants=slugs or ("onnx-fp32",), model=model, out=directory / "artifacts"
    )
    return {artifact.slug: artifact for artifact in made}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return exported(ill(), tmp_path_factory.mktemp("ill"), "onnx-fp32", "torchscript-fp32")


def last_layer_scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    last = next(one for one in model.graph.initializer if list(one.dims) == [CLASSES, CHANNELS, 1, 1])
    weight = onnx.numpy_helper.to_array(last) * np.float32(factor)
    last.CopyFrom(onnx.numpy_helper.from_array(weight, last.name))
    return model


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes the exporter write a file whose last layer has weights that are wrong by a factor."""
    write = to_onnx._to_fp32

    def by(factor: float) -> None:
        def wrong(request: object) -> onnx.ModelProto:
            return last_layer_scaled(write(request), factor)  # type: ignore[arg-type]

        monkeypatch.setattr(to_onnx, "_to_fp32", wrong)

    return by


@pytest.mark.parametrize("slug", ["onnx-fp32", "torchscript-fp32"])
def test_an_ill_conditioned_network_is_held_to_a_multiple_of_its_own_error(
    made: dict[str, Artifact], slug: str
) -> None:
    parity = open_artifact(made[slug].directory).parity
    own = parity.own_error
    assert own is not None
    assert own.samples == 12
    assert FIXED.max_rel is not None
    assert CEILING.max_rel is not None
    assert FIXED.max_rel < own.max_rel < parity.tolerance.max_rel == pytest.approx(4 * own.max_rel)
    assert parity.tolerance.max_abs == pytest.approx(4 * own.max_abs)
    assert parity.tolerance.max_rel < CEILING.max_rel
    # Without it the gate would have said no, and with it there is room.
    assert FIXED.max_rel < parity.max_rel < 0.75 * parity.tolerance.max_rel


@pytest.mark.parametrize("slug", ["onnx-fp32", "torchscript-fp32"])
def test_its_artifact_verifies_by_the_own_error_that_it_records(made: dict[str, Artifact], slug: str) -> None:
    artifact = made[slug]
    found = verify_artifact(artifact.directory, options=CPU)
    assert found.parity.own_error == artifact.parity.own_error
    assert found.parity.tolerance == artifact.parity.tolerance
    assert "bounds follow" in facts_of(artifact)["Parity"]["error of eager fp32 itself"]
    # A wide tolerance alone, with no own error that explains it, lets nothing pass.
    parity = artifact.parity.model_copy(update={"own_error": None})
    unexplained = artifact.model_copy(update={"parity": parity}).located_at(artifact.directory)
    session = open_session(artifact, CPU)
    with pytest.raises(GateError, match=r"allowed 0\.0001"):
        self_test(unexplained, session)
    session.close()


def test_a_wrong_export_of_it_is_refused_though_half_precision_would_take_it(
    tmp_path: Path, scaled: Callable[[float], None]
) -> None:
    scaled(1.004)
    with pytest.raises(LossError, match=r"outputs differ.*; eager fp32 is itself off its own float64 answer by"):
        exported(ill(), tmp_path)
    assert not list((tmp_path / "artifacts").rglob("artifact.json"))


def test_a_wrong_export_of_any_other_network_is_held_to_the_fixed_tolerance(
    tmp_path: Path, scaled: Callable[[float], None]
) -> None:
    scaled(1.0003)
    with pytest.raises(LossError, match=r"allowed 0\.0001; eager fp32 is itself off"):
        exported(Cancels(WELL), tmp_path)


def test_a_model_file_that_was_exchanged_for_a_wrong_one_fails_verification(
    made: dict[str, Artifact], tmp_path: Path
) -> None:
    artifact, copied = made["onnx-fp32"], tmp_path / "copied"
    shutil.copytree(artifact.directory, copied)
    wrong = last_layer_scaled(onnx.load(artifact.path("model")), 1.004)
    with DirectoryWriter(copied) as writer:
        files = {**artifact.files, "model": writer.add("model.onnx", wrong.SerializeToString())}
        writer.commit(artifact.model_copy(update={"files": files}))
    with pytest.raises(GateError, match="outputs differ"):
        verify_artifact(copied, options=CPU)


def test_an_own_error_above_the_ceiling_excuses_nothing_and_is_said(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"allowed 0\.0001; the network itself is ill-conditioned") as caught:
        exported(Cancels(BEYOND), tmp_path)
    assert "beyond 0.02 and 0.005 that excuses nothing" in caught.value.message
    assert "is it trained" in str(caught.value.hint)


def test_a_module_that_cannot_compute_in_float64_keeps_the_fixed_tolerance_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"allowed 0\.0001; the module's own error was not measured: it does not run"):
        exported(CancelsInFloat32(ILL), tmp_path)
    passing = exported(CancelsInFloat32(WELL), tmp_path / "well")["onnx-fp32"]
    assert open_artifact(passing.directory).parity.own_error is None


def test_float64_is_run_only_where_fp32_breaks_the_fixed_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(export_parity, "float64_outputs", lambda *arguments: runs.append(arguments))
    parity = exported(Cancels(WELL), tmp_path / "well")["onnx-fp32"].parity
    assert parity.own_error is None
    assert parity.tolerance == FIXED
    # Half precision has a bound of its own, which the noise of this one breaks.
    with pytest.raises(LossError, match="outputs differ"):
        exported(ill(), tmp_path / "ill", "onnx-fp16")
    assert runs == []


def test_all_variants_of_a_structure_share_one_run_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = export_parity.float64_outputs

    def counted(*arguments: object) -> object:
        runs.append(arguments)
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export_parity, "float64_outputs", counted)
    both = exported(ill(), tmp_path, "onnx-fp32", "torchscript-fp32")
    assert both["onnx-fp32"].parity.own_error == both["torchscript-fp32"].parity.own_error is not None
    assert len(runs) == 1
