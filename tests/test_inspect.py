"""What inspect and list say of folders that are whole, damaged, foreign or empty."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType

from dlops.artifact import Accuracy, Artifact, open_artifact
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.errors import CorruptError, UsageError
from dlops.facts import size_text
from dlops.inspect import describe, list_all
from dlops.report import Interval, Latency, Load, Measurement, Report, Verdict
from dlops.saving import save_checkpoint

Working = Path


def shown(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=250)
    console.print(renderable)
    return console.file.getvalue()


def write_report(directory: Path, *, partial: bool = False) -> Report:
    point = Interval(value=2_500_000.0, low=2_400_000.0, high=2_600_000.0)
    measurement = Measurement(
        target="digits/onnx-fp32", artifact="onnx-fp32", runtime="onnxruntime", provider="CPUExecutionProvider",
        device="cpu", precision="fp32", threads=2, boundary="host", load=Load(batch=4), samples="0",
        latency=Latency(
            samples=5, effective_samples=5, p50_ns=point,
            p90_ns=None, p99_ns=None, mean_ns=2.5e6, min_ns=2.4e6, max_ns=2.6e6
        ),
        throughput=Interval(value=1600.0, low=None, high=None), warmup_calls=3,
        verdict=Verdict(steady=False, reasons=("too few samples",)),
    )  # fmt: skip
    with DirectoryWriter(directory) as writer:
        return writer.commit(
            Report(
                title="a bench", created=datetime(2026, 1, 3, tzinfo=UTC), command=("dlops", "bench"), partial=partial,
                environment=describe_environment(), measurements=(measurement,),
                files={"samples": writer.add("samples.safetensors", b"raw")},
            )
        )  # fmt: skip


@pytest.fixture
def working(tmp_path: Path, make_digits_artifact: Callable[..., Artifact]) -> Working:
    """A working folder with one of each kind."""
    from torch import nn

    inputs = np.zeros((4, 2), np.float32)
    save_checkpoint(
        nn.Linear(2, 2),
        tmp_path / "runs" / "mlp" / "one",
        evaluation=(inputs, [0, 1, 0, 1]),
        metrics={"accuracy": 0.75},
    )
    make_digits_artifact(tmp_path / "artifacts" / "digits" / "onnx-fp32", created=datetime(2026, 1, 2, tzinfo=UTC))
    write_report(tmp_path / "reports" / "first")
    return tmp_path


def test_an_artifact_is_described_whole(working: Working) -> None:
    directory = working / "artifacts" / "digits" / "onnx-fp32"
    description = describe(directory)
    assert (description.kind, description.title, description.is_whole) == ("artifact", "digits/onnx-fp32", True)
    text = shown(description.render())
    for said in (
        "artifact digits/onnx-fp32", "float32[batch, 1, 8, 8]", "1 to 64", "2. resize", "CPUExecutionProvider",
        "bound 0.001", "not measured", "matches", "model-", "samples-", "Provenance", "0, 1, 2",
    ):  # fmt: skip
        assert said in text, said
    document = json.loads(description.to_json())
    assert document["manifest"] == json.loads((directory / "artifact.json").read_text())
    assert {file["role"]: file["problem"] for file in document["files"]} == {"model": None, "samples": None}
    assert describe(directory / "artifact.json") == description


def test_accuracy_is_shown_with_its_interval(working: Working) -> None:
    directory = working / "artifacts" / "digits" / "onnx-fp32"
    accuracy = Accuracy(
        metric="accuracy", samples=100, value=0.91, reference=0.92, drop_points=1.0, drop_low=-0.5, drop_high=2.5,
        flips=3, max_drop=1.0, strict=False,
    )  # fmt: skip
    changed = open_artifact(directory).model_copy(update={"accuracy": accuracy})
    (directory / "artifact.json").write_text(changed.to_json())
    said = "accuracy 91.00% against 92.00% on 100 samples, +1.00 points lost (95 % interval -0.50 to +2.50)"
    assert said in shown(describe(directory).render())


def test_a_checkpoint_and_a_report_are_described(working: Working) -> None:
    text = shown(describe(working / "runs" / "mlp" / "one").render())
    for said in ("checkpoint one", "a person's own module", "accuracy=0.75", "not recorded", "weights", "evaluation"):
        assert said in text, said
    text = shown(describe(working / "reports" / "first").render())
    for said in ("report a bench", "dlops bench", "batch 4", "median 2.500 ms", "1600.0 items/s", "too few samples"):
        assert said in text, said


def test_a_damaged_file_is_named_with_the_reason_and_the_rest_is_still_described(working: Working) -> None:
    directory = working / "artifacts" / "digits" / "onnx-fp32"
    (model,) = directory.glob("model-*")
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    description = describe(directory)
    assert not description.is_whole
    assert [file.role for file in description.files if file.problem] == ["model"]
    assert "SHA-256 differs" in shown(description.render())
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        description.check()
    answer = subprocess.run(
        [sys.executable, "-m", "dlops", "inspect", str(directory)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert "artifact digits" in answer.stdout
    assert "SHA-256 differs" in answer.stderr
    model.unlink()
    assert "the model file is missing" in shown(describe(directory).render())


def test_what_is_no_folder_of_ours_is_refused(working: Working) -> None:
    for path, said in ((working, "no checkpoint, artifact or report there"), (working / "absent", "no such file")):
        with pytest.raises(UsageError, match=said) as caught:
            describe(path)
        assert "dlops list" in str(caught.value.hint)
    broken = working / "reports" / "first" / "report.json"
    broken.write_text("{")
    with pytest.raises(CorruptError, match="truncated or not JSON"):
        describe(broken)


def test_two_kinds_in_one_folder_ask_which(working: Working) -> None:
    directory = working / "runs" / "mlp" / "one"
    shutil.copy(working / "reports" / "first" / "report.json", directory)
    with pytest.raises(UsageError, match="a checkpoint and a report in one folder"):
        describe(directory)
    assert describe(directory / "checkpoint.json").kind == "checkpoint"


def test_all_that_there_is_is_listed_newest_first(working: Working) -> None:
    listing = list_all(working)
    assert [(entry.kind, entry.path, entry.problem) for entry in listing.entries] == [
        ("checkpoint", "runs/mlp/one", None),
        ("report", "reports/first", None),
        ("artifact", "artifacts/digits/onnx-fp32", None),
    ]
    text = shown(listing.render())
    for said in ("accuracy 0.75", "1 measurements, 0 steady", "parity on CPUExecutionProvider", "runs/mlp/one"):
        assert said in text, said
    assert json.loads(listing.to_json())["entries"][0]["title"] == "one"


def test_damaged_ones_are_listed_with_the_reason(working: Working) -> None:
    (working / "runs" / "mlp" / "one" / "checkpoint.json").write_text("{")
    (model,) = (working / "artifacts").rglob("model-*")
    model.write_bytes(b"short")
    (raw,) = (working / "reports").rglob("samples-*")
    raw.unlink()
    problems = {entry.kind: entry.problem for entry in list_all(working).entries}
    assert "truncated or not JSON" in str(problems["checkpoint"])
    assert "5 bytes where the manifest says" in str(problems["artifact"])
    assert "the samples file is missing" in str(problems["report"])
    assert list_all(working).entries[-1].kind == "checkpoint"
    assert "truncated or not JSON" in shown(list_all(working).render())


def test_a_report_that_was_cut_short_says_so(tmp_path: Path) -> None:
    write_report(tmp_path / "reports" / "x", partial=True)
    assert list_all(tmp_path).entries[0].summary.endswith("cut short")


def test_an_empty_working_folder_says_what_to_do(tmp_path: Path) -> None:
    assert list_all(tmp_path).entries == ()
    assert "dlops quickstart" in shown(list_all(tmp_path).render())
    with pytest.raises(UsageError, match="not a directory"):
        list_all(tmp_path / "absent")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_500_000, "1.4 MiB"), (2**50, "1024.0 TiB")]
)
def test_sizes_are_in_the_unit_that_a_person_would_use(count: int, text: str) -> None:
    assert size_text(count) == text
