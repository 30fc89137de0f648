from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.directory import DirectoryWriter
from dlops.errors import CorruptError, GateError, UsageError
from dlops.export.pipeline import export_each, export_variants
from dlops.export.verify import verify_artifact
from dlops.runtimes import SessionOptions

from .conftest import SaveDigits

CPU = SessionOptions(device="cpu", threads=1)
ROLES = {"model": "onnx", "samples": "safetensors"}


@pytest.mark.parametrize(
    "slug",
    ["torchscript-fp32", "torchscript-bf16", "onnx-int8", "onnx-int8dyn", "onnx-int8wo", "onnx-fp32-pruned50"],
)
def test_parity_and_accuracy_are_found_again(
    exported: dict[str, Artifact], checkpoint: Checkpoint, small_net: type[nn.Module], slug: str
) -> None:
    found = verify_artifact(exported[slug].directory, options=CPU, checkpoint=checkpoint, model=small_net)
    assert found.parity.samples == 32
    assert found.accuracy == exported[slug].accuracy


def test_without_a_checkpoint_only_parity_is_checked(exported: dict[str, Artifact]) -> None:
    found = verify_artifact(exported["onnx-fp16"], options=CPU)
    assert found.accuracy is None
    assert found.parity.batches == (1, 32)


def test_verifying_onnx_needs_no_torch(exported: dict[str, Artifact]) -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'torchvision'): sys.modules[name] = None\n"
        "import dlops; from dlops.runtimes import SessionOptions\n"
        "print(dlops.verify_artifact(sys.argv[1], options=SessionOptions(device='cpu', threads=1)).parity.samples)"
    )
    command = [sys.executable, "-c", script, str(exported["onnx-int8"].directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "32"


@pytest.mark.parametrize("role", ["model", "samples"])
def test_an_altered_file_is_found_even_after_opening(exported: dict[str, Artifact], tmp_path: Path, role: str) -> None:
    shutil.copytree(exported["onnx-fp32"].directory, tmp_path / "copy")
    copy = exported["onnx-fp32"].located_at(tmp_path / "copy")
    content = bytearray(copy.path(role).read_bytes())
    content[len(content) // 2] ^= 1
    copy.path(role).write_bytes(bytes(content))
    with pytest.raises(CorruptError, match="SHA-256"):
        verify_artifact(copy, options=CPU)


def test_another_model_under_a_fitting_digest_is_found(exported: dict[str, Artifact], tmp_path: Path) -> None:
    with DirectoryWriter(tmp_path) as writer:
        files = {
            "model": writer.add_file("model.onnx", exported["onnx-fp32-pruned50"].path("model")),
            "samples": writer.add_file("samples.safetensors", exported["onnx-fp32"].path("samples")),
        }
        swapped = writer.commit(exported["onnx-fp32"].model_copy(update={"files": files}))
    with pytest.raises(GateError, match="differ from the reference"):
        verify_artifact(swapped, options=CPU)


def test_a_drop_above_the_recorded_bound_fails(
    exported: dict[str, Artifact], checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path
) -> None:
    original = exported["onnx-fp32"]
    assert original.accuracy is not None
    tight = original.accuracy.model_copy(update={"max_drop": 0.01, "strict": True})
    with DirectoryWriter(tmp_path) as writer:
        files = {
            "model": writer.add_file("model.onnx", original.path("model")),
            "samples": writer.add_file("samples.safetensors", original.path("samples")),
        }
        changed = writer.commit(original.model_copy(update={"files": files, "accuracy": tight}))
    with pytest.raises(GateError, match="upper end"):
        verify_artifact(changed, options=CPU, checkpoint=checkpoint, model=small_net)


def test_a_recorded_reference_that_the_checkpoint_does_not_reach_fails(
    exported: dict[str, Artifact], checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path
) -> None:
    original = exported["onnx-fp32"]
    assert original.accuracy is not None
    worse = original.accuracy.model_copy(update={"reference": original.accuracy.reference - 0.02})
    with DirectoryWriter(tmp_path) as writer:
        files = {role: writer.add_file(f"{role}.{suffix}", original.path(role)) for role, suffix in ROLES.items()}
        doctored = writer.commit(original.model_copy(update={"files": files, "accuracy": worse}))
    with pytest.raises(GateError, match=r"dense checkpoint's accuracy is .* the artifact records"):
        verify_artifact(doctored, options=CPU, checkpoint=checkpoint, model=small_net)


def test_a_checkpoint_whose_folder_holds_another_by_now_is_refused(
    exported: dict[str, Artifact], save_digits_checkpoint: SaveDigits, digits_model: nn.Module,
    small_net: type[nn.Module], tmp_path: Path,
) -> None:  # fmt: skip
    loaded = save_digits_checkpoint(tmp_path / "run", digits_model)
    save_digits_checkpoint(tmp_path / "run", small_net())
    for attempt in (
        lambda: verify_artifact(exported["onnx-fp32"], options=CPU, checkpoint=loaded, model=small_net),
        lambda: export_variants(loaded, variants=["torchscript-fp32"], out=tmp_path / "out", model=small_net),
    ):
        with pytest.raises(UsageError, match="it holds another checkpoint"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_an_artifact_names_the_checkpoint_that_its_weights_came_from(
    save_digits_checkpoint: SaveDigits, digits_model: nn.Module, small_net: type[nn.Module], tmp_path: Path
) -> None:
    loaded = save_digits_checkpoint(tmp_path / "run", digits_model)
    making = export_each(loaded, variants=["torchscript-fp32", "onnx-fp32"], out=tmp_path / "out", model=small_net)
    next(making)
    # The folder is written anew between two variants: the second is still of the weights that were loaded.
    save_digits_checkpoint(tmp_path / "run", small_net())
    _, second = next(making)
    assert isinstance(second, Artifact)
    assert second.provenance.checkpoint_sha256 == loaded.sha256
    assert second.accuracy is not None
    assert second.accuracy.reference > 0.95


def test_another_checkpoint_is_refused(
    exported: dict[str, Artifact], save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    other = save_digits_checkpoint(tmp_path, small_net())
    with pytest.raises(UsageError, match="was not made from the checkpoint"):
        verify_artifact(exported["onnx-fp32"], options=CPU, checkpoint=other, model=small_net)
