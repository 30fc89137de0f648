from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from dlops import catalog
from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, MachineError, UsageError
from dlops.export import making, reduce
from dlops.export.formats import check_no_machine_paths, portable_argument
from dlops.export.pipeline import export_variants, rank_variant
from dlops.export.recover import Recovery
from dlops.export.to_onnx import export as to_onnx
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.samples import Samples
from dlops.saving import save_checkpoint

from .conftest import DENSE, PRUNED, split

CPU = SessionOptions(device="cpu", threads=1)
SLUGS = [*DENSE, *PRUNED]


@pytest.mark.parametrize("slug", SLUGS)
def test_every_variant_is_an_artifact_that_tests_itself(exported: dict[str, Artifact], slug: str) -> None:
    artifact = open_artifact(exported[slug].directory)
    assert artifact.directory.parts[-2:] == ("digits", slug)
    assert artifact.parity.batches == (1, 2, 7, 32)
    assert artifact.accuracy is not None
    assert artifact.accuracy.samples == 360
    assert artifact.accuracy.reference > 0.95
    assert artifact.accuracy.drop_low <= artifact.accuracy.drop_points <= artifact.accuracy.drop_high
    assert artifact.labels == tuple("0123456789")
    assert len(artifact.samples()) == 32
    session = open_session(artifact, CPU)
    assert self_test(artifact, session).samples == 32
    session.close()


def test_the_files_are_as_small_as_their_precision_says(exported: dict[str, Artifact]) -> None:
    size = {slug: artifact.model_bytes for slug, artifact in exported.items()}
    assert size["onnx-fp16"] < 0.6 * size["onnx-fp32"]
    assert size["onnx-int8"] < 0.4 * size["onnx-fp32"]
    assert size["onnx-int8dyn"] < 0.4 * size["onnx-fp32"]
    assert size["onnx-int8wo"] < 0.4 * size["onnx-fp32"]
    assert size["torchscript-bf16"] < 0.65 * size["torchscript-fp32"]
    assert size["onnx-fp32-pruned50"] < 0.65 * size["onnx-fp32"]
    assert size["onnx-int8-pruned50"] < size["onnx-int8"]


def test_pruned_variants_share_one_pruned_module(exported: dict[str, Artifact]) -> None:
    pruned = [artifact for slug, artifact in exported.items() if slug.endswith("pruned50")]
    assert len({artifact.files["pruning"].sha256 for artifact in pruned}) == 1
    removed = pruned[0].provenance.notes["macs_removed"]
    assert isinstance(removed, float)
    assert abs(removed - 0.5) <= 0.02
    references = [artifact.samples().outputs["logits"] for artifact in pruned]
    assert all(np.array_equal(references[0], other) for other in references)


def _readable(path: Path) -> Iterator[bytes]:
    """The file, and where it is an archive each member's name and unpacked content."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                yield entry.filename.encode() + b"\0" + archive.read(entry)


@pytest.mark.parametrize("slug", SLUGS)
def test_no_file_of_an_artifact_names_a_folder_of_this_machine(
    exported: dict[str, Artifact], checkpoint: Checkpoint, slug: str
) -> None:
    folders = {
        Path(__file__).parent, Path(torch.__file__).parent, Path(onnx.__file__).parent, Path(np.__file__).parent,
        Path(os.__file__).parent, checkpoint.directory.parent, exported[slug].directory.parents[1], Path.home(),
    }  # fmt: skip
    texts = {str(folder).encode() for folder in folders} | {b"site-packages", b"conftest.py", b"dlops-export-"}
    files = list(exported[slug].directory.iterdir())
    assert len(files) >= 3
    for path in files:
        for content in _readable(path):
            assert [text for text in texts if text in content] == [], path.name
    assert "/opt/" not in (exported[slug].directory / "artifact.json").read_text()
    assert exported[slug].provenance.command == ("dlops", "export", "--out=artifacts")


def test_torch_writes_such_folders_unless_they_are_removed(digits_model: nn.Module, tmp_path: Path) -> None:
    """What the test above searches for is there without our exporter, so its silence means something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(digits_model, torch.zeros(3, 1, 8, 8)).save(tmp_path / "bare.pt")
    assert any(str(Path(__file__).parent).encode() in content for content in _readable(tmp_path / "bare.pt"))


def test_paths_in_the_metadata_of_a_persons_own_images_are_no_defect(
    save_digits_checkpoint: Callable[..., Checkpoint], digits_model: nn.Module, small_net: type[nn.Module],
    tmp_path: Path,
) -> None:  # fmt: skip
    _, calibration, evaluation = split()
    thumbnail = f"file://{Path.home()}/pictures/digit.png"
    raw = []
    for pixels in evaluation.raw[:40]:
        buffer, info = io.BytesIO(), PngInfo()
        info.add_text("Thumb::URI", thumbnail)
        Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
        raw.append(buffer.getvalue())
    assert evaluation.targets is not None
    own = Samples(raw=tuple(raw), targets=evaluation.targets[:40])
    checkpoint = save_digits_checkpoint(tmp_path / "run", digits_model, evaluation=own, calibration=calibration)
    (made,) = export_variants(checkpoint, variants=["torchscript-fp32"], out=tmp_path / "out", model=small_net)
    assert thumbnail.encode() in made.path("samples").read_bytes()


def test_without_targets_the_missing_accuracy_gate_is_warned_about_and_noted(
    save_digits_checkpoint: Callable[..., Checkpoint], digits_model: nn.Module, small_net: type[nn.Module],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, _, evaluation = split()
    checkpoint = save_digits_checkpoint(tmp_path / "run", digits_model, evaluation=Samples(raw=evaluation.raw))
    (made,) = export_variants(
        checkpoint, variants=["torchscript-fp32"], out=tmp_path / "out", model=small_net, max_drop=0.5
    )
    assert "WARNING: the evaluation samples of digits have no targets" in capsys.readouterr().err
    assert made.accuracy is None
    assert "no targets" in str(made.provenance.notes["accuracy"])


def test_a_checkpoint_no_better_than_guessing_is_warned_about_and_noted(
    exported: dict[str, Artifact], save_digits_checkpoint: Callable[..., Checkpoint], digits_model: nn.Module,
    small_net: type[nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, _, evaluation = split()
    assert evaluation.targets is not None
    wrong = Samples(raw=evaluation.raw, targets=(evaluation.targets + 1) % 10)
    checkpoint = save_digits_checkpoint(tmp_path / "run", digits_model, evaluation=wrong)
    (made,) = export_variants(checkpoint, variants=["torchscript-fp32"], out=tmp_path / "out", model=small_net)
    assert "no better than guessing" in capsys.readouterr().err
    assert "no better than guessing" in str(made.provenance.notes["dense_accuracy"])
    assert "dense_accuracy" not in exported["torchscript-fp32"].provenance.notes


def test_a_machine_path_in_a_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"..." + sys.prefix.encode() + b"/lib")
    with pytest.raises(GateError, match="of this machine"):
        check_no_machine_paths(path, title="it")


def test_arguments_lose_the_folders_of_this_machine() -> None:
    assert portable_argument(str(Path.cwd() / "runs" / "a")) == "runs/a"
    assert portable_argument("--out=/srv/x/y") == "--out=y"
    assert portable_argument("--precision=int8") == "--precision=int8"


@pytest.mark.usefixtures("captured_anew")
def test_onnx_and_openvino_export_again_to_the_same_bytes(
    exported: dict[str, Artifact], checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path
) -> None:
    slugs = [slug for slug in DENSE if not slug.startswith("torchscript")]
    # OpenVINO numbers what it adds through a process: what came before must not show.
    slugs.reverse()
    # Later, into another folder, by another command and with another max_drop.
    again = export_variants(checkpoint, variants=slugs, out=tmp_path, model=small_net)
    for artifact in again:
        before = exported[artifact.slug]
        assert artifact.created > before.created
        for role in {"model", "weights"} & set(artifact.files):
            assert artifact.path(role).read_bytes() == before.path(role).read_bytes(), (artifact.slug, role)


def test_a_module_object_is_left_as_it_was(checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path) -> None:
    own = small_net().train()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    export_variants(checkpoint, variants=["torchscript-fp32"], out=tmp_path, model=own)
    assert own.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def _doubled(request: object) -> object:
    """An exporter that alters the model."""
    with torch.no_grad():
        request.module.classify.weight.mul_(1.01)  # type: ignore[attr-defined]
    return to_onnx(request)  # type: ignore[arg-type]


def test_an_export_that_computes_something_else_leaves_the_old_artifact(
    exported: dict[str, Artifact], checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    old = tmp_path / "digits" / "onnx-fp32"
    shutil.copytree(exported["onnx-fp32"].directory, old)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    monkeypatch.setattr("dlops.export.to_onnx.export", _doubled)
    with pytest.raises(
        GateError, match=r"differ from the reference.* \(the artifact made before stays in .*onnx-fp32\)"
    ):
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path, model=small_net)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_good_variants_are_kept_and_every_failure_is_reported(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlops.export.to_onnx.export", _doubled)
    with pytest.raises(GateError, match=r"2 of 3 variants .*onnx-fp32: .*onnx-fp16: .*exported: torchscript-fp32") as e:
        export_variants(
            checkpoint, variants=["onnx-fp32", "torchscript-fp32", "onnx-fp16"], out=tmp_path, model=small_net
        )
    assert e.value.exit_status == 1
    assert "made before" not in e.value.message
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["torchscript-fp32"]
    assert open_artifact(tmp_path / "digits" / "torchscript-fp32").slug == "torchscript-fp32"


def test_what_is_not_installed_costs_no_other_variant_and_no_work(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = catalog.resolve

    def resolve(table: object, kind: str, name: str) -> object:
        if name == "openvino":
            raise MachineError(f"{kind} openvino needs openvino, which is not installed", hint="pip install it")
        return real(table, kind, name)  # type: ignore[arg-type]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was pruned")

    monkeypatch.setattr(catalog, "resolve", resolve)
    monkeypatch.setattr("dlops.export.structures.reduced", never)
    asked = ["openvino-fp32", "onnx-fp32", "openvino-fp32-pruned50"]
    with pytest.raises(GateError, match=r"2 of 3 variants .*openvino needs openvino.*exported: onnx-fp32") as caught:
        export_variants(checkpoint, variants=asked, out=tmp_path, model=small_net)
    assert caught.value.hint == "pip install it"
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["onnx-fp32"]
    for lacking in (asked[:1], [asked[0], asked[2]]):
        with pytest.raises(MachineError, match="openvino needs openvino"):
            export_variants(checkpoint, variants=lacking, out=tmp_path, model=small_net)


def test_a_variant_that_loses_too_much_accuracy_is_refused(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pruned and never recovered: parity with its own structure holds, the accuracy is gone.
    monkeypatch.setattr(reduce, "recover", lambda *_, **__: Recovery(
        samples=0, epochs=0, loss_before=0.0, loss_after=0.0, ended="epochs"
    ))  # fmt: skip
    with pytest.raises(GateError, match=r"points lost .* above the 1 allowed"):
        export_variants(checkpoint, variants=["onnx-fp32-pruned50"], out=tmp_path, model=small_net)
    assert not (tmp_path / "digits").exists()


def test_strict_asks_the_interval_and_not_the_estimate(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path
) -> None:
    arguments = {"variants": ["torchscript-fp32"], "out": tmp_path, "model": small_net, "max_drop": 0.1}
    assert export_variants(checkpoint, **arguments)[0].accuracy.drop_points == 0
    with pytest.raises(GateError, match="upper end of its interval"):
        export_variants(checkpoint, **arguments, strict=True)


_KILLED = """
import os, signal, sys
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1]); fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
import dlops.directory
out = Path(sys.argv[3])
write_json = dlops.directory.write_json
def killed(path, text):
    if out in path.parents:
        assert any(p.suffix == ".pt" for p in path.parent.iterdir())
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, text)
dlops.directory.write_json = killed
from dlops.export.pipeline import export_variants, rank_variant
for name in ("old", "fresh"):
    if os.fork() == 0:
        out = out / name
        export_variants(sys.argv[2], variants=["torchscript-fp32"], out=out, model=fixtures.SmallNet)
    else:
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
"""


def test_a_kill_leaves_the_old_artifact_or_none(
    exported: dict[str, Artifact], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    old = tmp_path / "old" / "digits" / "torchscript-fp32"
    shutil.copytree(exported["torchscript-fp32"].directory, old)
    fixtures = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-W", "ignore", "-c", _KILLED, str(fixtures), str(checkpoint.directory), str(tmp_path)]
    # Its temporary folders stay behind, in a place that pytest removes.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert open_artifact(old).created == exported["torchscript-fp32"].created
    fresh = tmp_path / "fresh" / "digits" / "torchscript-fp32"
    assert list(fresh.glob("model-*.pt"))
    with pytest.raises(UsageError, match=r"no artifact\.json"):
        open_artifact(fresh)


def test_a_torchvision_builder_needs_no_model(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    inputs = np.random.default_rng(0).standard_normal((12, 3, 32, 32)).astype(np.float32)
    checkpoint = save_checkpoint(
        squeezenet1_1(num_classes=10), tmp_path / "run", evaluation=(inputs, np.arange(12) % 10), name="squeezenet",
        builder="torchvision:squeezenet1_1", kwargs={"num_classes": 10}, max_batch=4,
    )  # fmt: skip
    made = export_variants(checkpoint, variants=["torchscript-fp32", "onnx-fp32", "onnx-fp16"], out=tmp_path / "out")
    assert [artifact.parity.batches for artifact in made] == [(1, 2, 3, 4)] * 3
    assert all(artifact.model_bytes > 1.4e6 for artifact in made)


@pytest.mark.parametrize("form", ["torchscript", "onnx"])
def test_a_batch_that_is_baked_in_is_refused(
    save_digits_checkpoint: Callable[..., Checkpoint], tmp_path: Path, form: str
) -> None:
    checkpoint = save_digits_checkpoint(tmp_path / "run", _FixedBatch())
    with pytest.raises((GateError, UsageError), match=f"{form}-fp32"):
        export_variants(checkpoint, variants=[f"{form}-fp32"], out=tmp_path / "out", model=_FixedBatch)
    assert not (tmp_path / "out").exists()


class _FixedBatch(nn.Module):
    """Turns the batch size into a plain number, which capturing then takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(int(x.shape[0]), 64))


def test_the_catalog_and_the_table_of_variants_name_the_same_formats() -> None:
    from dlops.export.plan import AVAILABLE

    assert set(AVAILABLE) == set(catalog.FORMATS) == set(making.SUFFIXES)


@pytest.mark.parametrize("slug", ["onnx-fp32", "onnx-fp16", "torchscript-bf16", "openvino-fp32"])
def test_layers_that_cannot_be_ranked_are_refused_with_the_reason(
    checkpoint: Checkpoint, small_net: type[nn.Module], slug: str
) -> None:
    with pytest.raises(UsageError, match=f"{slug}: none of its layers is quantized, so there is none to rank"):
        rank_variant(checkpoint, variant=slug, model=small_net)
