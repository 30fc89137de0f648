"""The pipeline end to end, as `dlops quickstart` runs it, with short rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlops
from dlops.workflows.quickstart import VARIANTS

# A batch more starts seven processes more, which tests/bench does with less.
ONE_BATCH = """
from dlops.__main__ import main
from dlops.workflows import quickstart

quickstart.BATCHES = (1,)
main()
"""
COMMAND = [
    sys.executable, "-c", ONE_BATCH, "quickstart",
    "--duration", "0.3", "--device", "cpu", "--set", "epochs=12", "--set", "widths=[24, 48, 64]",
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
