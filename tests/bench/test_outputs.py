"""Where a report and its copies go: what has no place is said before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dlops.cli import run
from dlops.errors import MachineError
from dlops.workflows.publish import Outputs


@pytest.mark.parametrize("option", ["--out", "--json", "--markdown", "--csv", "--html"])
def test_a_place_below_a_file_is_refused_before_anything_is_measured(option, make_artifact, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    artifact = make_artifact()
    assert run(["bench", str(artifact.directory), "--duration", "60", option, str(tmp_path / "file" / "x")]) == 2
    said = capsys.readouterr().err
    assert f"{option} {tmp_path / 'file'}" in said
    assert "is no folder" in said
    assert "timing" not in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_copy_that_is_a_folder_is_refused_too(make_artifact, tmp_path, capsys) -> None:
    pair = [str(make_artifact(slug).directory) for slug in ("onnx-fp32", "onnx-int8")]
    assert run(["compare", *pair, "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: a folder" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_to_is_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MachineError, match="permission denied"):
        Outputs(directory=tmp_path / "new" / "report").check()
    Outputs(directory=tmp_path).check(report=False)


def test_a_folder_that_could_be_made_is_not_made_yet(tmp_path: Path) -> None:
    Outputs(directory=tmp_path / "a" / "b", json=str(tmp_path / "c" / "d.json"), csv="-").check()
    assert list(tmp_path.iterdir()) == []
