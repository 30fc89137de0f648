"""The pipeline end to end, as `dlops quickstart` runs it, with short rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import dlops
from dlops.workflows.quickstart import VARIANTS

COMMAND = [
    sys.executable, "-m", "dlops", "quickstart",
    "--duration", "0.3", "--device", "cpu",
]  # fmt: skip


# The whole pipeline in one fixture: on a machine that does other things it takes its time.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("quickstart")
    answer = subprocess.run(
        COMMAND, cwd=folder, capture_output=True, text=True, timeout=560, check=False,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return folder, answer


def test_every_variant_is_there_and_verifies(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    for slug in VARIANTS:
        dlops.verify_artifact(folder / "artifacts" / "digits-cnn" / slug)


def test_the_table_has_a_row_a_variant_and_one_for_eager(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, answer = finished
    for name in (*VARIANTS, "eager"):
        assert name in answer.stdout
    assert "What to type next" in answer.stdout


def test_the_report_holds_in_process_and_network_rows_with_their_samples(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    [path] = (folder / "reports").iterdir()
    report = dlops.read_report(path)
    assert {row.boundary for row in report.measurements} == {"host", "network"}
    assert (path / "report.html").stat().st_size > 10_000
    samples = report.raw_samples()
    assert all(len(samples[row.samples]) == row.latency.samples for row in report.measurements)
    assert json.loads((path / "report.json").read_text())["chosen"] == report.chosen


def test_the_service_answered_real_samples_and_has_gone(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, answer = finished
    said = re.search(r"(\d+) of (\d+) held-out samples answered right", answer.stdout)
    assert said is not None
    assert int(said[2]) == 100
    assert int(said[1]) >= 95
    assert "the server has stopped" in answer.stderr


def test_the_model_and_every_variant_keep_the_accuracy_that_is_promised(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = finished
    for slug in VARIANTS:
        accuracy = dlops.open_artifact(folder / "artifacts" / "digits-cnn" / slug).accuracy
        assert accuracy is not None
        assert accuracy.reference >= 0.98
        assert accuracy.drop_points <= (0.5 if slug == "onnx-int8" else 1.0)


def test_progress_is_on_stderr_and_results_are_on_stdout(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, answer = finished
    for step in range(1, 6):
        assert f"[{step}/5]" in answer.stderr
        assert f"[{step}/5]" not in answer.stdout


# The first two stages have tests of their own for Ctrl-C; here they take what an earlier run left.
INTERRUPTED = """
import dlops, dlops.cli
from pathlib import Path
from dlops.__main__ import main
from dlops.workflows import quickstart

folder = Path({folder!r})
quickstart.train_recipe = lambda *_: dlops.load_checkpoint(folder / "runs" / "cnn" / "short")
quickstart._export = lambda *_, **__: ([dlops.open_artifact(folder / "artifacts" / "digits-cnn" / "onnx-fp32")], {{}})
dlops.cli.run = lambda arguments: quickstart.quickstart(duration_s={duration}, max_drop=5, device="cpu")
main()
"""


@pytest.mark.parametrize(
    ("begun", "duration", "boundaries"),
    [("^batch 1: ", 30, {"host"}), ("8 in flight", 1, {"host", "network"})],
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
