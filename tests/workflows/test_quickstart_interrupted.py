"""Ctrl-C in `dlops quickstart`: what was measured is kept, and the server has gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dlops
from dlops.artifact import Artifact
from dlops.bench.results import MeasureInterrupted
from dlops.bench.run import measure
from dlops.errors import MachineError
from dlops.serve.launch import ServerProcess
from dlops.workflows import quickstart as stages
from dlops.workflows.ask import ask_service

# The first two stages have tests of their own for Ctrl-C; here they take what an earlier run left. Eager PyTorch is not
# timed: its process takes longest to start.
INTERRUPTED = """
import dlops, dlops.cli
from pathlib import Path
from dlops.__main__ import main
from dlops.workflows import quickstart

folder, measure = Path({folder!r}), quickstart.measure
quickstart.BATCHES = (1,)
quickstart.measure = lambda targets, checkpoint=None, **named: measure(targets, **named)
quickstart.train_recipe = lambda *_: dlops.load_checkpoint(folder / "runs" / "cnn" / "short")
quickstart._export = lambda *_, **__: ([dlops.open_artifact(folder / "artifacts" / "digits-cnn" / "onnx-fp32")], {{}})
dlops.cli.run = lambda arguments: quickstart.quickstart(duration_s=0.3, max_drop=5, device="cpu")
main()
"""


def test_ctrl_c_while_it_times_in_process_keeps_those_rows_and_starts_no_server(
    digits_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measure([digits_artifact], batch=[1], duration_s=0.05, device="cpu")
    assert not measured.partial
    monkeypatch.chdir(tmp_path)

    def interrupted(*_: object, **__: object) -> Any:
        raise MeasureInterrupted(measured)

    def served(*_: object, **__: object) -> Any:
        pytest.fail("it went on to the next stage")

    monkeypatch.setattr(stages, "train_recipe", lambda *_: SimpleNamespace(name="digits"))
    monkeypatch.setattr(stages, "_export", lambda *_, **__: ([digits_artifact], {}))
    monkeypatch.setattr(stages, "verify_artifact", lambda *_, **__: SimpleNamespace(parity=digits_artifact.parity))
    monkeypatch.setattr(stages, "measure", interrupted)
    for name in ("samples_to_ask", "ServerProcess"):
        monkeypatch.setattr(stages, name, served)
    with pytest.raises(MeasureInterrupted):
        stages.quickstart(device="cpu")
    [path] = (tmp_path / "reports").iterdir()
    report = dlops.read_report(path)
    assert report.partial
    assert [row.boundary for row in report.measurements] == ["host"]
    assert path.name in capsys.readouterr().err


def test_what_fails_after_the_timing_loses_none_of_it(
    digits_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measure([digits_artifact], batch=[1], duration_s=0.3, device="cpu")
    monkeypatch.chdir(tmp_path)
    # Settings of some other service: the server that quickstart starts for itself has its own, as 0 workers would show.
    for name, value in (
        ("DLOPS_WORKERS", "0"),
        ("DLOPS_TOKEN", "0123456789abcdefgh"),
        ("HTTP_PROXY", "http://[::1]:9"),
    ):
        monkeypatch.setenv(name, value)
    asked: list[str] = []

    def ask(url: str, *_: object, **__: object) -> Any:
        asked.append(url)
        assert urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/v2").status == 200
        raise MachineError("it answers nonsense")

    monkeypatch.setattr(
        stages, "train_recipe", lambda *_: SimpleNamespace(name="digits", spec=SimpleNamespace(labels=()))
    )
    monkeypatch.setattr(stages, "_export", lambda *_, **__: ([digits_artifact], {}))
    monkeypatch.setattr(stages, "verify_artifact", lambda *_, **__: SimpleNamespace(parity=digits_artifact.parity))
    monkeypatch.setattr(stages, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(stages, "_chosen", lambda *_: digits_artifact)
    monkeypatch.setattr(stages, "samples_to_ask", lambda _: digits_artifact.samples())
    monkeypatch.setattr(stages, "ask_service", ask)
    with pytest.raises(MachineError, match="it answers nonsense"):
        stages.quickstart(device="cpu")
    assert len(asked) == 1
    [path] = (tmp_path / "reports").iterdir()
    assert dlops.read_report(path).partial
    assert path.name in capsys.readouterr().err


def test_a_service_is_asked_past_the_proxy_and_one_that_is_gone_is_one_line(
    digits_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    samples = replace(digits_artifact.samples(), targets=np.zeros(16, np.int64)).take(range(2))
    with ServerProcess(digits_artifact) as server:
        assert ask_service(server.url, samples, labels=digits_artifact.labels).asked == 2
        url = server.url
    with pytest.raises(MachineError, match=r"/predict does not answer: ConnectError"):
        ask_service(url, samples, labels=digits_artifact.labels)


def test_ctrl_c_over_http_keeps_what_was_measured_and_stops_the_server(working_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(folder=str(working_folder))]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "8 in flight" in line:
                break
        # As a terminal does it: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.readlines()
        process.wait(timeout=60)
    errors = "".join(said)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    [path] = (tmp_path / "reports").iterdir()
    report = dlops.read_report(path)
    assert report.partial
    assert {row.boundary for row in report.measurements} == {"host", "network"}
    assert path.name in errors
    served = re.search(r"serving on (http://\S+)", errors)
    assert served is not None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(served[1])
