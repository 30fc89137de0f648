from __future__ import annotations

import time
from typing import ClassVar

import pytest

from dlops.artifact import Artifact
from dlops.serve import gpus
from dlops.serve.gpus import gpu_of, take_own_gpu, visible_gpus
from dlops.serve.launch import ServerProcess
from dlops.serve.settings import Settings


@pytest.mark.parametrize(
    ("workers", "visible", "chosen"),
    [
        (4, ["0", "1"], ["0", "1", "0", "1"]),
        (2, ["GPU-5f", "MIG-7a"], ["GPU-5f", "MIG-7a"]),
        # More GPUs than workers: the others are left to somebody else.
        (2, ["2", "3", "5"], ["2", "3"]),
        (3, ["0"], [None, None, None]),
        (2, [], [None, None]),
        (1, ["0", "1"], [None]),
    ],
)
def test_workers_take_turns_over_the_gpus(workers: int, visible: list[str], chosen: list[str | None]) -> None:
    assert [gpu_of(worker, workers=workers, visible=visible) for worker in range(1, workers + 1)] == chosen


def test_the_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        gpus: ClassVar = ("a", "b")

    monkeypatch.setattr(gpus, "describe_environment", Two)
    assert visible_gpus({}) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": " 3, GPU-5f "}) == ["3", "GPU-5f"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_worker_on_the_cpu_leaves_the_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    take_own_gpu(2, Settings(workers=2, device="cpu"))
    assert gpus.os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    take_own_gpu(2, Settings(workers=2))
    assert gpus.os.environ["CUDA_VISIBLE_DEVICES"] == "1"


GPUS = ("worker 1: GPU 4", "worker 2: GPU 6")


def test_each_worker_of_a_server_has_its_own(digits_artifact: Artifact) -> None:
    with ServerProcess(digits_artifact, workers=2, env={"CUDA_VISIBLE_DEVICES": "4,6"}) as server:
        # It is ready as soon as one of them is: the other may not have said its own yet.
        until = time.monotonic() + 30
        while time.monotonic() < until and not all(line in server.log_path.read_text() for line in GPUS):
            time.sleep(0.05)
        log = server.log_path.read_text()
    for line in GPUS:
        assert line in log
