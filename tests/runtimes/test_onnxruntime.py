"""Where ONNX Runtime runs: CUDA where it works, the CPU where that was left open, and an error where it was not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dlops.artifact import Artifact
from dlops.errors import CorruptError, MachineError
from dlops.runtimes import SessionOptions, onnxruntime, open_session

Open = Callable[..., Any]


def falls_back(real: Open) -> Open:
    """As with libraries of CUDA that do not load: the provider is left out with a warning, and the CPU's is there."""
    return lambda *arguments, **named: real(*arguments, **{**named, "providers": ["CPUExecutionProvider"]})


def refuses(real: Open) -> Open:
    """As with a driver that is too old: CUDA is there, and its first call fails."""

    def opened(*arguments: object, providers: list[Any], **named: object) -> Any:
        if providers != ["CPUExecutionProvider"]:
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient\nat line 123")
        return real(*arguments, providers=providers, **named)

    return opened


@pytest.fixture(params=[falls_back, refuses])
def broken_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A build with CUDA and a GPU that is listed, none of which work here. What is to be said of it."""
    monkeypatch.setattr(onnxruntime, "cuda_works", lambda: True)
    monkeypatch.setattr(ort, "InferenceSession", request.param(ort.InferenceSession))
    return "ONNX Runtime gave CPUExecutionProvider" if request.param is falls_back else "driver version is insufficient"


def test_auto_runs_on_the_cpu_where_cuda_does_not_work_and_says_why_in_one_line(
    broken_cuda: str, digits_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = digits_artifact.samples()
    with contextlib.closing(open_session(digits_artifact, SessionOptions(device="auto", threads=1))) as session:
        outputs = session.run(samples.inputs)
        placement = session.placement
    np.testing.assert_allclose(outputs["logits"], samples.outputs["logits"], rtol=1e-4, atol=1e-4)
    assert (placement.device, placement.provider) == ("cpu", "CPUExecutionProvider")
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("digits/onnx-fp32: runs on the CPU")
    assert broken_cuda in line


def test_cuda_that_was_asked_for_and_does_not_work_stays_an_error(broken_cuda: str, digits_artifact: Artifact) -> None:
    with pytest.raises((MachineError, CorruptError), match=broken_cuda):
        open_session(digits_artifact, SessionOptions(device="cuda", threads=1))


def test_a_cuda_graph_is_not_replaced_by_the_cpu(broken_cuda: str, digits_artifact: Artifact) -> None:
    with pytest.raises(MachineError, match=broken_cuda):
        open_session(digits_artifact, SessionOptions(device="auto", threads=1, cuda_graph=True))


def test_a_file_that_is_no_model_is_told_as_such_wherever_it_would_run(
    digits_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "cuda_works", lambda: True)
    with pytest.raises(CorruptError, match="cannot load it"):
        onnxruntime.OnnxSession(
            b"no model", signature=digits_artifact.signature, precision="fp32", options=SessionOptions(), title="it"
        )


@pytest.mark.parametrize("wanted", [None, "0"])
def test_it_reports_its_use_to_nobody_unless_that_is_wanted(wanted: str | None, tmp_path: Path) -> None:
    # It is silent under continuous integration, which it tells by CI and its like: none of them here.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    environment |= {"TMPDIR": str(tmp_path)} | ({} if wanted is None else {"ORT_DISABLE_TELEMETRY": wanted})
    code = "import os, dlops.runtimes.onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == (wanted or "1")
    # What its telemetry leaves as soon as it is loaded.
    assert bool(list(tmp_path.iterdir())) == (wanted == "0" and sys.platform == "linux")
