from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dlops.artifact import Variant
from dlops.checkpoint import Checkpoint, PruningRecord
from dlops.directory import DirectoryWriter
from dlops.errors import GateError, UsageError
from dlops.export.pipeline import export_variants
from dlops.export.plan import plan_variants
from dlops.samples import Samples, row_fingerprints
from dlops.signature import TensorSpec

from .conftest import PREPROCESS, SaveDigits, split


def plan(checkpoint: Checkpoint, *variants: Variant | str, max_drop: float = 1.0, strict: bool = False) -> list[str]:
    return [variant.slug for variant in plan_variants(variants, checkpoint, max_drop=max_drop, strict=strict)]


def test_variants_come_in_order_and_once(checkpoint: Checkpoint) -> None:
    asked = ["onnx-int8", Variant(format="torchscript"), "onnx", "onnx-fp32", "onnx-int8-pruned50"]
    assert plan(checkpoint, *asked) == ["onnx-int8", "torchscript-fp32", "onnx-fp32", "onnx-int8-pruned50"]


@pytest.mark.parametrize(
    ("slug", "said"),
    [
        (
            "torchscript-int8",
            "torchscript in int8 is not available in this version: quantized models are written as onnx",
        ),
        ("torchscript-fp16", "torchscript in fp16 is not available in this version: torch's half precision on the CPU"),
        ("onnx-bf16", "onnx in bf16 is not available in this version: ONNX Runtime's CPU provider has no bfloat16"),
        ("torchscript-fp8", r"GPUs of .* 8\.9 and later alone .*onnx-fp8 are for those"),
        ("onnx-fp32-pruned99", "pruned05 to pruned95"),
        ("onnx-fp32-thin50", "unknown sparsity"),
        ("onxn-fp32", "unknown format"),
        ("onnx-fp31", "unknown precision"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(checkpoint: Checkpoint, slug: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(checkpoint, slug)


def test_all_that_is_wrong_is_said_at_once_with_what_is_available(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"onnx-bf16.*torchscript-fp16") as refused:
        plan(checkpoint, "onnx-bf16", "onnx-fp32", "torchscript-fp16")
    assert "onnx-int8" in (refused.value.hint or "")
    with pytest.raises(UsageError, match=r"'int9'.*'foo'.*'thin5'.*torchscript-int8: .*not available") as refused:
        plan(checkpoint, "onnx-int9", "foo", "onnx-fp32-thin5", "torchscript-int8")
    assert "did you mean onnx-int8" in (refused.value.hint or "")


@pytest.mark.parametrize("max_drop", [-1.0, float("nan"), 101.0])
def test_a_drop_that_means_nothing_is_refused(checkpoint: Checkpoint, max_drop: float) -> None:
    with pytest.raises(UsageError, match="percentage points"):
        plan(checkpoint, "onnx-fp32", max_drop=max_drop)


def test_a_calibration_method_without_ranges_to_calibrate_is_refused(checkpoint: Checkpoint) -> None:
    variants = plan_variants(
        ["onnx-int8-pruned50", "onnx-int8wo"], checkpoint, max_drop=1, strict=False, calibration_method="entropy"
    )
    assert [variant.slug for variant in variants] == ["onnx-int8-pruned50", "onnx-int8wo"]
    for method, slug, said in (
        ("entropy", "onnx-int8dyn", "none of the variants is static int8"),
        ("entropie", "onnx-int8", r"unknown calibration method .entropie.*did you mean entropy"),
    ):
        with pytest.raises(UsageError, match=said):
            plan_variants([slug], checkpoint, max_drop=1, strict=False, calibration_method=method)


def test_no_variant_at_all_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="no variant"):
        plan(checkpoint)


@pytest.mark.parametrize("slug", ["onnx-int8", "onnx-fp32-pruned50"])
def test_what_calibrates_needs_calibration_samples(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path, slug: str
) -> None:
    bare = save_digits_checkpoint(tmp_path, small_net(), calibration=None)
    free = ["onnx-fp16", "onnx-int8dyn", "onnx-int8wo", "torchscript-bf16"]
    assert plan(bare, *free) == free
    with pytest.raises(UsageError, match="needs calibration samples"):
        plan(bare, slug)


def test_a_calibration_sample_that_is_an_evaluation_sample_is_refused(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    _, _, evaluation = split()
    leaking = save_digits_checkpoint(tmp_path / "run", small_net(), calibration=evaluation.take([3, 5]))
    assert plan(leaking, "onnx-fp32") == ["onnx-fp32"]
    with pytest.raises(UsageError, match="2 of 2 calibration samples are evaluation samples"):
        export_variants(leaking, variants=["onnx-int8"], out=tmp_path / "out", model=small_net)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept_tensors", [False, True])
def test_a_calibration_sample_in_another_form_is_still_found(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path, kept_tensors: bool
) -> None:
    _, _, evaluation = split()
    tensors = PREPROCESS.batch(evaluation.raw)
    if kept_tensors:
        # No preprocessing: the raw entries are only names, the tensors are what the model sees.
        samples = [
            Samples(raw=tuple(f"{name}{i}".encode() for i in range(40)), inputs={"input": rows}, targets=targets)
            for name, rows, targets in (
                ("e", tensors[:40], evaluation.targets[:40]), ("c", tensors[20:60], evaluation.targets[20:60])
            )
        ]  # fmt: skip
        preprocess = None
    else:
        # The same digits as pixels and as PNG files.
        encoded = Samples(raw=tuple(_png(pixels) for pixels in evaluation.raw[:20]), targets=evaluation.targets[:20])
        samples, preprocess = [evaluation, encoded], PREPROCESS
    leaking = save_digits_checkpoint(
        tmp_path / "run", small_net(), evaluation=samples[0], calibration=samples[1], preprocess=preprocess
    )
    assert not set(samples[0].fingerprints()) & set(samples[1].fingerprints())
    with pytest.raises(UsageError, match=r"20 of \d+ calibration samples are evaluation samples"):
        export_variants(leaking, variants=["onnx-int8"], out=tmp_path / "out", model=small_net)
    assert not (tmp_path / "out").exists()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_are_compared_as_the_model_takes_them() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 2))
    rows = np.array([[0.0, 0.1], [1.0, 2.0]], np.float32)
    expected = row_fingerprints({"x": rows}, [spec])
    assert len(set(expected)) == 2
    assert row_fingerprints({"x": rows.astype(">f4")}, [spec]) == expected
    assert row_fingerprints({"x": np.array([[-0.0, 0.1], [1.0, 2.0]])}, [spec]) == expected
    assert row_fingerprints({"x": np.asfortranarray(rows)}, [spec]) == expected
    second = TensorSpec(name="y", dtype="int64", shape=("batch",))
    assert not set(row_fingerprints({"x": rows, "y": np.arange(2)}, [spec, second])) & set(expected)


def test_too_few_samples_to_recover_a_pruned_model_on_are_refused(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    _, calibration, _ = split()
    for count, enough in ((15, False), (16, True)):
        checkpoint = save_digits_checkpoint(
            tmp_path / str(count), small_net(), calibration=calibration.take(range(count))
        )
        assert plan(checkpoint, "onnx-int8") == ["onnx-int8"]
        if enough:
            assert plan(checkpoint, "onnx-fp32-pruned50") == ["onnx-fp32-pruned50"]
        else:
            with pytest.raises(UsageError, match=r"15 calibration samples; .* takes 16 at least"):
                plan(checkpoint, "onnx-fp32-pruned50")


def _with_samples(checkpoint: Checkpoint, split_name: str, samples: Samples) -> Checkpoint:
    """As an earlier version or another program might have written it: unchecked."""
    with DirectoryWriter(checkpoint.directory) as writer:
        files = {role: writer.add_file(f"{role}.safetensors", checkpoint.path(role)) for role in checkpoint.files} | {
            split_name: writer.add(f"{split_name}.safetensors", samples.to_bytes())
        }
        return writer.commit(checkpoint.model_copy(update={"files": files}))


@pytest.mark.parametrize("slug", ["onnx-int8", "onnx-fp32-pruned50"])
@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (np.zeros((20, 1, 8, 8), np.float64), np.zeros(20, np.int64), "dtype float64, expected float32"),
        (np.zeros((20, 64), np.float32), np.zeros(20, np.int64), "shape"),
        (np.zeros((20, 1, 8, 8), np.float32), np.full(20, 10), "outside 0 to 9"),
        (np.full((20, 1, 8, 8), np.nan, np.float32), np.zeros(20, np.int64), "NaN"),
    ],
)
def test_calibration_samples_that_do_not_fit_the_model_are_refused(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path, slug: str, inputs: np.ndarray,
    targets: np.ndarray, said: str,
) -> None:  # fmt: skip
    samples = Samples(raw=tuple(inputs), inputs={"input": inputs}, targets=targets)
    checkpoint = _with_samples(save_digits_checkpoint(tmp_path / "run", small_net()), "calibration", samples)
    with pytest.raises(UsageError, match=f"the calibration samples do not fit the model: .*{said}"):
        export_variants(checkpoint, variants=[slug], out=tmp_path / "out", model=small_net)
    assert not (tmp_path / "out").exists()


def test_evaluation_targets_that_the_task_cannot_score_are_refused(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    _, _, evaluation = split()
    assert evaluation.targets is not None
    shifted = Samples(raw=evaluation.raw, targets=evaluation.targets + 1)
    checkpoint = _with_samples(save_digits_checkpoint(tmp_path / "run", small_net()), "evaluation", shifted)
    with pytest.raises(UsageError, match=r"the evaluation samples do not fit the model: .* outside 0 to 9"):
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path / "out", model=small_net)


def test_a_pruned_checkpoint_is_not_pruned_again(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    record = PruningRecord(steps=(("features.0", True, (0,)),), macs_removed=0.1)
    pruned = save_digits_checkpoint(tmp_path, small_net(), pruning=record)
    with pytest.raises(UsageError, match="pruned already"):
        plan(pruned, "onnx-fp32-pruned50")


class _StuckInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(64, 10), nn.Dropout(0.5)

    def train(self, mode: bool = True) -> _StuckInTraining:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(x.flatten(1)))


class _Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.dropout(x.flatten(1), training=True))


class _Diverged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        nn.init.constant_(self.linear.weight, float("nan"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


class _Strange(nn.Module):
    """A Bessel function: an operator that ONNX has no form of, and tracing has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.special.i1(x.flatten(1)))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (_StuckInTraining, "training mode"),
        (_Random, "differs between two runs"),
        (_Diverged, "NaN or infinity in linear"),
    ],
)
def test_a_module_that_is_not_fit_to_be_exported_is_refused(
    save_digits_checkpoint: SaveDigits, tmp_path: Path, module: type[nn.Module], said: str
) -> None:
    checkpoint = save_digits_checkpoint(tmp_path / "run", module())
    with pytest.raises(UsageError, match=said):
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path / "out", model=module)
    assert not (tmp_path / "out").exists()


def test_an_operator_that_onnx_lacks_is_named(save_digits_checkpoint: SaveDigits, tmp_path: Path) -> None:
    checkpoint = save_digits_checkpoint(tmp_path / "run", _Strange())
    with pytest.raises(UsageError, match="bessel_i1") as refused:
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path / "out", model=_Strange)
    assert "torchscript" in (refused.value.hint or "")


def test_a_branch_on_values_is_refused_by_both_formats(save_digits_checkpoint: SaveDigits, tmp_path: Path) -> None:
    checkpoint = save_digits_checkpoint(tmp_path / "run", _Branching())
    for form, said in (("torchscript", "bake in"), ("onnx", "torch.export cannot take")):
        with pytest.raises((UsageError, GateError), match=said):
            export_variants(checkpoint, variants=[form], out=tmp_path / "out", model=_Branching)
    assert not (tmp_path / "out").exists()


def test_a_branch_that_the_samples_take_both_ways_is_named_with_its_line(
    save_digits_checkpoint: SaveDigits, tmp_path: Path
) -> None:
    unlimited = save_digits_checkpoint(tmp_path / "all", _Branching())
    samples = unlimited.samples("evaluation")
    assert samples is not None
    # Half of the digits pass it alone; a batch of several is far below.
    sums = samples.feed(unlimited.spec.preprocess, "input")["input"].sum(axis=(1, 2, 3))
    limit = float(np.median(sums))
    checkpoint = save_digits_checkpoint(tmp_path / "run", _Branching(limit=limit))
    line = r"torch\.export stops too \(.*test_plan\.py, line \d+: if flat\.sum\(\) > self\.limit:"
    build = partial(_Branching, limit=limit)
    with pytest.raises(UsageError, match=f"depends on the rest of its batch: .*{line}"):
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path / "out", model=build)
    assert not (tmp_path / "out").exists()


class _Branching(nn.Module):
    """No batch of digits passes the limit unless it is said lower."""

    def __init__(self, limit: float = 1e6) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        if flat.sum() > self.limit:
            flat = -flat
        return self.linear(flat)


def test_a_persons_own_module_is_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not its code"):
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path)


def test_outputs_that_do_not_depend_on_the_input_pass_no_gate(
    save_digits_checkpoint: SaveDigits, small_net: type[nn.Module], tmp_path: Path
) -> None:
    constant = small_net()
    nn.init.zeros_(constant.get_submodule("classify").weight)
    checkpoint = save_digits_checkpoint(tmp_path / "run", constant)
    with pytest.raises(GateError, match="same output for every sample"):
        export_variants(checkpoint, variants=["onnx-fp32"], out=tmp_path / "out", model=small_net)
    assert not (tmp_path / "out").exists()
