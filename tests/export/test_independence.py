"""What answers a sample otherwise in another batch is refused before anything is exported of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import UsageError
from dlops.export.pipeline import export_variants
from dlops.runtimes import open_session
from dlops.samples import Samples
from dlops.saving import save_checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class DoublesAlone(Net):
    """Captured with two rows, the branch is gone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if x.shape[0] == 1 else 1)


class DoublesSevens(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if x.shape[0] == 7 else 1)


class Centred(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - 0.01 * x.mean(0))


class NeedsTwo(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] < 2:
            raise ValueError("two rows at least")
        return super().forward(x)


class RoundsOtherwise(Net):
    """As an ill-conditioned network whose sums have another order in another batch: in float64 it does not move."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounding = 1e-3 if x.dtype == torch.float32 and x.shape[0] == 1 else 0.0
        return super().forward(x) * (1 + rounding)


def saved(model: nn.Module, folder: Path, *, max_batch: int = 16) -> Checkpoint:
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    return save_checkpoint(
        model.eval(), folder / "run", evaluation=Samples(raw=tuple(x), inputs={"x": x}), name="net", max_batch=max_batch
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (DoublesAlone, r"depends on the rest of its batch: at batch 1 largest"),
        (DoublesSevens, r"depends on the rest of its batch: at batch 7 largest"),
        (Centred, r"depends on the rest of its batch"),
        (NeedsTwo, r"does not run at batch 1: ValueError: two rows at least"),
    ],
)
def test_it_is_said_and_nothing_is_written(model: type[Net], said: str, tmp_path: Path) -> None:
    built = model()
    with pytest.raises(UsageError, match=said):
        export_variants(saved(built, tmp_path), variants=["onnx-fp32"], model=built, out=tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


def test_for_one_sample_a_call_it_is_exported_as_it_is_there(tmp_path: Path) -> None:
    built = DoublesAlone()
    [made] = export_variants(
        saved(built, tmp_path, max_batch=1), variants=["onnx-fp32"], model=built, out=tmp_path / "artifacts"
    )
    session = open_session(open_artifact(made.directory))
    x = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    with torch.no_grad():
        expected = built(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run({"x": x})["logits"], expected, rtol=1e-4, atol=1e-5)
    session.close()


def test_what_is_rounding_alone_is_no_dependence(tmp_path: Path) -> None:
    built = RoundsOtherwise()
    [made] = export_variants(saved(built, tmp_path), variants=["onnx-fp32"], model=built, out=tmp_path / "artifacts")
    assert made.parity.batches == (1, 2, 7, 16)
