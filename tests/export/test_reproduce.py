"""reproduce.json: its text is fixed by a golden file, and from it a variant comes out again byte for byte."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from dlops.artifact import Artifact, Variant, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.cli import run
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.errors import CorruptError, GateError, UsageError
from dlops.export import record as record_module
from dlops.export import reproduce
from dlops.export.record import (
    Answer,
    CalibrationUsed,
    CheckpointUsed,
    ExportRecord,
    Machine,
    Settings,
    read_record,
)  # fmt: skip
from dlops.export.reproduce import reproduce_artifact
from dlops.runtimes import SessionOptions

from .conftest import SmallNet

CPU = SessionOptions(device="cpu", threads=1)
GOLDEN = Path(__file__).parents[1] / "golden" / "reproduce.json"
RECORD = ExportRecord(
    command=("dlops", "export", "runs/digits", "--variant", "onnx-int8-pruned50"),
    checkpoint=CheckpointUsed(name="digits", version="2", path="runs/digits", sha256="cd" * 32),
    variant=Variant(format="onnx", precision="int8", sparsity="pruned50"),
    settings=Settings(max_drop=1.5, strict=False, calibration_method="minmax", repair=False, device="auto"),
    calibration=CalibrationUsed(samples=400, sha256="ef" * 32, method="minmax"),
    seeds={"recovery": 7},
    packages={"python": "3.11.7", "dlops": "0.1.0", "torch": "2.14.1"},
    machine=Machine(
        machine="x86_64", cpu="A CPU", instruction_sets=("avx2", "avx512_vnni"), cores=2,
        gpus=("A GPU, 580.1, 81559 MiB",),
    ),
    answers={"logits": Answer(mean=0.5, std=1.25, largest=9.75, first=(0.25, -1.5))},
)  # fmt: skip


# A field that is added, removed or renamed changes what older and newer versions read: then the golden file changes
# too, by hand and on purpose, and the schema number with it where an older version could not read the result.
def test_the_record_is_written_exactly_as_the_golden_file_and_reads_back_equal() -> None:
    assert RECORD.to_json() == GOLDEN.read_text()
    assert ExportRecord.model_validate_json(GOLDEN.read_text()) == RECORD


def test_the_golden_file_holds_every_field_of_every_record() -> None:
    names = _field_names(json.loads(GOLDEN.read_text()))
    schema = ExportRecord.model_json_schema(by_alias=True)
    for record in (schema, *schema["$defs"].values()):
        assert names >= set(record.get("properties", {})), record["title"]


def test_a_record_from_before_calibration_methods_and_repair_is_read() -> None:
    older = json.loads(GOLDEN.read_text())
    for name in ("calibration_method", "repair"):
        del older["settings"][name]
    settings = ExportRecord.model_validate(older).settings
    assert (settings.calibration_method, settings.repair) == ("minmax", True)


def _field_names(document: object) -> set[str]:
    if isinstance(document, dict):
        return set(document).union(*map(_field_names, document.values()))
    return set()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"command": ("dlops", "quickstart")}, []),
        ({"machine": RECORD.machine.model_copy(update={"cpu": "Another", "cores": 64})}, []),
        ({"answers": {"logits": Answer(mean=0.5001, std=1.25, largest=9.7501, first=(0.2501, -1.5))}}, []),
        (
            {"answers": {"logits": Answer(mean=0.5, std=1.25, largest=9.75, first=(-1.5, 0.25))}},
            ["the module answers otherwise with the same weights: its code was changed"],
        ),
        (
            {"answers": {"scores": RECORD.answers["logits"]}},
            ["the module answers otherwise with the same weights: its code was changed"],
        ),
        (
            {"checkpoint": RECORD.checkpoint.model_copy(update={"name": "new", "sha256": "0" * 64}), "answers": {}},
            ["checkpoint digits cdcdcdcdcdcd…, now new 000000000000…"],
        ),
        ({"variant": Variant(format="onnx")}, ["variant onnx-int8-pruned50, now onnx-fp32"]),
        (
            {"settings": Settings(max_drop=1.5, strict=True, device="cpu")},
            ["strict False, now True", "repair False, now True", "device auto, now cpu"],
        ),
        (
            {"calibration": CalibrationUsed(samples=400, sha256="ef" * 32, method=None)},
            ["calibration method minmax, now None"],
        ),
        ({"seeds": {"recovery": 8}}, ["seed of recovery 7, now 8"]),
        (
            {"packages": {"python": "3.11.7", "dlops": "0.2.0", "onnx": "1.23.2"}},
            ["dlops 0.1.0, now 0.2.0", "torch 2.14.1, now none", "onnx none, now 1.23.2"],
        ),
        (
            {"machine": RECORD.machine.model_copy(update={"instruction_sets": ("avx2",), "gpus": ()})},
            ["instruction sets avx2, avx512_vnni, now avx2", "GPUs A GPU, 580.1, 81559 MiB, now none"],
        ),
    ],
)  # fmt: skip
def test_what_decides_is_compared_and_what_does_not_is_passed_over(changes: dict[str, object], said: list[str]) -> None:
    assert RECORD.differences(RECORD.model_copy(update=changes)) == said


@pytest.mark.parametrize("slug", ["onnx-int8", "torchscript-fp32"])
def test_an_artifact_records_what_decided_it(
    exported_dense: dict[str, Artifact], checkpoint: Checkpoint, slug: str
) -> None:
    artifact = exported_dense[slug]
    found = read_record(artifact)
    assert found.variant == artifact.variant
    assert found.checkpoint.sha256 == checkpoint.sha256
    assert found.settings == Settings(max_drop=2.0, strict=False, device="cpu")
    assert found.command == artifact.provenance.command
    here = describe_environment()
    assert found.packages["python"] == here.python
    assert found.packages["torch"] == here.packages["torch"]
    assert found.seeds == {}
    assert found.machine.gpus == ()
    assert (found.calibration is not None) == (slug == "onnx-int8")
    if found.calibration is not None:
        assert (found.calibration.samples, found.calibration.method) == (400, "minmax")
        assert found.calibration.sha256 == checkpoint.files["calibration"].sha256


def test_a_pruned_variant_records_the_seed_of_its_recovery(exported: dict[str, Artifact]) -> None:
    found = read_record(exported["torchscript-fp32-pruned50"])
    assert found.seeds == {"recovery": 0}
    assert found.calibration is not None
    assert found.calibration.method is None


def test_an_artifact_of_an_older_version_says_that_it_has_no_record(digits_artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"it has no reproduce\.json: an older dlops exported it"):
        read_record(digits_artifact)


def test_a_record_of_a_newer_version_says_which(exported_dense: dict[str, Artifact], tmp_path: Path) -> None:
    artifact = exported_dense["onnx-fp32"]
    suffixes = {"model": "onnx", "samples": "safetensors"}
    newer = artifact.path("reproduce").read_bytes().replace(b'"schema": 1', b'"schema": 2')
    with DirectoryWriter(tmp_path) as writer:
        files = {role: writer.add_file(f"{role}.{suffix}", artifact.path(role)) for role, suffix in suffixes.items()}
        files["reproduce"] = writer.add("reproduce.json", newer)
        altered = writer.commit(artifact.model_copy(update={"files": files}))
    with pytest.raises(CorruptError, match="schema 2 is newer than this dlops reads") as caught:
        read_record(altered)
    assert "upgrade" in str(caught.value.hint)


@pytest.mark.usefixtures("captured_anew")
def test_onnx_comes_out_byte_for_byte_and_nothing_is_left(
    exported_dense: dict[str, Artifact], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = reproduce_artifact(exported_dense["onnx-int8"], checkpoint, model=SmallNet)
    assert found.same == "file"
    assert found.differences == ()
    found.check()
    assert "byte for byte the same" in found.summary()
    assert list(tmp_path.iterdir()) == []


def test_another_checkpoint_and_another_version_are_named(
    exported_dense: dict[str, Artifact], save_digits_checkpoint: Callable[..., Checkpoint], digits_model: nn.Module,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    here = describe_environment()
    elsewhere = here.model_copy(update={"packages": {**here.packages, "onnx": "0.0"}, "cores": 99})
    monkeypatch.setattr(record_module, "describe_environment", lambda: elsewhere)
    # The same weights, saved at another time.
    other = save_digits_checkpoint(tmp_path / "run", digits_model)
    found = reproduce_artifact(exported_dense["onnx-fp32"], other, model=SmallNet, out=tmp_path / "out")
    assert found.same == "graph"
    assert "graph and weights are the same" in found.summary()
    with pytest.raises(
        GateError, match=rf"checkpoint digits .* now digits .*onnx {here.packages['onnx']}, now 0\.0.*cores"
    ):
        found.check()
    kept = open_artifact(tmp_path / "out" / "digits" / "onnx-fp32")
    assert kept.files["model"].sha256 == found.again


def test_another_graph_is_another_file(exported_dense: dict[str, Artifact]) -> None:
    one, other = exported_dense["onnx-fp32"], exported_dense["onnx-fp16"]
    assert reproduce._same(one, one, CPU) == "file"
    assert reproduce._same(one, other, CPU) == "nothing"


def test_the_artifact_itself_is_never_replaced(exported_dense: dict[str, Artifact], checkpoint: Checkpoint) -> None:
    artifact = exported_dense["onnx-fp32"]
    with pytest.raises(UsageError, match="it would replace what it is compared with"):
        reproduce_artifact(artifact, checkpoint, model=SmallNet, out=artifact.directory.parents[1])


def test_the_command_says_it_and_exits_with_the_finding(
    exported_dense: dict[str, Artifact], checkpoint: Checkpoint, save_digits_checkpoint: Callable[..., Checkpoint],
    digits_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "own_net", SimpleNamespace(SmallNet=SmallNet))  # type: ignore[arg-type]

    def command(slug: str) -> list[str]:
        return ["export", "--reproduce", str(exported_dense[slug].directory), "--model", "python:own_net:SmallNet"]

    again = command("onnx-fp32")
    assert run(again) == 2
    assert "no checkpoint under" in capfd.readouterr().err
    other = save_digits_checkpoint(tmp_path / "runs" / "other", digits_model)
    assert run([*command("torchscript-fp32"), str(other.directory)]) == 1
    output, errors = capfd.readouterr()
    assert "the outputs for its samples are the same" in output
    assert "checkpoint digits" in errors
    # Found by its digest, newer ones passed over.
    shutil.copytree(checkpoint.directory, tmp_path / "runs" / "digits")
    assert run([*again, "--max-drop", "2"]) == 2
    assert "leave out --max-drop" in capfd.readouterr().err
    assert run(again) == 0
    assert "byte for byte the same" in capfd.readouterr().out
    assert not (tmp_path / "artifacts").exists()


def test_torchscript_is_compared_by_its_outputs(
    exported_dense: dict[str, Artifact], checkpoint: Checkpoint, save_digits_checkpoint: Callable[..., Checkpoint],
    digits_model: nn.Module, tmp_path: Path,
) -> None:  # fmt: skip
    artifact = exported_dense["torchscript-fp32"]
    found = reproduce_artifact(artifact, checkpoint, model=SmallNet)
    assert found.same in ("file", "outputs")
    found.check()
    # The same weights out of another checkpoint give the same outputs, and still are not what was recorded.
    other = save_digits_checkpoint(tmp_path / "run", digits_model)
    found = reproduce_artifact(artifact, other, model=SmallNet)
    assert found.same == "outputs"
    with pytest.raises(GateError, match="checkpoint digits"):
        found.check()
