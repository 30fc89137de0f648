"""The C++ program of deploy/libtorch: built against the installed torch, run on artifacts that are right and wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import dlops
from dlops.artifact import Artifact
from dlops.export.pipeline import export_variants
from dlops.samples import Samples
from dlops.saving import save_checkpoint

SOURCE = Path(dlops.__file__).parent / "deploy" / "libtorch"
MISSING = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and '.join(MISSING)} here to build a C++ program with"),
    pytest.mark.slow,
]
ROWS = 40


class TwoOutputs(nn.Module):
    """Integers and numbers in, a dict out, one output of it without floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 12), nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.mix((self.embed(tokens) * weight.unsqueeze(-1)).mean(dim=1))
        return {"logits": logits, "best": logits.argmax(dim=1, keepdim=True)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("libtorch")
    prefix = torch.utils.cmake_prefix_path
    for command in (["cmake", "-S", SOURCE, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"], ["cmake", "--build", build]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_artifact"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("cpp")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    inputs = {"tokens": rng.integers(0, 50, (ROWS, 7)), "weight": rng.random((ROWS, 7), np.float32)}
    checkpoint = save_checkpoint(
        TwoOutputs(), folder / "run", name="two", max_batch=8,
        output_names=("logits", "best"), evaluation=Samples(raw=tuple(inputs["weight"]), inputs=inputs),
    )  # fmt: skip
    slugs = ("torchscript-fp32", "torchscript-bf16")
    made = export_variants(checkpoint, variants=slugs, model=TwoOutputs, out=folder / "artifacts")
    return {artifact.slug: artifact for artifact in made}


def run(program: Path, folder: Path | str) -> tuple[int, str]:
    done = subprocess.run([str(program), str(folder)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_an_artifact_agrees_with_its_samples(program: Path, artifacts: dict[str, Artifact]) -> None:
    status, said = run(program, artifacts["torchscript-fp32"].directory)
    assert status == 0, said
    heading, *checks = said.splitlines()
    assert heading == "two/torchscript-fp32 on the CPU, 32 samples"
    assert [line.partition(":")[0] for line in checks] == [
        f"{name} at batch {size}" for size in (1, 8) for name in ("logits", "best")
    ]
    assert all(line.endswith("agrees") for line in checks)


def test_what_is_beyond_the_recorded_tolerance_ends_with_1(
    program: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    folder = shutil.copytree(artifacts["torchscript-bf16"].directory, tmp_path / "copy")
    assert run(program, folder)[0] == 0
    manifest = json.loads((folder / "artifact.json").read_text())
    manifest["name"] = "zwei ä😀"  # which json escapes
    # bfloat16 keeps its own tolerance and not that of fp32.
    manifest["parity"]["tolerance"] |= {"max_abs": 1e-6, "max_rel": 1e-6}
    (folder / "artifact.json").write_text(json.dumps(manifest))
    status, said = run(program, folder)
    assert (status, said.count("DIFFERS")) == (1, 2), said
    assert said.startswith("zwei ä😀/torchscript-bf16 on the CPU")


@pytest.mark.parametrize("value", [np.nan, 9.0])
def test_samples_with_another_output_end_with_1(
    program: Path, artifacts: dict[str, Artifact], value: float, tmp_path: Path
) -> None:
    artifact = artifacts["torchscript-fp32"]
    folder = shutil.copytree(artifact.directory, tmp_path / "copy")
    path = folder / artifact.files["samples"].path
    tensors = load_file(path)
    tensors["output.0.logits"][5, 1] = value
    save_file(tensors, path)
    status, said = run(program, folder)
    assert (status, said.count("DIFFERS")) == (1, 2), said


def test_what_cannot_be_read_ends_with_2_and_one_line(
    program: Path, artifacts: dict[str, Artifact], digits_artifact: Artifact, tmp_path: Path
) -> None:
    artifact = artifacts["torchscript-fp32"]
    model, samples = (artifact.files[role].path for role in ("model", "samples"))

    def broken(name: str, content: bytes, number: int) -> Path:
        folder = shutil.copytree(artifact.directory, tmp_path / str(number))
        (folder / name).write_bytes(content)
        return folder

    manifest, whole = (artifact.directory / "artifact.json").read_bytes(), (artifact.directory / samples).read_bytes()
    size = (artifact.directory / model).stat().st_size
    cases = [
        (tmp_path / "nowhere", "artifact.json: missing"),
        (digits_artifact.directory, "its format is onnx, and LibTorch runs torchscript"),
        (broken("artifact.json", manifest[:300], 1), "not JSON, at byte 300"),
        (broken("artifact.json", b"[" * 100_000, 2), "not JSON"),
        (broken("artifact.json", b"{}", 3), 'no field "variant"'),
        (broken(model, b"\0" * size, 4), "LibTorch cannot load or run it"),
        (broken(model, b"\0" * (size - 1), 5), "not as long as the manifest says"),
        (broken(samples, b"\xff" * len(whole), 6), "cut short, or no safetensors file"),
        (broken(samples, whole[:8] + whole[8:].replace(b"[32,7]", b"[99,7]"), 7), "does not lie within the file"),
    ]
    for folder, reason in cases:
        status, said = run(program, folder)
        assert status == 2, said
        assert reason in said
        assert said.count("\n") == 1, said
    assert run(program, "")[0] == 2
