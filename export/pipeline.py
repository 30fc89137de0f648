"""From a checkpoint to gated artifacts: what people call, and what it says of all variants together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dlops import catalog
from dlops.artifact import Artifact, Variant
from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.console import say
from dlops.errors import DlopsError, GateError, MachineError, UsageError
from dlops.export.formats import BUDGET_S, Calibration
from dlops.export.latency import Fitted, fit_latency
from dlops.export.layers import Ranking
from dlops.export.making import Asked, Export
from dlops.export.origin import checkpoint_digest
from dlops.export.plan import is_layered, plan_variants
from dlops.export.raw_inputs import Size
from dlops.runtimes.session import Device

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource


def export_variants(
    checkpoint: Checkpoint | Path | str,
    *,
    variants: Sequence[Variant | str],
    out: Path | str = "artifacts",
    model: ModuleSource | None = None,
    max_drop: float = 1.0,
    strict: bool = False,
    calibration_method: Calibration = "minmax",
    repair: bool = True,
    worth: bool = False,
    image_size: Size | None = None,
    device: Device = "cpu",
    force: bool = False,
    recovery_budget_s: float = BUDGET_S,
    command: Sequence[str] = (),
) -> list[Artifact]:
    """Write `out/<name>/<slug>/` for each variant that passes its gates, and return those artifacts in order.

    variants: slugs or Variants. model: the module or a function that makes it, where the checkpoint names no builder.
    max_drop: percentage points of the task's metric that may be lost against the dense checkpoint; with `strict` the
    upper end of the 95 % interval must keep it too. calibration_method: how static int8 chooses the range of each
    activation (`activation_ranges` says what each does). repair: where int8 loses too much, return the layers at fault
    to fp32, as few as pass, and refuse only when none of them help. worth: time each variant that passed, for about a
    second, against what it was made of, and record whether it is faster or smaller; it decides nothing. image_size:
    (height, width) of all images that a variant of raw inputs is to take, for one that resizes or crops itself (left
    out, that stays outside of the file). device: where pruned models are recovered and the gates run. force: make a
    variant anew where it lies there already, unchanged, which is otherwise kept as it is.
    recovery_budget_s: how long a pruned or sparse model may take to recover, once for all of its variants.

    A variant that fails leaves an older artifact of it untouched, and the others are still made. Then GateError lists
    each that failed and why. Raises UsageError, before any work, for what cannot be made, and MachineError where the
    packages of all of them are missing.
    """
    results = list(
        export_each(
            checkpoint, variants=variants, out=out, model=model, max_drop=max_drop, strict=strict,
            calibration_method=calibration_method, repair=repair, worth=worth, image_size=image_size,
            device=device, force=force, recovery_budget_s=recovery_budget_s, command=command,
        )
    )  # fmt: skip
    made = [result for _, result in results if isinstance(result, Artifact)]
    failed = {variant.slug: result for variant, result in results if isinstance(result, DlopsError)}
    if failed:
        _raise_failures(failed, made, planned=len(results))
    return made


def export_each(
    checkpoint: Checkpoint | Path | str,
    *,
    variants: Sequence[Variant | str],
    out: Path | str = "artifacts",
    model: ModuleSource | None = None,
    max_drop: float = 1.0,
    strict: bool = False,
    calibration_method: Calibration = "minmax",
    repair: bool = True,
    worth: bool = False,
    image_size: Size | None = None,
    device: Device = "cpu",
    force: bool = False,
    recovery_budget_s: float = BUDGET_S,
    command: Sequence[str] = (),
) -> Iterator[tuple[Variant, Artifact | DlopsError]]:
    """`export_variants` one variant at a time: each with its artifact, or with the error that refused it."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    checkpoint_digest(checkpoint)
    planned = plan_variants(
        variants, checkpoint, max_drop=max_drop, strict=strict, calibration_method=calibration_method,
        recovery_budget_s=recovery_budget_s,
    )  # fmt: skip
    if image_size is not None and not any(variant.raw for variant in planned):
        raise UsageError(
            "an image size was given, and no variant takes raw images", hint="--embed-preprocess, or onnx-fp32-raw, say"
        )
    asked = Asked(
        max_drop=max_drop, strict=strict, calibration_method=calibration_method, repair=repair, worth=worth,
        image_size=image_size, device=device, force=force, recovery_budget_s=recovery_budget_s, command=tuple(command),
    )  # fmt: skip
    lacking = {variant: error for variant in planned if (error := _lacking(variant)) is not None}
    if len(lacking) == len(planned):
        raise next(iter(lacking.values()))
    export = Export(checkpoint, planned, out=Path(out), model=model, asked=asked)
    for variant in planned:
        if variant in lacking:
            # Before its pruning and recovery, which take minutes.
            say(f"{variant.slug}: not exported: {lacking[variant].message}")
            yield variant, lacking[variant]
            continue
        try:
            result: Artifact | DlopsError = export.make(variant)
        except (GateError, UsageError) as error:
            if (place := export.place(variant) / Artifact.file_name).is_file():
                error.message += f" (the artifact made before stays in {place.parent})"
            say(f"{variant.slug}: not exported: {error.message}")
            result = error
        yield variant, result


def _lacking(variant: Variant) -> MachineError | None:
    """What is not installed here that exports or runs it."""
    try:
        catalog.resolve(catalog.FORMATS, "format", variant.format)
        catalog.resolve(catalog.RUNTIMES, "runtime", variant.format)
    except MachineError as error:
        return error
    return None


def rank_variant(
    checkpoint: Checkpoint | Path | str,
    *,
    variant: Variant | str,
    model: ModuleSource | None = None,
    calibration_method: Calibration = "minmax",
    device: Device = "cpu",
) -> Ranking:
    """The layers of a quantized variant by the error that each of them adds. Nothing is exported.

    model, calibration_method, device: as for `export_variants`. Raises UsageError for a variant without quantized
    layers.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    (planned,) = plan_variants(
        [variant], checkpoint, max_drop=100.0, strict=False, calibration_method=calibration_method
    )
    if not is_layered(planned):
        raise UsageError(
            f"{planned.slug}: none of its layers is quantized, so there is none to rank",
            hint="those in int8, int8dyn, int8wo and fp8 can be explained, each also with -prunedNN",
        )
    if "calibration" not in checkpoint.files:
        raise UsageError(
            f"{planned.slug}: layers are ranked on calibration samples, and checkpoint {checkpoint.name!r} has none",
            hint="train it again with this version, or pass calibration= to save_checkpoint",
        )
    # The layers are those of the model inside, whatever is around it.
    planned = planned.model_copy(update={"raw": False})
    asked = Asked(calibration_method=calibration_method, device=device)
    export = Export(checkpoint, [planned], out=Path(), model=model, asked=asked)
    return export.rank(planned)


def prune_to_latency(
    checkpoint: Checkpoint | Path | str,
    *,
    variant: Variant | str,
    target_s: float,
    model: ModuleSource | None = None,
    calibration_method: Calibration = "minmax",
    device: Device = "cpu",
) -> Fitted:
    """Which pruning makes a dense `variant` answer one sample in at most `target_s` seconds (p50). Nothing is exported.

    Every candidate is cut, exported and timed in its runtime on this machine; recovery changes no shapes, so it waits
    for the export of the variant that is found. Raises GateError where no pruning is enough, UsageError for a variant
    that is not dense.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    if not 0 < target_s < float("inf"):
        raise UsageError(f"a latency of {target_s:g} s cannot be kept", hint="seconds above 0: 0.005, say")
    (planned,) = plan_variants(
        [variant], checkpoint, max_drop=100.0, strict=False, calibration_method=calibration_method
    )
    if planned.raw:
        raise UsageError(
            f"{planned.slug}: its preprocessing would be timed along", hint="search without -raw, then export with it"
        )
    if planned.sparsity:
        raise UsageError(f"{planned.slug} is pruned already", hint="name the dense variant: its pruning is searched")
    plan_variants([f"{planned.slug}-pruned50"], checkpoint, max_drop=100.0, strict=False)
    asked = Asked(calibration_method=calibration_method, device=device)
    export = Export(checkpoint, [planned], out=Path(), model=model, asked=asked)
    return fit_latency(planned, target_s=target_s, time_of=export.time)


def _raise_failures(failed: Mapping[str, DlopsError], made: list[Artifact], *, planned: int) -> None:
    if planned == 1:
        raise next(iter(failed.values()))
    reasons = "; ".join(f"{slug}: {error.message}" for slug, error in failed.items())
    kept = f"; exported: {', '.join(artifact.slug for artifact in made)}" if made else ""
    hints = dict.fromkeys(error.hint for error in failed.values() if error.hint)
    raise GateError(
        f"{len(failed)} of {planned} variants were not exported: {reasons}{kept}", hint="; ".join(hints) or None
    )
