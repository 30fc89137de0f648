"""What lies there already and would come out the same is kept; what changed, broke or was cut off is made again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dlops import directory
from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.cli import run
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.errors import GateError, MachineError
from dlops.export import making, pipeline, record, reduce
from dlops.export.pipeline import export_variants

from .conftest import DENSE, SmallNet

# As the fixture `exported` was made.
MAX_DROP = 2.0
Export = Callable[..., Artifact]


class _Refused:
    def __call__(self, *_: object, **__: object) -> object:
        return pytest.fail("it was built again")


@pytest.fixture
def there(exported_dense: dict[str, Artifact], tmp_path: Path) -> Path:
    """A folder with a copy of each dense artifact."""
    shutil.copytree(exported_dense["onnx-fp32"].directory.parents[1], tmp_path / "out")
    return tmp_path / "out"


def test_unchanged_variants_are_not_built_again_and_said(
    there: Path, exported_dense: dict[str, Artifact], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(making.Export, "_make", _Refused())
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    kept = export_variants(checkpoint, variants=DENSE, out=there, model=SmallNet, max_drop=MAX_DROP)
    assert [artifact.created for artifact in kept] == [exported_dense[slug].created for slug in DENSE]
    assert [artifact.directory for artifact in kept] == [there / "digits" / slug for slug in DENSE]
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{slug}: already exported, unchanged: {there / 'digits' / slug}" for slug in DENSE]


def test_an_unchanged_pruned_variant_is_not_pruned_again(
    exported: dict[str, Artifact], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prune", "recover"):
        monkeypatch.setattr(reduce, name, _Refused())
    slugs = ["onnx-int8-pruned50", "torchscript-fp32-pruned50"]
    out = exported["onnx-fp32"].directory.parents[1]
    kept = export_variants(checkpoint, variants=slugs, out=out, model=SmallNet, max_drop=MAX_DROP)
    assert [artifact.created for artifact in kept] == [exported[slug].created for slug in slugs]


@pytest.fixture
def again(there: Path, checkpoint: Checkpoint) -> Export:
    """Exports TorchScript into that folder, which is quick to make."""

    def export(**changes: object) -> Artifact:
        arguments = {"out": there, "model": SmallNet, "max_drop": MAX_DROP, **changes}
        (artifact,) = export_variants(checkpoint, variants=["torchscript-fp32"], **arguments)
        return artifact

    return export


class _Edited(SmallNet):
    """The same weights, another computation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1)


def test_what_was_asked_for_otherwise_is_made_again(
    again: Export, exported_dense: dict[str, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    created = exported_dense["torchscript-fp32"].created
    assert again().created == created
    for changes, said in (
        ({"max_drop": 1.5}, "exporting again: max_drop 2.0, now 1.5"),
        ({"model": _Edited}, "its code was changed"),
        ({"force": True}, ""),
    ):
        capsys.readouterr()
        made = again(**changes)
        assert made.created > created, changes
        assert said in capsys.readouterr().err
        created = made.created


@pytest.mark.parametrize("words", [[], ["--force"]])
def test_the_command_forces_where_it_is_told_to(
    checkpoint: Checkpoint, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []
    monkeypatch.setattr(pipeline, "export_variants", lambda *_, force, **__: given.append(force) or [])
    assert run(["export", str(checkpoint.directory), *words]) == 0
    assert given == [bool(words)]


def test_another_version_or_machine_makes_it_again(
    again: Export, exported_dense: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here = describe_environment()

    def elsewhere(**changes: object) -> None:
        monkeypatch.setattr(record, "describe_environment", lambda: here.model_copy(update=changes))

    elsewhere(cpu="Another CPU", cores=99, packages={**here.packages, "lightning-fabric": "0.0"})
    assert again().created == exported_dense["torchscript-fp32"].created
    elsewhere(instruction_sets=(), packages={**here.packages, "onnx": "0.0"})
    made = again()
    assert made.created > exported_dense["torchscript-fp32"].created
    said = capsys.readouterr().err
    assert f"onnx {here.packages['onnx']}, now 0.0" in said
    assert "now none" in said
    # What was recorded is what it was made with.
    assert again().created == made.created


def test_another_checkpoint_makes_it_again(
    again: Export, there: Path, save_digits_checkpoint: Callable[..., Checkpoint], digits_model: nn.Module,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = save_digits_checkpoint(tmp_path / "other", digits_model)
    export_variants(other, variants=["torchscript-fp32"], out=there, model=SmallNet, max_drop=MAX_DROP)
    assert "exporting again: checkpoint digits " in capsys.readouterr().err
    # And back: it is the artifact of the other one now.
    assert again().provenance.checkpoint_sha256 != other.sha256


def damage(artifact: Artifact) -> None:
    content = bytearray(artifact.path("samples").read_bytes())
    content[-1] ^= 1
    artifact.path("samples").write_bytes(content)


def cut_manifest(artifact: Artifact) -> None:
    path = artifact.directory / "artifact.json"
    path.write_bytes(path.read_bytes()[:500])


def _written_anew(artifact: Artifact, **contents: bytes | None) -> None:
    """The artifact with other files, its digests right."""
    files = {role: artifact.path(role).read_bytes() for role in artifact.files} | contents
    suffixes = {"model": "pt", "samples": "safetensors", "reproduce": "json"}
    with DirectoryWriter(artifact.directory) as writer:
        payloads = {
            role: writer.add(f"{role}.{suffixes[role]}", content)
            for role, content in files.items()
            if content is not None
        }
        writer.commit(artifact.model_copy(update={"files": payloads}))


def drop_record(artifact: Artifact) -> None:
    _written_anew(artifact, reproduce=None)


def spoil_record(artifact: Artifact) -> None:
    _written_anew(artifact, reproduce=artifact.path("reproduce").read_bytes().replace(b'"strict"', b'"stringent"'))


def record_of_another(artifact: Artifact) -> None:
    other = artifact.directory.parent / "onnx-fp32"
    _written_anew(artifact, reproduce=open_artifact(other).path("reproduce").read_bytes())


def other_weights(artifact: Artifact) -> None:
    path = artifact.directory / "doubled.pt"
    with warnings.catch_warnings(action="ignore"):  # torch announces TorchScript's retirement
        module = torch.jit.load(str(artifact.path("model")))
        doubled = nn.Sequential(module, nn.Linear(10, 10, bias=False)).requires_grad_(False)
        doubled[1].weight.copy_(2 * torch.eye(10))
        torch.jit.trace(doubled, torch.zeros(3, 1, 8, 8)).save(str(path))
    _written_anew(artifact, model=path.read_bytes())
    path.unlink()


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (damage, "SHA-256 differs from the manifest's"),
        (cut_manifest, "truncated or not JSON"),
        (drop_record, "an older dlops exported it"),
        (spoil_record, "not one that dlops wrote"),
        (record_of_another, "it is the record of another artifact"),
        (other_weights, "differ from the reference"),
    ],
)
def test_what_is_damaged_old_or_no_longer_right_is_made_again(
    again: Export, there: Path, exported_dense: dict[str, Artifact], alter: Callable[[Artifact], None], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    created = exported_dense["torchscript-fp32"].created
    alter(open_artifact(there / "digits" / "torchscript-fp32"))
    made = again()
    assert made.created > created
    assert "torchscript-fp32: exporting again: " in (errors := capsys.readouterr().err)
    assert said in errors
    assert again().created == made.created
    assert len(list(made.directory.iterdir())) == 4


def test_a_variant_that_then_fails_a_gate_leaves_what_lay_there(
    again: Export, there: Path, exported_dense: dict[str, Artifact]
) -> None:
    with pytest.raises(GateError, match="upper end of its interval"):
        again(max_drop=0.1, strict=True)
    left = open_artifact(there / "digits" / "torchscript-fp32")
    assert left == exported_dense["torchscript-fp32"].located_at(left.directory)


_CUT_OFF = """
import os, signal, sys
# Two threads on networks of this size wait for each other.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
import conftest
from dlops.__main__ import main
from dlops.directory import DirectoryWriter
sys.modules["own_net"] = conftest
out, whole = sys.argv.pop(1), DirectoryWriter.commit
def commit(self, manifest):
    committed = whole(self, manifest)
    if str(self.directory).startswith(out):
        os.kill(os.getpid(), signal.SIGKILL)
    return committed
DirectoryWriter.commit = commit
main()
"""


def test_an_export_that_was_killed_goes_on_where_it_was(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slugs, out = ["torchscript-fp32", "onnx-fp32", "onnx-fp16"], tmp_path / "out"
    words = [
        "export", str(checkpoint.directory), "--model", "python:own_net:SmallNet", "--out", str(out),
        *(word for slug in slugs for word in ("--variant", slug)),
    ]  # fmt: skip
    killed = subprocess.run(
        [sys.executable, "-c", _CUT_OFF, str(out), *words],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=240,
        # Its temporary folders stay behind, in a place that pytest removes.
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.parent.name for path in out.rglob("artifact.json")] == ["torchscript-fp32"]
    first = open_artifact(out / "digits" / "torchscript-fp32")
    monkeypatch.setitem(sys.modules, "own_net", SimpleNamespace(SmallNet=SmallNet))  # type: ignore[arg-type]
    assert run(words) == 0
    output, errors = capfd.readouterr()
    assert [line for line in errors.splitlines() if "export" in line] == [
        f"torchscript-fp32: already exported, unchanged: {first.directory}",
        "onnx-fp32: exporting",
        "onnx-fp16: exporting",
    ]
    assert [Path(line) for line in output.splitlines()] == [out / "digits" / slug for slug in slugs]
    assert open_artifact(first.directory) == first
    assert all(open_artifact(out / "digits" / slug).created > first.created for slug in slugs[1:])


@pytest.mark.parametrize("written", ["reproduce-", "artifact.json"])
def test_no_room_for_the_last_files_leaves_the_old_artifact_or_nothing(
    again: Export, there: Path, tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = directory._write_synced

    def full(path: Path, content: bytes) -> None:
        if written in path.name and tmp_path in path.parents:
            path.write_bytes(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(directory, "_write_synced", full)
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    for changes in ({"force": True}, {"out": tmp_path / "fresh"}):
        with pytest.raises(MachineError, match="the disk is full"):
            again(**changes)
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "fresh").exists()
