"""The command line as a person meets it: exit statuses, one clear line for a mistake, and never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dlops as dlops_api
from dlops.cli import run

DLOPS = [sys.executable, "-m", "dlops"]


def dlops(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DLOPS, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **(env or {})},
    )


def test_help_names_every_command_on_stdout(tmp_path: Path) -> None:
    answer = dlops("--help", cwd=tmp_path)
    assert answer.returncode == 0
    for command in (
        "train", "export", "prune", "verify", "serve", "bench", "compare", "deploy", "inspect", "list", "doctor",
        "quickstart",
    ):  # fmt: skip
        assert command in answer.stdout


def test_no_arguments_show_the_help(tmp_path: Path) -> None:
    assert dlops(cwd=tmp_path).stdout == dlops("--help", cwd=tmp_path).stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from dlops.cli import run; status = run(['--help'])\n"
        "heavy = {'torch', 'bentoml', 'onnxruntime', 'numpy', 'pydantic', 'lightning_fabric'} & set(sys.modules)\n"
        "assert not heavy, heavy; sys.exit(status)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_version_is_the_package_metadata(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert dlops("--version", cwd=tmp_path).stdout.strip() == version("dlops")


MISTAKES = [
    pytest.param(["nope"], ["No such command 'nope'"], id="unknown command"),
    pytest.param(["export", "--nope"], ["--nope"], id="unknown option"),
    pytest.param(["train", "cmn"], ["unknown recipe 'cmn'", "cnn"], id="unknown recipe"),
    pytest.param(["train", "cnn", "--preset", "digitz"], ["digitz", "digits"], id="unknown preset"),
    pytest.param(
        ["train", "cnn", "--set", "epochz=3", "--set", "lr=fast"],
        ["epochz", "epochs", "lr"],
        id="all wrong keys at once",
    ),
    pytest.param(["train", "cnn", "--set", "epochs"], ["epochs", "="], id="set without a value"),
    pytest.param(["train", "cnn", "--config", "no.yaml"], ["no.yaml"], id="config file missing"),
    pytest.param(["train", "cnn", "--data", "no-such-folder"], ["no-such-folder"], id="data missing"),
    pytest.param(["train", "cnn", "--resume"], ["resume"], id="nothing to resume"),
    pytest.param(["export"], ["no checkpoint", "dlops train"], id="no checkpoint yet"),
    pytest.param(["export", "nowhere"], ["nowhere", "checkpoint.json"], id="checkpoint missing"),
    pytest.param(
        ["export", "--explain", "onnx-int8", "--max-drop", "2", "--no-repair"],
        ["--max-drop, --repair", "--explain exports nothing"],
        id="gates of nothing",
    ),
    pytest.param(["verify"], ["no artifact", "dlops export"], id="no artifact yet"),
    pytest.param(["serve"], ["no artifact"], id="nothing to serve"),
    pytest.param(["bench"], ["no artifact"], id="nothing to bench"),
    pytest.param(["bench", "a", "--payload", "b"], ["--payload", "URL"], id="a payload for nothing"),
    pytest.param(["bench", "a", "--model", "python:a:b"], ["--model", "--checkpoint"], id="a builder for nothing"),
    pytest.param(["bench", "a", "--arrivals", "poisson"], ["--arrivals", "--rate"], id="arrivals of nothing"),
    pytest.param(["compare", "one", "other"], ["BASE one", "no such file"], id="nothing to compare"),
    pytest.param(["compare", "one", "other", "--margin", "5"], ["--margin '5'", "5%"], id="margin without a unit"),
    pytest.param(
        ["compare", "one", "other", "--gate", "p98=+5%,p99=5,throughput=+3%"],
        ["'p98'", "'p99=5'", "'throughput=+3%'", "p99=+5%,throughput=-3%"],
        id="all that is wrong with a gate at once",
    ),
    pytest.param(["deploy", "bento"], ["no artifact"], id="nothing to deploy"),
    pytest.param(["deploy", "docket"], ["docket"], id="unknown kind of deployment"),
    pytest.param(["export", "--reproduce", "nowhere"], ["nowhere", "artifact.json"], id="nothing to reproduce"),
    pytest.param(
        ["export", "--reproduce", "x", "--variant", "onnx", "--force"],
        ["--variant, --force"],
        id="reproduced otherwise",
    ),
    pytest.param(["inspect", "nowhere"], ["nowhere"], id="nothing to inspect"),
    pytest.param(["quickstart", "--data", "nowhere.tar.gz"], ["nowhere.tar.gz"], id="quickstart on missing data"),
    pytest.param(["export", "--variant", "onnx", "--format", "onnx"], ["--variant"], id="variant and format"),
    pytest.param(["export", "--explain", "onnx-int8", "--precision", "int8"], ["--explain"], id="explain and export"),
]


def test_a_misspelt_name_or_a_missing_folder_is_said_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dlops.cli import run\n"
        "assert [run(['train', 'cmn']), run(['export', 'nowhere'])] == [2, 2]\n"
        "assert 'torch' not in sys.modules"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_gets_one_clear_line_and_status_2(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    # In this process, which has imported PyTorch once for all of them.
    assert run(arguments) == 2
    output, errors = capfd.readouterr()
    assert "Traceback" not in errors
    for word in words:
        assert word in errors
    assert output == ""
    assert not any(path.is_file() for path in tmp_path.rglob("*")), "a refused command left files behind"


def test_a_truncated_artifact_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "x" / "onnx-fp32"
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text('{"kind": "artifact", "schema": 1, "na')
    answer = dlops("verify", str(folder), cwd=tmp_path)
    assert answer.returncode == 2
    assert "artifact.json" in answer.stderr
    assert "truncated" in answer.stderr


def test_an_artifact_of_a_later_version_says_which_one_reads_it(tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_text(json.dumps({"kind": "artifact", "schema": 99, "dlops_version": "7.1.0"}))
    answer = dlops("verify", str(tmp_path), cwd=tmp_path)
    assert answer.returncode == 2
    assert "7.1.0" in answer.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_its_status_and_without_a_traceback(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    command = [*DLOPS, "train", "cnn", "--set", "epochs=1000", "--set", "patience=1000", "--run-dir", "run"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "1000 epochs of" in line)
        process.send_signal(number)
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors


def test_a_bench_that_is_told_to_end_writes_the_rows_that_it_has(working_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact = "artifacts/digits-cnn/onnx-fp32"
    command = [*DLOPS, "bench", artifact, "--batch", "1", "--batch", "2", "--duration", "2", "--out", str(out)]
    with subprocess.Popen(command, cwd=working_folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "at batch 2" in line)
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 143, errors
    report = dlops_api.read_report(out)
    assert report.partial
    assert report.measurements[0].load.batch == 1


@pytest.mark.parametrize(
    ("command", "begun"),
    [
        (["export", "runs/cnn/short", "--variant", "onnx-int8-pruned30", "--out", "{out}"], "removing"),
        (["bench", "artifacts/digits-cnn/onnx-fp32", "--duration", "60", "--out", "{out}"], "timing"),
        (["verify", "artifacts/digits-cnn/onnx-fp32", "--checkpoint", "runs/cnn/short"], ""),
    ],
    ids=["export", "bench", "verify"],
)
def test_ctrl_c_ends_a_command_with_130_and_leaves_nothing_half_done(
    command: list[str], begun: str, working_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [word.format(out=out) for word in command]
    with subprocess.Popen([*DLOPS, *words], cwd=working_folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if begun in line)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    # What is there is whole: bench writes the rows that it has, marked partial; export nothing.
    if command[0] == "bench" and (out / "report.json").exists():
        assert dlops_api.read_report(out).partial
    if command[0] == "export":
        assert not any(out.rglob("*"))


def test_a_bug_of_ours_says_what_to_report(tmp_path: Path) -> None:
    code = (
        "import sys, dlops.cli as cli\n"
        "@cli.app.command()\n"
        "def broken() -> None: raise KeyError('boom')\n"
        "sys.exit(cli.run(['broken']))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 70
    assert "bug in dlops" in answer.stderr
    assert "boom" in answer.stderr


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    shell = f"{' '.join(DLOPS)} list --json | true; exit ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in answer.stderr
    assert answer.returncode in (0, 141)
