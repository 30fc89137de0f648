"""Where a report and its copies go: what has no place is said before anything is measured."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dlops.bench import results
from dlops.bench.results import save_report
from dlops.cli import run
from dlops.directory import write_copy
from dlops.errors import MachineError
from dlops.report import read_report
from dlops.workflows import publish as publishing
from dlops.workflows.publish import Outputs, publish


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes, which stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


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


def test_a_pipe_and_a_link_stay_what_they_are(tmp_path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_copy(pipe, "through the pipe")
    reader.join(10)
    assert read == ["through the pipe"]
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    write_copy(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_page_has_no_place_on_stdout(make_artifact, capsys) -> None:
    assert run(["bench", str(make_artifact().directory), "--html", "-"]) == 2
    assert "--html -" in capsys.readouterr().err


def test_two_copies_of_one_name_are_refused(make_artifact, tmp_path, capsys) -> None:
    options = ["--json", str(tmp_path / "f"), "--csv", str(tmp_path / "." / "f")]
    assert run(["bench", str(make_artifact().directory), *options]) == 2
    assert "--json and --csv both name" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


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


def test_without_any_folder_for_temporary_files_the_table_is_printed(example, tmp_path, monkeypatch, capsys) -> None:
    def none(*arguments: object, **options: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "mkdtemp", none)
    with no_room_beyond(4_000), pytest.raises(MachineError, match="File too large"):
        publish(example(), Outputs(directory=tmp_path / "r"))
    assert "onnx-int8-pruned50" in capsys.readouterr().out


def test_a_full_disk_still_prints_the_table_and_leaves_nothing(example, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with no_room_beyond(4_000), pytest.raises(MachineError, match="File too large"):
        publish(example(), Outputs(directory=tmp_path / "r"))
    assert "onnx-int8-pruned50" in capsys.readouterr().out
    assert not list(tmp_path.glob("r/*"))
    assert not list((tmp_path / "tmp").iterdir())


def test_a_kill_while_a_report_is_replaced_leaves_no_page_of_another(example, tmp_path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    first = save_report(example(), tmp_path / "r")
    monkeypatch.setattr("dlops.bench.results.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_report(example(title="another"), tmp_path / "r")
    assert read_report(tmp_path / "r").title != first.title
    assert not (tmp_path / "r" / "report.html").exists()
    monkeypatch.undo()
    monkeypatch.setattr("dlops.bench.results.DirectoryWriter.commit", killed)
    save_before = read_report(tmp_path / "r").to_json()
    with pytest.raises(KeyboardInterrupt):
        save_report(example(), tmp_path / "r")
    assert read_report(tmp_path / "r").to_json() == save_before


def test_a_copy_that_has_no_room_costs_neither_the_table_nor_the_report(example, tmp_path, monkeypatch, capsys) -> None:
    def full(path: Path, text: str) -> None:
        raise MachineError(f"writing {path}: the disk is full")

    monkeypatch.setattr(publishing, "write_copy", full)
    with pytest.raises(MachineError, match=r"writing .*copy\.json: the disk is full"):
        publish(example(), Outputs(directory=tmp_path / "r", json=str(tmp_path / "copy.json")))
    assert "onnx-int8-pruned50" in capsys.readouterr().out
    assert len(read_report(tmp_path / "r").raw_samples()) > 0


def test_what_a_full_disk_did_not_take_goes_to_the_temporary_folder(example, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full_here(measured, directory=None):
        if directory == tmp_path / "r":
            raise MachineError(f"writing {directory}: the disk is full")
        return save_report(measured, directory)

    monkeypatch.setattr(publishing, "save_report", full_here)
    with pytest.raises(MachineError, match="the disk is full; the report is in") as caught:
        publish(example(), Outputs(directory=tmp_path / "r"))
    (folder,) = tmp_path.glob("dlops-report-*")
    assert str(folder) in caught.value.message
    assert len(read_report(folder).raw_samples()) > 0
    assert "onnx-int8-pruned50" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["a file", "no working folder", "/proc"])
def test_a_folder_that_cannot_be_made_any_more_costs_no_report(what, example, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out, said = tmp_path / "late", "file exists"
    if what == "a file":
        out.write_text("mine")
    elif what == "/proc":
        out, said = Path("/proc/late"), "no such file or directory"
    else:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        out, said = None, "no such file or directory"
    with pytest.raises(MachineError, match=f"{said}.*; the report is in"):
        publish(example(), Outputs(directory=out))
    (folder,) = tmp_path.glob("dlops-report-*")
    assert len(read_report(folder).raw_samples()) > 0
    assert "onnx-int8-pruned50" in capsys.readouterr().out


def test_a_comparison_loses_nothing_to_a_file_in_its_place(make_artifact, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def meanwhile(measured, **options):
        (tmp_path / "late").write_text("mine")
        return measured

    monkeypatch.setattr("dlops.workflows.compare.calibrated", meanwhile)
    pair = [str(make_artifact(slug).directory) for slug in ("onnx-fp32", "onnx-int8")]
    options = ["--duration", "0.1", "--processes", "1", "--out", str(tmp_path / "late")]
    assert run(["compare", *pair, *options]) == 4
    said = capsys.readouterr()
    assert "file exists" in said.err
    assert "onnx-int8" in said.out
    (folder,) = tmp_path.glob("dlops-report-*")
    assert len(read_report(folder).measurements) == 2
    assert (tmp_path / "late").read_text() == "mine"


def test_no_copy_replaces_a_file_of_what_is_read(make_artifact, example, tmp_path, capsys) -> None:
    report = save_report(example(), tmp_path / "report")
    before = (tmp_path / "report" / "report.json").read_bytes()
    folder = str(report.directory)
    assert run(["compare", folder, folder, "--json", f"{folder}/report.json"]) == 2
    assert "a file of what is read" in capsys.readouterr().err
    assert (tmp_path / "report" / "report.json").read_bytes() == before
    artifact = make_artifact()
    manifest = artifact.directory / "artifact.json"
    before = manifest.read_bytes()
    assert run(["bench", str(artifact.directory), "--json", str(manifest), "--duration", "60"]) == 2
    assert manifest.read_bytes() == before


def test_ctrl_c_while_the_report_is_made_does_not_lose_it(example, tmp_path, monkeypatch, capsys) -> None:
    render = results.render_html

    def slow(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return render(*arguments)

    monkeypatch.setattr(results, "render_html", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        publish(example(), Outputs(directory=tmp_path / "report"))
    except KeyboardInterrupt:
        # Let through it would end the tests, and not fail this one.
        pytest.fail("Ctrl-C got through before the report was written")
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_report(tmp_path / "report").measurements
    assert (tmp_path / "report" / "report.html").is_file()


def test_options_that_would_be_passed_over_are_refused(example, tmp_path, capsys) -> None:
    save_report(example(), tmp_path / "report")
    folder = str(tmp_path / "report")
    assert run(["compare", folder, folder, "--trust"]) == 2
    assert "--trust: for what is measured" in capsys.readouterr().err
    (tmp_path / "trace").write_text("0.1\n0.2\n")
    trace = ["bench", "http://127.0.0.1:9", "--trace", str(tmp_path / "trace")]
    assert run([*trace, "--duration", "9"]) == 2
    assert "a trace lasts as long as it is" in capsys.readouterr().err
    assert run(["bench", "http://127.0.0.1:9", "--rate", "9", "--pauses", "1:1e300"]) == 2
    assert "at most a day" in capsys.readouterr().err
    assert run(["bench", "http://127.0.0.1:9", "--rate", "9", "--senders", "65"]) == 2
