"""The stages on CUDA: what was asked for is what runs, and it computes what the CPU computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dlops
from dlops.bench.profile import add_profiles
from dlops.checkpoint import Checkpoint
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.train.launch import configure, train_recipe

CUDA = SessionOptions(device="cuda")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("gpu")
    config = configure("cnn", overrides=["epochs=12", "accelerator=cuda"])
    return train_recipe("cnn", config, run_dir=folder / "run")


def test_training_on_cuda_learns_the_digits(trained: Checkpoint) -> None:
    assert trained.metrics["accuracy"] > 0.95  # type: ignore[operator]


def test_training_in_bf16_on_cuda_learns_the_digits(tmp_path: Path) -> None:
    config = configure("cnn", overrides=["epochs=12", "accelerator=cuda", "precision=bf16"])
    assert train_recipe("cnn", config, run_dir=tmp_path).metrics["accuracy"] > 0.95  # type: ignore[operator]


@pytest.mark.parametrize("slug", ["onnx-fp32", "onnx-fp16", "onnx-int8", "torchscript-fp32"])
def test_an_artifact_runs_on_cuda_and_agrees_with_its_samples(slug: str, trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=[slug], out=tmp_path, device="cuda")
    session = open_session(artifact, CUDA)
    assert session.placement.device == "cuda:0"
    self_test(artifact, session)
    session.close()


def test_cpu_and_cuda_decide_alike(trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=["onnx-fp32"], out=tmp_path)
    feed = artifact.samples().inputs
    sessions = [open_session(artifact, SessionOptions(device=device)) for device in ("cpu", "cuda")]
    assert [session.placement.device for session in sessions] == ["cpu", "cuda:0"]
    answers = [session.run(feed) for session in sessions]
    np.testing.assert_array_equal(*(answer["logits"].argmax(axis=1) for answer in answers))


def test_bench_says_that_cuda_ran(trained: Checkpoint, tmp_path: Path) -> None:
    artifacts = dlops.export_variants(trained, variants=["onnx-fp32"], out=tmp_path)
    measured = dlops.measure(artifacts, checkpoint=trained, duration_s=0.5, device="cuda")
    assert {row.device for row in measured.measurements} == {"cuda:0"}


@pytest.mark.parametrize("slug", ["onnx-fp32", "torchscript-fp32"])
def test_a_profile_on_cuda_names_the_gpu_and_what_did_not_run_there(
    slug: str, trained: Checkpoint, tmp_path: Path
) -> None:
    artifacts = dlops.export_variants(trained, variants=[slug], out=tmp_path, device="cuda")
    measured = dlops.measure(artifacts, duration_s=0.5, device="cuda")
    (profile,) = add_profiles(measured, artifacts, checkpoint=None, options=CUDA).report.profiles
    onnx = slug.startswith("onnx")
    assert profile.provider == ("CUDAExecutionProvider" if onnx else "cuda")
    assert profile.provider in profile.providers
    assert profile.copies > 0
    assert onnx or profile.times == "device"
    elsewhere = {name for provider, use in profile.providers.items() for name in use.names}
    assert len(elsewhere) == sum(use.operators for name, use in profile.providers.items() if name != profile.provider)
    shares = sum(one.share for one in profile.operators) + profile.others_share + profile.outside_share
    assert shares == pytest.approx(1.0)


def test_doctor_finds_that_cuda_works() -> None:
    from dlops.doctor import examine

    status = {probe.name: probe.status for probe in examine().probes}
    assert status["torch cuda"] == "ok"
    assert status["onnxruntime cuda"] == "ok"
