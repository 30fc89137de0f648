"""Ctrl-C in `dlops quickstart`: what was measured is kept, and the server has gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import dlops

# The first two stages have tests of their own for Ctrl-C; here they take what an earlier run left.
INTERRUPTED = """
import dlops, dlops.cli
from pathlib import Path
from dlops.__main__ import main
from dlops.workflows import quickstart

folder = Path({folder!r})
quickstart.BATCHES = (1,)
quickstart.train_recipe = lambda *_: dlops.load_checkpoint(folder / "runs" / "cnn" / "short")
quickstart._export = lambda *_, **__: ([dlops.open_artifact(folder / "artifacts" / "digits-cnn" / "onnx-fp32")], {{}})
dlops.cli.run = lambda arguments: quickstart.quickstart(duration_s={duration}, max_drop=5, device="cpu")
main()
"""


@pytest.mark.parametrize(
    ("begun", "duration", "boundaries"),
    [("^batch 1: ", 30, {"host"}), ("8 in flight", 0.3, {"host", "network"})],
    ids=["in process", "over HTTP"],
)
def test_ctrl_c_keeps_what_was_measured_and_stops_the_server(
    begun: str, duration: int, boundaries: set[str], working_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(folder=str(working_folder), duration=duration)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if re.search(begun, line):
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
    assert {row.boundary for row in report.measurements} == boundaries
    assert path.name in errors
    served = re.search(r"serving on (http://\S+)", errors)
    assert (served is not None) == ("network" in boundaries)
    if served is not None:
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(served[1])
