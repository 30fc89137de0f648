"""The boundary "device": inputs are in place before a call, and copies are in no latency."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import dlops
from dlops.artifact import Artifact
from dlops.bench.payload import artifact_feeds
from dlops.bench.run import measure, save_report
from dlops.bench.worker import local_arm
from dlops.cli import run
from dlops.report import read_report
from dlops.runtimes import Placement

ON_CPU = Placement(runtime="none", device="cpu", provider="none", precision="fp32", threads=1)


class Recorder:
    """A session whose bound calls write down what is done to them."""

    def __init__(self, artifact: Artifact) -> None:
        self.signature, self.placement = artifact.signature, ON_CPU
        self.stream, self.enqueues = None, False
        self.done: list[object] = []

    def bind(self, feed):
        self.done.append(("bind", feed))
        return self

    def copy_in(self, feed) -> None:
        self.done.append(("copy_in", feed))

    def run(self) -> None:
        self.done.append("run")

    def synchronize(self) -> None:
        self.done.append("synchronize")


def test_the_samples_take_turns_and_each_call_is_waited_for(make_artifact) -> None:
    artifact = make_artifact()
    session = Recorder(artifact)
    local_arm("it", session, samples=artifact, batch=4, boundary="device").take_turn(0.001)
    bound, *calls = session.done
    feeds = itertools.cycle(artifact_feeds(artifact, 4))
    assert np.array_equal(bound[1]["input"], next(feeds)["input"])
    assert len(calls) % 3 == 0
    for (what, fed), *rest in zip(calls[::3], calls[1::3], calls[2::3], strict=True):
        assert (what, rest) == ("copy_in", ["run", "synchronize"])
        assert np.array_equal(fed["input"], next(feeds)["input"])


def test_the_device_is_a_boundary_and_comes_out_the_same_again(make_artifact, tmp_path: Path) -> None:
    measured = measure([make_artifact()], boundary=("device", "host"), batch=(4,), duration_s=0.1, threads=1)
    assert [row.boundary for row in measured.measurements] == ["device", "host"]
    save_report(measured, tmp_path / "kept")
    report = read_report(tmp_path / "kept")
    assert dlops.reanalyse(report).measurements == report.measurements


def test_a_checkpoints_module_has_the_boundary_too(digits_artifact: Artifact, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="a checkpoint's module needs torch")
    from dlops.saving import save_checkpoint

    inputs = torch.randn(8, 16).numpy()
    module = torch.nn.Linear(16, 10)
    checkpoint = save_checkpoint(module, tmp_path / "run", evaluation=(inputs, np.zeros(8, np.int64)), max_batch=64)
    measured = measure([], checkpoint=checkpoint, model=module, boundary=("device",), duration_s=0.1, threads=1)
    assert [(row.runtime, row.boundary) for row in measured.measurements] == [("eager", "device")]


def test_the_command_names_the_boundary(make_artifact, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(make_artifact().directory)
    status = run(["bench", folder, "--boundary", "device", "--duration", "0.1", "--threads", "1", "--device", "cpu"])
    assert status in (0, 3)
    assert "on the device, batch 1" in capsys.readouterr().out
