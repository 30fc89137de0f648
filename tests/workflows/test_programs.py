"""A program that torch.export saved is exported as any other model, and unpickled only where one says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from dlops.artifact import open_artifact
from dlops.cli import run
from dlops.errors import UsageError
from dlops.runtimes import open_session
from dlops.workflows.programs import open_program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.linear(x) * scale}


def save_program(module: nn.Module, path: Path, *, dynamic: bool = True) -> Path:
    batch = {0: torch.export.Dim("batch", max=16)} if dynamic else None
    program = torch.export.export(
        module.eval(), (torch.zeros(3, 5), torch.ones(3, 1)), dynamic_shapes=(batch, batch) if dynamic else None
    )
    torch.export.save(program, str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    save_file(
        {"x": rng.standard_normal((40, 5), np.float32), "scale": rng.random((40, 1), np.float32)}, "samples.safetensors"
    )
    return tmp_path


def test_a_program_becomes_an_artifact_without_trust(folder: Path) -> None:
    save_program(Net(), folder / "scorer.pt2")
    assert run(["export", "scorer.pt2", "--samples", "samples.safetensors", "--format", "torchscript"]) == 0
    artifact = open_artifact(folder / "artifacts" / "scorer" / "torchscript-fp32")
    assert [spec.name for spec in artifact.signature.inputs] == ["x", "scale"]
    assert [spec.name for spec in artifact.signature.outputs] == ["scores"]
    assert artifact.signature.max_batch == 16


def test_its_artifact_is_made_again_by_naming_the_file(folder: Path, capsys) -> None:
    save_program(Net(), folder / "scorer.pt2")
    assert run(["export", "scorer.pt2", "--samples", "samples.safetensors", "--no-worth"]) == 0
    assert run(["export", "scorer.pt2", "--reproduce", "artifacts/scorer/onnx-fp32"]) == 0
    assert "byte for byte the same" in capsys.readouterr().out


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(dim=1))


@pytest.mark.parametrize("trust", [False, True])
def test_a_length_of_a_program_stays_open(folder: Path, trust: bool) -> None:
    dims = {0: torch.export.Dim("batch", max=16), 1: torch.export.Dim("length", min=2, max=32)}
    program = torch.export.export(Pooled().eval(), (torch.zeros(3, 6, dtype=torch.int64),), dynamic_shapes=(dims,))
    torch.export.save(program, str(folder / "pooled.pt2"))
    save_file({"ids": np.random.default_rng(0).integers(0, 20, (40, 6))}, "ids.safetensors")
    command = ["export", "pooled.pt2", "--samples", "ids.safetensors", "--no-worth", *["--trust"] * trust]
    assert run(command) == 0
    artifact = open_artifact(folder / "artifacts" / "pooled" / "onnx-fp32")
    (name,) = set(artifact.signature.dims) - {"batch"}
    assert (artifact.signature.dims[name].min, artifact.signature.dims[name].max) == (2, 32)
    session = open_session(artifact)
    for length in (2, 9, 32):
        ids = np.random.default_rng(1).integers(0, 20, (5, length))
        expected = program.module()(torch.from_numpy(ids)).detach().numpy()
        np.testing.assert_allclose(session.run({"ids": ids})["logits"], expected, rtol=1e-4, atol=1e-5)
    session.close()


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({1: torch.export.Dim("length", min=2)}, "a dim of its input ids has no largest size"),
        ({1: 2 * torch.export.Dim("half", min=2, max=16)}, "a dim of its input ids follows from another"),
    ],
    ids=["open end", "a multiple"],
)
def test_a_length_that_cannot_be_described_is_refused(folder: Path, dims: dict[int, object], said: str) -> None:
    shapes = ({0: torch.export.Dim("batch", max=16), **dims},)
    program = torch.export.export(Pooled().eval(), (torch.zeros(3, 6, dtype=torch.int64),), dynamic_shapes=shapes)
    torch.export.save(program, str(folder / "pooled.pt2"))
    with pytest.raises(UsageError, match=said):
        open_program(folder / "pooled.pt2", trust=False)


class Nested(nn.Module):
    """A block without gradients becomes a program within the program."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scaled = x * scale
        return self.linear(scaled)


def test_what_only_torch_reads_needs_trust(folder: Path) -> None:
    path = save_program(Nested(), folder / "nested.pt2")
    with pytest.raises(UsageError, match="not among the operators that compute") as caught:
        open_program(path, trust=False)
    assert "--trust has torch's own loader read it" in str(caught.value.hint)
    opened = open_program(path, trust=True)
    assert opened.inputs == ("x:float32[batch,5]", "scale:float32[batch,1]")
    x, scale = torch.randn(4, 5), torch.rand(4, 1)
    assert opened.module.eval()(x, scale).shape == (4, 3)


def test_a_fixed_batch_is_refused(folder: Path) -> None:
    path = save_program(Net(), folder / "fixed.pt2", dynamic=False)
    with pytest.raises(UsageError, match="the batch of its input x is fixed") as caught:
        open_program(path, trust=False)
    assert "dynamic_shapes" in str(caught.value.hint)


def test_a_file_that_torch_cannot_read_is_one_line(folder: Path) -> None:
    (folder / "garbage.pt2").write_bytes(b"hello")
    command = [sys.executable, "-m", "dlops", "export", "garbage.pt2", "--trust", "--samples", "samples.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("dlops: garbage.pt2: torch.export.load cannot read it: ")
    assert done.stderr.count("\n") <= 2


def test_a_file_that_is_not_there_is_said(folder: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_program(folder / "nowhere.pt2", trust=True)
