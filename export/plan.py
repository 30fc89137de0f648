"""What can be exported: every request that cannot work is refused before any work, with the reason."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from dlops import catalog
from dlops.artifact import Variant, check_sparsity
from dlops.checkpoint import Checkpoint
from dlops.errors import InputError, UsageError, unknown_name
from dlops.export import zeros
from dlops.export.formats import BUDGET_S, CALIBRATIONS, PRUNING_TOLERANCE
from dlops.samples import Samples
from dlops.signature import Feed
from dlops.tasks import open_task

AVAILABLE: Mapping[str, tuple[str, ...]] = {
    "torchscript": ("fp32", "bf16"),
    "onnx": ("fp32", "fp16", "int8", "int8dyn", "int8wo", "fp8"),
    "torchexport": ("fp32", "bf16"),
    "aotinductor": ("fp32", "bf16"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
    "executorch": ("fp32", "int8"),
    "tensorrt": ("fp32", "fp16", "int8", "fp8"),
}
_FP8 = "GPUs of compute capability 8.9 and later alone multiply it (L4, H100); tensorrt-fp8 and onnx-fp8 are for those"
_QUANTIZED = "quantized models are written as onnx, openvino and executorch"
# Those whose files can take raw inputs.
RAW_FORMATS = ("onnx",)
# Why some of the others are not.
_WHY_NOT: Mapping[str, str] = {
    "onnx-bf16": "ONNX Runtime's CPU provider has no bfloat16 convolutions and matrix products, torch has",
    "executorch-bf16": "XNNPACK computes in fp32 and int8 here",
    "executorch-fp16": "XNNPACK computes in fp32 and int8 here",
    "executorch-fp8": _FP8,
    "executorch-int8dyn": "XNNPACK has it for linear layers alone; executorch-int8 has convolutions too",
    "executorch-int8wo": "XNNPACK has no form of it; executorch-int8 is as small",
    "openvino-fp8": _FP8,
    "openvino-int8dyn": "its operators are ONNX Runtime's own, onnx-int8dyn has them",
    "openvino-int8wo": "on a CPU it would run what openvino-fp32 runs; onnx-int8wo is as small",
    "tensorrt-bf16": "tensorrt-fp16 is as small and as fast",
    "tensorrt-int8dyn": "TensorRT takes fixed ranges; tensorrt-int8 has them",
    "tensorrt-int8wo": "it would compute as tensorrt-fp16 does; onnx-int8wo is as small",
    "torchscript-fp16": "torch's half precision on the CPU is slower than fp32, and torchscript-bf16 is as small",
    "torchscript-fp8": _FP8,
    "torchscript-int8": _QUANTIZED,
    "torchscript-int8dyn": _QUANTIZED,
    "torchscript-int8wo": _QUANTIZED,
    **{
        f"{form}-{precision}": why
        for form in ("torchexport", "aotinductor")
        for precision, why in (
            ("fp16", f"torch's half precision on the CPU is slower than fp32, and {form}-bf16 is as small"),
            ("fp8", _FP8),
            ("int8", _QUANTIZED),
            ("int8dyn", _QUANTIZED),
            ("int8wo", _QUANTIZED),
        )
    },
}
_UNSIGNED = frozenset({"uint16", "uint32", "uint64"})
# What inputs and outputs may not be: what a runtime's Python has no arrays of, or the runtime itself has not.
_NO_DTYPES: Mapping[str, frozenset[str]] = {
    "onnx": frozenset({"bfloat16"}),
    "openvino": frozenset({"bfloat16"}),
    "executorch": frozenset({"bfloat16", *_UNSIGNED}),
    "tensorrt": frozenset({"bfloat16", "float64", "int16", *_UNSIGNED}),
}
# Those whose int8 is made of the calibrated ONNX graph, and can have its ranges by other methods.
FROM_ONNX = ("onnx", "openvino", "tensorrt")
# Quantized by what calibration samples give.
STATIC = ("int8", "fp8")
# Quantized without them.
UNCALIBRATED = ("int8dyn", "int8wo")
# With fewer, what recovery holds out says nothing of when to stop.
MIN_RECOVERY_SAMPLES = 16
# Beyond these a network is left whole, or with a channel or two a layer.
MIN_PRUNED, MAX_PRUNED = 0.05, 0.95


def check_max_drop(points: float) -> None:
    """Raise UsageError for what is no accuracy that can be lost."""
    if not (math.isfinite(points) and 0 <= points <= 100):
        raise UsageError(f"max_drop is {points}: percentage points from 0 to 100 are wanted")


def plan_variants(
    requested: Sequence[Variant | str], checkpoint: Checkpoint, *, max_drop: float, strict: bool,
    calibration_method: str = "minmax", recovery_budget_s: float = BUDGET_S,
) -> list[Variant]:  # fmt: skip
    """The variants in order, each once. Raises UsageError naming every one that cannot be made, and why."""
    if not requested:
        raise UsageError("no variant was asked for", hint=f"for example onnx-fp32; available: {available()}")
    check_max_drop(max_drop)
    if not (math.isfinite(recovery_budget_s) and recovery_budget_s > 0):
        raise UsageError(f"the recovery budget is {recovery_budget_s}: seconds above 0 are wanted")
    variants, problems = _parsed(requested)
    problems += [f"{variant.slug}: {reason}" for variant in variants for reason in _reasons(variant, checkpoint)]
    if problems:
        near = dict.fromkeys(close for item in requested for close in _nearest(item, variants))
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError("; ".join(problems), hint=f"{meant}available: {available()}")
    _check_method(calibration_method, variants)
    if any(map(needs_calibration, variants)):
        _check_calibration(checkpoint, recovering=any(variant.sparsity for variant in variants))
    if strict and _evaluation(checkpoint).targets is None:
        raise UsageError("strict needs targets, and the checkpoint's evaluation samples have none")
    return variants


def _parsed(requested: Sequence[Variant | str]) -> tuple[list[Variant], list[str]]:
    """The variants that have a meaning, each once, and what is wrong with the rest."""
    variants: dict[str, Variant] = {}
    problems = []
    for item in requested:
        try:
            variant = Variant.parse(item) if isinstance(item, str) else item
            if variant.format not in catalog.FORMATS:
                raise unknown_name("format", variant.format, catalog.FORMATS)
            check_sparsity(variant.sparsity, where=f"variant {variant.slug!r}")
        except UsageError as error:
            problems.append(error.message)
        else:
            variants[variant.slug] = variant
    return list(variants.values()), problems


def _nearest(item: Variant | str, understood: Sequence[Variant]) -> list[str]:
    """The available variant that a misspelt one is nearest to; none for one that was understood."""
    if not isinstance(item, str) or item in (variant.slug for variant in understood):
        return []
    known = [f"{form}-{precision}" for form, precisions in AVAILABLE.items() for precision in precisions]
    return difflib.get_close_matches(item, known, n=1, cutoff=0.5)


def available() -> str:
    """What this version exports, in one line."""
    parts = [f"{form}-{precision}" for form, precisions in AVAILABLE.items() for precision in precisions]
    raw = f"{' and '.join(RAW_FORMATS)} with -raw behind it all"
    return f"{', '.join(parts)}, each also with -prunedNN, -sparseNN or -sparse24, {raw}"


def needs_calibration(variant: Variant) -> bool:
    return variant.precision in STATIC or variant.sparsity is not None


def is_layered(variant: Variant) -> bool:
    """Whether layers of it can be ranked, and returned to fp32."""
    return variant.precision in (*STATIC, *UNCALIBRATED)


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str], *, title: str) -> None:
    """Raise UsageError where a fingerprint is in both: accuracy after such a calibration would be flattered."""
    held_out = set(evaluation)
    shared = [place for place, digest in enumerate(calibration) if digest in held_out]
    if shared:
        raise UsageError(
            f"{title}: {len(shared)} of {len(calibration)} calibration samples are evaluation samples too "
            f"(the first is number {shared[0]}), so the accuracy measured after calibration would mean nothing",
            hint="take calibration samples from the training split, and save the checkpoint again",
        )


def check_fitting(samples: Samples, feed: Feed, checkpoint: Checkpoint, *, split: str) -> None:
    """Raise UsageError unless every input fits the checkpoint's signature and every target its task."""
    signature = checkpoint.signature
    try:
        for start in range(0, len(samples), signature.max_batch):
            signature.check({name: array[start : start + signature.max_batch] for name, array in feed.items()})
        if samples.targets is not None:
            open_task(checkpoint.spec.task).check_targets(samples.targets, signature.outputs[0])
    except InputError as error:
        raise UsageError(
            f"{checkpoint.name}: the {split} samples do not fit the model: {error.message}",
            hint=error.hint or "save the checkpoint again with samples as the model takes them",
        ) from None


def _check_method(method: str, variants: Sequence[Variant]) -> None:
    if method not in CALIBRATIONS:
        raise unknown_name("calibration method", method, CALIBRATIONS)
    if method != "minmax" and all(variant.precision != "int8" for variant in variants):
        raise UsageError(
            f"calibration {method} was asked for, and none of the variants is static int8, which alone has calibrated "
            "ranges",
            hint="add onnx-int8 or openvino-int8, or leave the method out",
        )
    others = [v.slug for v in variants if v.precision == "fp8" or (v.precision in STATIC and v.format not in FROM_ONNX)]
    if method != "minmax" and others:
        raise UsageError(
            f"calibration {method} was asked for, and {', '.join(others)} has ranges by minmax alone",
            hint="export it on its own, without the method",
        )


def _check_calibration(checkpoint: Checkpoint, *, recovering: bool) -> None:
    calibration = checkpoint.samples("calibration")
    assert calibration is not None
    if recovering and len(calibration) < MIN_RECOVERY_SAMPLES:
        raise UsageError(
            f"{checkpoint.name}: {len(calibration)} calibration samples; a pruned or sparse model is recovered on "
            f"them, which takes {MIN_RECOVERY_SAMPLES} at least",
            hint="save the checkpoint again with more samples of the training split, some hundreds for a good recovery",
        )
    check_disjoint(calibration.fingerprints(), _evaluation(checkpoint).fingerprints(), title=checkpoint.name)


def _reasons(variant: Variant, checkpoint: Checkpoint) -> list[str]:
    reasons = []
    offered = AVAILABLE.get(variant.format, ())
    if variant.precision not in offered:
        why = _WHY_NOT.get(f"{variant.format}-{variant.precision}")
        reasons.append(
            f"{variant.format} in {variant.precision} is not available in this version{f': {why}' if why else ''}"
        )
    if variant.raw and variant.format not in RAW_FORMATS:
        reasons.append(f"preprocessing goes into {' and '.join(RAW_FORMATS)} files alone in this version")
    for spec in (*checkpoint.signature.inputs, *checkpoint.signature.outputs):
        if spec.dtype in _NO_DTYPES.get(variant.format, ()):
            others = ", ".join(one for one in AVAILABLE if spec.dtype not in _NO_DTYPES.get(one, ()))
            reasons.append(f"its {spec.name} is {spec.dtype}, which its runtime does not take; {others} do")
            break
    if checkpoint.dense is not None:
        reasons += _own_variant_reasons(variant, checkpoint)
    elif variant.pruned_fraction:
        reasons += _pruning_reasons(variant, checkpoint)
    elif variant.sparsity and variant.format not in zeros.FORMATS:
        reasons.append(f"the zeros in its file cannot be checked; those of {' and '.join(zeros.FORMATS)} can")
    if needs_calibration(variant) and "calibration" not in checkpoint.files:
        use = "its ranges" if variant.precision in STATIC else "its recovery"
        reasons.append(
            f"needs calibration samples for {use}, and checkpoint {checkpoint.name!r} has none "
            "(train it again with this version, or pass calibration= to save_checkpoint)"
        )
    return reasons


def _pruning_reasons(variant: Variant, checkpoint: Checkpoint) -> list[str]:
    reasons = []
    if not MIN_PRUNED <= variant.pruned_fraction <= MAX_PRUNED:
        reasons.append(f"pruned{MIN_PRUNED * 100:02.0f} to pruned{MAX_PRUNED * 100:02.0f} can be asked for")
    if checkpoint.spec.pruning is not None:
        reasons.append("the checkpoint is pruned already, and the fraction counts from the dense model")
    return reasons


def _own_variant_reasons(variant: Variant, checkpoint: Checkpoint) -> list[str]:
    """Of a checkpoint that is the pruned form of a dense one: it is that one variant of it."""
    assert checkpoint.dense is not None
    assert checkpoint.spec.pruning is not None
    removed = checkpoint.spec.pruning.macs_removed
    if abs(variant.pruned_fraction - removed) <= PRUNING_TOLERANCE:
        return []
    return [
        f"the checkpoint is {checkpoint.dense.name} with {removed:.1%} of the MACs removed already: its variant is "
        f"{variant.format}-{variant.precision}-pruned{round(100 * removed):02d}"
    ]


def _evaluation(checkpoint: Checkpoint) -> Samples:
    samples = checkpoint.samples("evaluation")
    if samples is None or not len(samples):
        raise UsageError(
            f"checkpoint {checkpoint.name!r} has no evaluation samples, so no export of it could be checked",
            hint="train it again with this version, or pass evaluation= to save_checkpoint",
        )
    return samples
