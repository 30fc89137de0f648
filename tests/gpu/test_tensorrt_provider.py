"""ONNX Runtime's TensorRT provider itself: it computes what the model computed, and its engine is built once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import dlops
from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import MachineError
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, onnxruntime, open_session
from dlops.runtimes.tensorrt_provider import PROVIDER
from dlops.train.launch import configure, train_recipe

TENSORRT = SessionOptions(device="tensorrt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    try:
        onnxruntime.choose_device(TENSORRT)
    except MachineError as error:
        pytest.skip(str(error))
    config = configure("cnn", overrides=["epochs=12", "accelerator=cuda"])
    return train_recipe("cnn", config, run_dir=tmp_path_factory.mktemp("gpu") / "run")


@pytest.mark.parametrize("slug", ["onnx-fp32", "onnx-fp16", "onnx-int8"])
def test_an_artifact_runs_on_tensorrt_and_agrees_with_its_samples(
    slug: str, trained: Checkpoint, tmp_path: Path
) -> None:
    [artifact] = dlops.export_variants(trained, variants=[slug], out=tmp_path, device="tensorrt")
    session = open_session(artifact, TENSORRT)
    assert session.placement.provider == PROVIDER
    assert PROVIDER in session.placement.nodes
    self_test(artifact, session)
    session.close()


def test_a_kept_engine_loads_in_less_time_than_it_was_built(trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=["onnx-fp32"], out=tmp_path)
    first, second = (_opening_s(artifact) for _ in range(2))
    assert list((artifact.directory / "tensorrt").rglob("*.engine"))
    assert second < first / 2


def _opening_s(artifact: Artifact) -> float:
    began = time.perf_counter()
    open_session(artifact, TENSORRT).close()
    return time.perf_counter() - began
