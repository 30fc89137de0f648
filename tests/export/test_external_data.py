"""Models of more than one protobuf message holds, with the limit lowered to what a small one passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.deploy.docker import write_docker_context
from dlops.errors import CorruptError, GateError
from dlops.export import to_onnx
from dlops.export.external_data import weight_bytes
from dlops.export.pipeline import export_variants
from dlops.export.reproduce import reproduce_artifact
from dlops.export.verify import verify_artifact
from dlops.inspect import describe
from dlops.manifest import sha256_of
from dlops.runtimes import SessionOptions

CPU = SessionOptions(device="cpu", threads=1)
LIMIT = 20_000


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "MAX_INLINE_BYTES", LIMIT)


@pytest.fixture(scope="module")
def in_two(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from .conftest import SmallNet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "MAX_INLINE_BYTES", LIMIT)
        (made,) = export_variants(
            checkpoint, variants=["onnx-fp32"], out=tmp_path_factory.mktemp("two"), model=SmallNet, max_drop=2.0
        )
    return made


def test_both_files_are_hashed_sized_and_listed(in_two: Artifact, exported_dense: dict[str, Artifact]) -> None:
    one = exported_dense["onnx-fp32"]
    assert in_two.path("model").stat().st_size < LIMIT < in_two.path("weights").stat().st_size
    assert in_two.model_bytes == in_two.files["model"].bytes + in_two.files["weights"].bytes
    assert in_two.model_bytes == pytest.approx(one.model_bytes, rel=0.05)
    assert in_two.files["weights"].sha256 == sha256_of(in_two.path("weights"))
    assert (in_two.parity.max_abs, in_two.accuracy) == (one.parity.max_abs, one.accuracy)
    found = describe(in_two.directory)
    assert found.is_whole
    assert {file.role for file in found.files} == {"model", "weights", "samples", "reproduce"}
    # Whole again, it is the model that one file holds.
    joined, inline = (onnx.load(artifact.path("model")) for artifact in (in_two, one))
    assert weight_bytes(joined) == weight_bytes(inline) > LIMIT
    assert [tensor.raw_data for tensor in joined.graph.initializer] == [
        tensor.raw_data for tensor in inline.graph.initializer
    ]


def test_it_runs_wherever_both_are_copied_and_nowhere_without_the_weights(in_two: Artifact, tmp_path: Path) -> None:
    context = write_docker_context(in_two, out=tmp_path / "context")
    copied = open_artifact(context / "artifact")
    assert verify_artifact(copied, options=CPU).parity.samples == 32
    content = bytearray(copied.path("weights").read_bytes())
    content[len(content) // 2] ^= 1
    copied.path("weights").write_bytes(content)
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        open_artifact(copied.directory)
    copied.path("weights").unlink()
    with pytest.raises(CorruptError, match="the weights file is missing"):
        open_artifact(copied.directory)


@pytest.mark.usefixtures("captured_anew")
def test_it_is_kept_unchanged_and_made_again_byte_for_byte(
    in_two: Artifact, checkpoint: Checkpoint, small_net: type[nn.Module], limit: None
) -> None:
    out = in_two.directory.parents[1]
    (kept,) = export_variants(checkpoint, variants=["onnx-fp32"], out=out, model=small_net, max_drop=2.0)
    assert kept.created == in_two.created
    assert reproduce_artifact(in_two, checkpoint, model=small_net).same == "file"


def test_written_in_one_again_the_weights_beside_it_are_collected(
    in_two: Artifact, checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path
) -> None:
    shutil.copytree(in_two.directory, tmp_path / "digits" / "onnx-fp32")
    (made,) = export_variants(
        checkpoint, variants=["onnx-fp32"], out=tmp_path, model=small_net, max_drop=2.0, force=True
    )
    assert "weights" not in made.files
    assert not list(made.directory.glob("weights-*"))


def test_what_converts_one_message_is_refused_with_the_reason(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, limit: None
) -> None:
    with pytest.raises(GateError, match="2 of 2 variants") as caught:
        export_variants(checkpoint, variants=["onnx-fp16", "onnx-int8"], out=tmp_path, model=small_net)
    assert "converts an ONNX model to int8 takes it as one protobuf message" in caught.value.message
    assert caught.value.hint is not None
    assert "two files" in caught.value.hint
