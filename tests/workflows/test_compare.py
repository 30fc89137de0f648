"""`dlops compare` as a person meets it: what it prints, where copies go, and its exit statuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import dlops as dlops_api
from dlops.bench.compare import compare_reports
from dlops.bench.results import Measured, save_report
from dlops.cli import run
from dlops.errors import MachineError, UsageError
from dlops.workflows.compare import exit_status, read_gate, read_margin

DLOPS = [sys.executable, "-m", "dlops"]
FP32, INT8 = "artifacts/digits-cnn/onnx-fp32", "artifacts/digits-cnn/onnx-int8"
Copy = Callable[..., Path]


def dlops(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has its imports behind it; a process of its own is for the signals."""
    words = [str(argument) for argument in arguments]
    with contextlib.chdir(cwd), redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        status = run(words)
    return subprocess.CompletedProcess(words, status, output.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def measured(working_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of both artifacts, made by the command."""
    out = tmp_path_factory.mktemp("compared") / "report"
    answer = dlops("bench", FP32, INT8, "--duration", 0.3, "--device", "cpu", "--out", out, cwd=working_folder)
    assert answer.returncode in (0, 3), answer.stderr
    return out


@pytest.fixture
def times(measured: Path, tmp_path: Path) -> Copy:
    """times(factor) is a report whose every call took that many times as long; its samples hardly vary."""

    def copy(factor: float, *, calls: int = 2000) -> Path:
        report = dlops_api.read_report(measured)
        draw = np.random.default_rng(0)
        samples = {}
        for row in report.measurements:
            latencies = (factor * 100_000 * np.exp(draw.normal(0, 0.002, calls))).astype(np.int64)
            samples |= {row.samples: latencies, f"{row.samples}.starts": np.cumsum(latencies)}
            samples[f"{row.samples}.turns"] = np.arange(calls) * 40 // calls
        directory = tmp_path / f"times-{factor:g}-{calls}"
        save_report(Measured(report=_certified(report, samples), samples=samples), directory)
        return directory

    return copy


def _certified(report: dlops_api.Report, samples: dict[str, np.ndarray]) -> dlops_api.Report:
    from dlops.bench.stats import summarize

    rows = tuple(
        row.model_copy(
            update={"latency": summarize(samples[row.samples], turns=samples[f"{row.samples}.turns"])}
        )
        for row in report.measurements
    )  # fmt: skip
    # The telemetry's series are among the samples that these replace.
    return report.model_copy(update={"measurements": rows, "telemetry": ()})


def test_two_artifacts_are_measured_in_one_run_and_their_report_is_written(
    working_folder: Path, tmp_path: Path
) -> None:
    answer = dlops(
        "compare", FP32, INT8, "--duration", 0.3, "--processes", 1, "--batch", 1, "--batch", 4, "--device", "cpu",
        "--out", tmp_path / "report", "--json", tmp_path / "found.json", "--markdown", tmp_path / "found.md",
        cwd=working_folder,
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert answer.returncode == {"REGRESSED": 1, "INCONCLUSIVE": 3}.get(found["verdict"], 0), answer.stderr
    assert found["paired"]
    assert [row["load"]["batch"] for row in found["rows"]] == [1, 4]
    assert [judged["quantity"] for judged in found["rows"][0]["judged"]] == ["p50", "p99", "throughput"]
    assert found["processes"] == 1
    assert "one process of each" in answer.stdout
    assert len(dlops_api.read_report(tmp_path / "report").measurements) == 4
    assert max(map(len, answer.stdout.splitlines())) <= 80
    assert "timing 2 targets" in answer.stderr
    assert "timing" not in answer.stdout
    for row in found["rows"]:
        for judged in row["judged"]:
            assert judged["word"] in answer.stdout
            assert judged["word"] in (tmp_path / "found.md").read_text()


def test_an_artifact_against_itself_did_not_regress(working_folder: Path, tmp_path: Path) -> None:
    answer = dlops(
        "compare", FP32, FP32, "--duration", 1, "--processes", 6, "--device", "cpu", "--out", tmp_path / "report",
        "--gate", "p50=+30%", "--json", "-", cwd=working_folder,
    )  # fmt: skip
    found = json.loads(answer.stdout)
    assert found["processes"] == 6
    assert "in 6 processes each" in answer.stderr
    (row,) = found["rows"]
    assert row["base_target"] != row["new_target"]
    assert [judged["quantity"] for judged in row["judged"]] == ["p50"]
    assert row["judged"][0]["word"] in ("PASSED", "INCONCLUSIVE")
    assert answer.returncode == {"PASSED": 0, "INCONCLUSIVE": 3}[row["judged"][0]["word"]]


@pytest.mark.parametrize(
    ("factor", "arguments", "status", "words"),
    [
        (1.2, [], 1, ["REGRESSED"]),
        (1.0, [], 0, ["SAME"]),
        (0.8, [], 0, ["IMPROVED"]),
        (1.03, ["--margin", "5%"], 0, ["SAME"]),
        (1.03, ["--margin", "2%"], 1, ["REGRESSED", "margin 2 %"]),
        (1.2, ["--gate", "p50=+30%"], 0, ["PASSED", "p50 +30 %"]),
        (1.2, ["--gate", "p50=+30%,throughput=-3%"], 1, ["PASSED", "REGRESSED"]),
    ],
)
def test_the_status_of_two_reports(
    factor: float, arguments: list[str], status: int, words: list[str], times: Copy, tmp_path: Path
) -> None:
    base, new = times(1), times(factor) if factor != 1 else times(1, calls=2040)
    answer = dlops("compare", base, new / "report.json", *arguments, cwd=tmp_path)
    assert answer.returncode == status, answer.stdout + answer.stderr
    assert "INCONCLUSIVE" not in answer.stdout
    for word in words:
        assert word in answer.stdout
    assert "only the spread within each run" in " ".join(answer.stdout.split())


def test_a_target_that_failed_goes_before_no_verdict_and_after_a_regression(times: Copy) -> None:
    reports = [dlops_api.read_report(times(factor)) for factor in (1, 1.001, 1.2)]
    base, same, slower = (Measured(report=report, samples=report.raw_samples()) for report in reports)
    assert exit_status(compare_reports(base, same), failed=True) == 4
    assert exit_status(compare_reports(base, slower), failed=True) == 1


def test_a_copy_that_has_no_room_costs_neither_the_table_nor_the_report(
    working_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise MachineError(f"writing {path}: the disk is full")

    monkeypatch.setattr("dlops.workflows.compare.write_copy", full)
    words = [FP32, FP32, "--duration", 0.5, "--device", "cpu", "--out", tmp_path / "report"]
    answer = dlops("compare", *words, "--json", tmp_path / "copy.json", cwd=working_folder)
    assert answer.returncode == 4, answer.stderr
    assert "copy.json: the disk is full" in answer.stderr
    assert "p50" in answer.stdout
    assert len(dlops_api.read_report(tmp_path / "report").raw_samples()) > 0


def test_too_few_calls_are_no_verdict_but_a_regression_goes_first(times: Copy, tmp_path: Path) -> None:
    few = [times(factor, calls=200) for factor in (1, 1.001, 1.5)]
    same = dlops("compare", few[0], few[1], cwd=tmp_path)
    assert same.returncode == 3, same.stdout
    assert "p99 is not certified" in " ".join(same.stdout.split())
    assert dlops("compare", few[0], few[2], cwd=tmp_path).returncode == 1
    assert dlops("compare", few[0], few[1], "--gate", "p99=+5%", cwd=tmp_path).returncode == 3


def test_markdown_and_json_go_to_stdout_alone(times: Copy, tmp_path: Path) -> None:
    base = times(1)
    markdown = dlops("compare", base, base, "--markdown", "-", cwd=tmp_path).stdout
    assert markdown.startswith("**")
    assert "| onnx-fp32" in markdown
    parsed = json.loads(dlops("compare", base, base, "--json", "-", cwd=tmp_path).stdout)
    assert parsed["verdict"] == "SAME"
    assert parsed["base"] == str(base)


def test_what_cannot_be_compared_is_said_in_one_line(
    working_folder: Path, measured: Path, times: Copy, tmp_path: Path
) -> None:
    one = times(1)
    artifact = working_folder / FP32
    for arguments, words in (
        ([artifact, measured], ["artifact", "report", "two of", "hint"]),
        ([working_folder / "runs/cnn/short", artifact], ["BASE", "neither an artifact nor a report"]),
        ([artifact, "http://127.0.0.1:1"], ["is an artifact and NEW (http://127.0.0.1:1) a service"]),
        ([artifact, "nowhere"], ["NEW", "no such file", "two URLs"]),
        ([measured, measured, "--batch", "4", "--out", "x"], ["--batch, --out", "for what is measured"]),
        ([one, one, "--gate", "p99=+5%", "--margin", "1%"], ["--gate", "--margin"]),
        ([artifact, artifact, "--margin", "0.5%", "--processes", 1], ["0.50%", "two processes", "1% or more"]),
        ([artifact, artifact, "--gate", "p99=+0.2%,throughput=-9%", "--processes", 1], ["0.20%", "1% or more"]),
        ([artifact, artifact, "--processes", 5], ["5 processes", "from 6", "or 1"]),
        ([measured, measured, "--processes", 6], ["--processes", "for what is measured"]),
        ([one, one, "--json", "-", "--markdown", "-"], ["stdout"]),
    ):
        answer = dlops("compare", *arguments, cwd=tmp_path)
        assert answer.returncode == 2, answer.stdout + answer.stderr
        assert answer.stdout == ""
        assert "Traceback" not in answer.stderr
        assert len(answer.stderr.splitlines()) == 2
        for word in words:
            assert word in answer.stderr or word in ("two of", "hint")


def test_two_reports_without_a_common_row_name_all_rows(measured: Path, times: Copy, tmp_path: Path) -> None:
    report = dlops_api.read_report(measured)
    rows = [row.model_copy(update={"artifact": "onnx-fp16"}) for row in report.measurements]
    other = Measured(report=report.model_copy(update={"measurements": tuple(rows)}), samples=report.raw_samples())
    save_report(other, tmp_path / "other")
    answer = dlops("compare", measured, tmp_path / "other", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.count("only in") == 4


def test_a_damaged_report_is_refused(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, tmp_path / "damaged")
    next((tmp_path / "damaged").glob("samples-*")).write_bytes(b"")
    answer = dlops("compare", measured, tmp_path / "damaged", cwd=tmp_path)
    assert answer.returncode == 2
    assert "samples" in answer.stderr


def test_ctrl_c_compares_what_was_measured_and_marks_it_partial(working_folder: Path, tmp_path: Path) -> None:
    words = ["compare", FP32, INT8, "--duration", "60", "--device", "cpu", "--out", str(tmp_path / "report")]
    with subprocess.Popen(
        [*DLOPS, *words, "--json", "-"], cwd=working_folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        # Progress is said once a round is whole, so there is something to compare.
        next(line for line in process.stderr if line.startswith("batch 1: "))
        process.send_signal(signal.SIGINT)
        found, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert json.loads(found)["partial"]
    assert dlops_api.read_report(tmp_path / "report").partial


def test_gates_and_margins_are_read() -> None:
    assert read_margin("5%") == 0.05
    assert read_margin(" 0.5% ") == 0.005
    assert read_gate("p99=+5%, throughput=-3%") == {"p99": 1.05, "throughput": 0.97}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("p98=+5%", ["'p98'", "p50, p99, throughput"]),
        ("p99=5", ["'p99=5'"]),
        ("p99=-5%", ["'p99=-5%'", "grows"]),
        ("throughput=+3%", ["falls"]),
        ("throughput=-100%", ["all of it"]),
        ("p99=+5%,p99=+6%", ["twice"]),
        ("", ["''"]),
        ("p98=+5%,p99=5,throughput=+3%", ["'p98'", "'p99=5'", "'throughput=+3%'"]),
    ],
)
def test_all_that_is_wrong_with_a_gate_is_said_with_an_example(text: str, wrong: list[str]) -> None:
    with pytest.raises(UsageError) as refusal:
        read_gate(text)
    for word in wrong:
        assert word in refusal.value.message
    assert "p99=+5%,throughput=-3%" in refusal.value.hint


@pytest.mark.parametrize("text", ["5", "0%", "-5%", "100%", "five"])
def test_a_margin_is_a_percentage(text: str) -> None:
    with pytest.raises(UsageError, match="percentage"):
        read_margin(text)


def test_a_reader_that_has_gone_changes_neither_status_nor_files(times: Copy, tmp_path: Path) -> None:
    words = ["compare", str(times(1.0)), str(times(1.5)), "--gate", "p50=+5%", "--markdown", str(tmp_path / "found.md")]
    with subprocess.Popen([*DLOPS, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    assert errors == b""
    assert "REGRESSED" in (tmp_path / "found.md").read_text()


def test_a_full_disk_behind_stdout_takes_nothing_along(working_folder: Path, tmp_path: Path) -> None:
    words = ["compare", FP32, INT8, "--duration", "0.3", "--processes", "1", "--device", "cpu"]
    words += ["--out", str(tmp_path / "report"), "--json", str(tmp_path / "found.json")]
    with Path("/dev/full").open("w") as full:
        child = subprocess.run(
            [*DLOPS, *words], cwd=working_folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert child.returncode == 4, child.stderr
    assert "dlops: stdout: no space left on device" in child.stderr
    assert "Traceback" not in child.stderr
    assert f"report: {tmp_path / 'report'}" in "".join(child.stderr.split("\n"))
    assert len(dlops_api.read_report(tmp_path / "report").measurements) == 2
    assert json.loads((tmp_path / "found.json").read_text())["rows"]
