"""Numerical agreement with the reference: how it is measured, and what is demanded of each precision.

Numpy only, so that an artifact is checked against the samples that it carries on a machine without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlops.artifact import Artifact, OwnError, Parity, Tolerance
from dlops.errors import CorruptError, GateError, LossError
from dlops.runtimes.session import Placement, Session
from dlops.signature import Array, Feed, Signature, is_floating
from dlops.tasks import SAME_BOX_IOU, Task, open_task

# What half precision may lose, 10 bits of mantissa: 5e-4 a rounding. 3e-4 to 4e-4 of the largest output was measured
# in a small network and in ResNet-18; ten times that leaves room for deep ones, and a weight off by 1 % still shows.
_HALF = Tolerance(max_abs=2e-2, max_rel=5e-3)
TOLERANCES: Mapping[str, Tolerance] = {
    # Sums in another order: 1e-6 to 2e-5 of the largest output in the networks tried. An epsilon, a padding or an
    # interpolation mode gone wrong shows from 1e-3 up.
    "fp32": Tolerance(max_abs=2e-4, max_rel=1e-4),
    "fp16": _HALF,
    # 7 bits of mantissa, 4e-3 a rounding: eight times what half precision may lose. 4e-3 to 9e-3 of the largest output
    # was measured in a small network, a transformer and an MLP of 10 million weights.
    "bf16": Tolerance(max_abs=1.6e-1, max_rel=4e-2),
    # Healthy 8-bit networks come out at 20 to 40 dB, broken ones (a layer saturated, a scale off) below 10.
    "int8": Tolerance(min_sqnr_db=15.0, min_agreement=0.95),
    # Beside a loud neighbour the steps are coarser, so no more is asked: 23 dB (a ResNet-18 of random weights) to 40 dB
    # were measured over batches of 1 to 32.
    "int8dyn": Tolerance(min_sqnr_db=15.0, min_agreement=0.95),
    # Rounded weights alone: 25 dB (the same ResNet-18) to 44 dB.
    "int8wo": Tolerance(min_sqnr_db=20.0, min_agreement=0.95),
    # Three bits of mantissa: 23 dB (ResNet-20 and ResNet-18, trained) to 28 dB (a small network).
    "fp8": Tolerance(min_sqnr_db=15.0, min_agreement=0.95),
}
# Two right ways to sum err independently of each other, so they differ by about as much as each errs: by 1.1 to 1.4
# times the module's own error in DeepLabV3 with random weights. The rest is for kernels that err more (Winograd's,
# those of another processor).
_OWN_MULTIPLE = 4.0
# Where fp32 itself errs by what half precision may lose, a right export and a wrong one look alike.
_OWN_CEILING = _HALF
_OWN_BOUNDS = ("max_abs", "max_rel")
# Where decisions count beside the numbers. Boxes are matched first; that two of almost equal score or overlap change
# places in a suppression costs a few of them in any arithmetic.
_OF_DETECTION: Mapping[str, Tolerance] = {
    "fp32": Tolerance(max_abs=2e-3, max_rel=1e-3, min_agreement=0.98, min_iou=0.9),
    "fp16": Tolerance(max_abs=1e-1, max_rel=5e-2, min_agreement=0.9, min_iou=0.75),
    "bf16": Tolerance(max_abs=4e-1, max_rel=2e-1, min_agreement=0.8, min_iou=0.5),
    "int8": Tolerance(min_sqnr_db=15.0, min_agreement=0.7, min_iou=0.5),
    "int8dyn": Tolerance(min_sqnr_db=15.0, min_agreement=0.7, min_iou=0.5),
    "int8wo": Tolerance(min_sqnr_db=15.0, min_agreement=0.7, min_iou=0.5),
    "fp8": Tolerance(min_sqnr_db=15.0, min_agreement=0.7, min_iou=0.5),
}
# Outputs that differ by less than this, relative to their size, over all samples do not depend on the input.
_CONSTANT = 1e-6
# Equal up to the rounding of float32: preprocessing is a few multiplications on whole numbers.
_TENSOR_RTOL, _TENSOR_ATOL = 1e-6, 1e-6
# How sure a small sample must be before it calls an agreement too low.
_CONFIDENCE = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """How far outputs are from their reference, the worst over all tensors.

    max_abs: over the reference's standard deviation where that is above 1. max_rel: over the largest reference value.
    sqnr_db: null where there is no error at all. agreement: fraction of the decisions that stay, a sample's share
    counting as one. decisions: how many were compared, one or more a sample.
    """

    samples: int
    max_abs: float
    max_rel: float
    sqnr_db: float | None
    agreement: float
    decisions: int


def tolerance_for(task: str, precision: str, *, own: OwnError | None = None) -> Tolerance:
    """What is demanded of a precision in a task. Raises KeyError for a precision that has no bounds.

    own: fp32 may be off by four times the module's own error where that is more than the table's bound, and up to
    half precision's bound; an error above that excuses nothing.
    """
    tolerance = (_OF_DETECTION if task == "detection" else TOLERANCES)[precision]
    if own is None or not has_own_error(task, precision) or is_ill_conditioned(own):
        return tolerance
    bounds = {
        name: max(getattr(tolerance, name), min(_OWN_MULTIPLE * getattr(own, name), getattr(_OWN_CEILING, name)))
        for name in _OWN_BOUNDS
    }
    return tolerance.model_copy(update=bounds)


def has_own_error(task: str, precision: str) -> bool:
    """Whether the module's own error counts: bounds of fewer bits have room for it, and detections change places."""
    return precision == "fp32" and task != "detection"


def is_ill_conditioned(own: OwnError) -> bool:
    """Whether fp32 is further off than half precision may be, or by NaN."""
    return not all(getattr(own, name) <= getattr(_OWN_CEILING, name) for name in _OWN_BOUNDS)


def own_error_text(own: OwnError) -> str:
    """A clause for a person: the own error, and what follows where it is above the ceiling."""
    off = f"off its own float64 answer by {own.max_abs:.3g} absolute, {own.max_rel:.3g} relative"
    if not is_ill_conditioned(own):
        return f"eager fp32 is itself {off}"
    return (
        f"the network itself is ill-conditioned: eager fp32 is {off}, "
        f"and beyond {_OWN_CEILING.max_abs:g} and {_OWN_CEILING.max_rel:g} that excuses nothing"
    )


def compare(
    reference: Feed,
    outputs: Feed,
    *,
    task: Task,
    where: str = "outputs",
    min_iou: float | None = None,
    edge: bool = False,
) -> Errors:
    """The errors of `outputs` against `reference`, tensor by tensor, as the task pairs them.

    min_iou: from which on two boxes are the same, where there are boxes; null for the task's own. Raises GateError
    where the comparison would mean nothing or cannot be made: no samples, other names, dtypes or shapes, NaN or
    infinity on either side, a reference that does not depend on the input, or nothing detected. edge: the last two may
    be, since the inputs are all alike.
    """
    _check_comparable(reference, outputs, where)
    try:
        paired = task.pair(reference, outputs, min_iou=SAME_BOX_IOU if min_iou is None else min_iou)
    except GateError as error:
        if edge:
            return Errors(
                samples=len(next(iter(reference.values()))),
                max_abs=0.0,
                max_rel=0.0,
                sqnr_db=None,
                agreement=1.0,
                decisions=0,
            )
        raise GateError(f"{where}: {error.message}", hint=error.hint) from None
    if not edge:
        _check_varying(reference, where)
    pairs = [
        (np.asarray(paired.reference[n], np.float64), np.asarray(paired.outputs[n], np.float64))
        for n in paired.reference
        if paired.reference[n].size
    ]
    sqnrs = [value for expected, got in pairs if (value := _sqnr_db(expected, got)) is not None]
    # Where no box found its own, there is nothing to subtract, and everything is wrong.
    return Errors(
        max_abs=max(
            (_largest(got - expected) / max(1.0, float(expected.std())) for expected, got in pairs), default=math.inf
        ),
        max_rel=max((_relative(expected, got) for expected, got in pairs), default=math.inf),
        sqnr_db=min(sqnrs, default=None) if pairs else -math.inf,
        samples=len(paired.agreement),
        agreement=float(paired.agreement.mean()),
        decisions=paired.decisions,
    )


def shortfalls(errors: Errors, tolerance: Tolerance, *, sampled: bool = False) -> list[str]:
    """What `errors` break of `tolerance`, one clause each; empty where they keep it.

    sampled: the samples are a few out of those that parity was shown on, so an agreement counts as too low only where
    chance does not explain it (a one-sided binomial test at 99.9 %).
    """
    broken = []
    if tolerance.max_abs is not None and not errors.max_abs <= tolerance.max_abs:
        broken.append(f"largest absolute error {errors.max_abs:.3g}, allowed {tolerance.max_abs:.3g}")
    if tolerance.max_rel is not None and not errors.max_rel <= tolerance.max_rel:
        broken.append(f"largest relative error {errors.max_rel:.3g}, allowed {tolerance.max_rel:.3g}")
    exact = errors.sqnr_db is None
    if tolerance.min_sqnr_db is not None and not exact and not errors.sqnr_db >= tolerance.min_sqnr_db:  # type: ignore[operator]
        broken.append(f"SQNR {errors.sqnr_db:.1f} dB, at least {tolerance.min_sqnr_db:g} wanted")
    if tolerance.min_agreement is not None:
        floor = tolerance.min_agreement
        # Samples are drawn, and not the pixels or boxes in them, which resemble one another.
        allowed = _plausible_flips(errors.samples, 1 - floor) / errors.samples if sampled else 1 - floor
        if 1 - errors.agreement > allowed + 1e-9:
            flips = round((1 - errors.agreement) * errors.decisions)
            broken.append(f"{flips} of {errors.decisions} decisions differ, at least {floor:.0%} must stay")
    return broken


def check_parity(
    session: Session, feed: Feed, reference: Feed, *, task: Task, tolerance: Tolerance, batches: Sequence[int],
    title: str, sampled: bool = False,
) -> Parity:  # fmt: skip
    """Run `feed` through the session once for each size in `batches` and compare with `reference`.

    Returns the worst errors over the batches. Raises LossError naming the batch and the bounds that are broken.
    """
    found: list[Errors] = []
    problems: dict[int, list[str]] = {}
    for size in batches:
        outputs = run_batched(session, feed, size)
        errors = compare(
            reference, outputs, task=task, where=f"{title} at batch {size}", min_iou=tolerance.min_iou
        )  # fmt: skip
        found.append(errors)
        if clauses := shortfalls(errors, tolerance, sampled=sampled):
            problems[size] = clauses
    if not found:
        raise GateError(f"{title}: parity over no batch at all proves nothing")
    if problems:
        sizes = ", ".join(str(size) for size in problems)
        raise LossError(
            f"{title}: outputs differ from the reference on {session.placement.provider} at batch {sizes}: "
            f"{'; '.join(next(iter(problems.values())))}",
            hint="the model file does not compute what the checkpoint computes on this machine: do not use it",
        )
    sqnrs = [errors.sqnr_db for errors in found if errors.sqnr_db is not None]
    return Parity(
        provider=session.placement.provider,
        batches=tuple(batches),
        samples=max(errors.samples for errors in found),
        max_abs=max(errors.max_abs for errors in found),
        max_rel=max(errors.max_rel for errors in found),
        sqnr_db=min(sqnrs, default=None),
        agreement=min(errors.agreement for errors in found),
        tolerance=tolerance,
    )


def self_test(artifact: Artifact, session: Session) -> Parity:
    """Run the samples that the artifact carries: raw → tensor, then tensor → output at batch 1 and all at once.

    What is demanded is the stricter of what the artifact records and of what this version asks of its precision, given
    the module's own error where one is recorded: beyond that a manifest can ask for more, never for less. Returns what
    was found on this machine. Raises GateError naming what differs, CorruptError where the artifact has no samples to
    test with or no bound to test against.
    """
    samples = artifact.samples()
    if not len(samples) or not samples.inputs or not samples.outputs:
        raise CorruptError(
            f"{artifact.title}: no samples with inputs and outputs, so nothing shows that it works",
            hint="export it again",
        )
    if artifact.preprocess is not None:
        name = artifact.signature.inputs[0].name
        _check_tensors(samples.inputs[name], artifact.preprocess.batch(samples.raw), artifact.title)
    try:
        table = tolerance_for(artifact.task, artifact.variant.precision, own=artifact.parity.own_error)
    except KeyError:
        table = Tolerance()  # of a later version; what it records then decides
    tolerance = stricter(artifact.parity.tolerance, table)
    if tolerance == Tolerance():
        raise CorruptError(
            f"{artifact.title}: it records no tolerance, and this version has none for {artifact.variant.precision}",
            hint="export it again",
        )
    found = check_parity(
        session,
        samples.inputs,
        samples.outputs,
        task=open_task(artifact.task),
        tolerance=tolerance_on(session.placement, artifact.variant.precision, tolerance, task=artifact.task),
        batches=sorted({1, min(len(samples), artifact.signature.max_batch)}),
        title=artifact.title,
        sampled=True,
    )
    return found.model_copy(update={"own_error": artifact.parity.own_error})


def stricter(recorded: Tolerance, table: Tolerance) -> Tolerance:
    """Bound by bound the harder one of two tolerances; a bound that only one of them has holds."""

    def harder(name: str, choose: Callable[[float, float], float]) -> float | None:
        # The table's comes first: min and max keep it where the recorded one is NaN.
        bounds = [bound for bound in (getattr(table, name), getattr(recorded, name)) if bound is not None]
        return choose(*bounds) if len(bounds) == 2 else next(iter(bounds), None)

    return Tolerance(
        max_abs=harder("max_abs", min),
        max_rel=harder("max_rel", min),
        min_sqnr_db=harder("min_sqnr_db", max),
        min_agreement=harder("min_agreement", max),
        min_iou=harder("min_iou", max),
    )


def tolerance_on(
    placement: Placement, precision: str, recorded: Tolerance, *, task: str = "classification"
) -> Tolerance:
    """The tolerance that holds where the artifact truly runs: the recorded one, or half precision's.

    fp32 convolutions and products run in TF32 on CUDA, which has the 10 bits of mantissa of fp16.
    """
    return tolerance_for(task, "fp16") if precision == "fp32" and placement.device.startswith("cuda") else recorded


def run_batched(session: Session, feed: Feed, size: int) -> dict[str, Array]:
    """The outputs for all samples of `feed`, run `size` at a time (the last batch may be smaller)."""
    count = len(next(iter(feed.values())))
    _check_batched(session.signature)
    parts = [session.run({n: a[i : i + size] for n, a in feed.items()}) for i in range(0, count, size)]
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in session.signature.outputs}


def _check_comparable(reference: Feed, outputs: Feed, where: str) -> None:
    if set(reference) != set(outputs) or not reference:
        raise GateError(f"{where}: tensors {sorted(outputs)}, the reference has {sorted(reference)}")
    for name, expected in reference.items():
        got = outputs[name]
        if (got.dtype, got.shape) != (expected.dtype, expected.shape):
            raise GateError(
                f"{where}: {name} is {got.dtype}{list(got.shape)}, the reference {expected.dtype}{list(expected.shape)}"
            )
        if expected.size == 0:
            raise GateError(f"{where}: {name} is empty: a comparison of nothing proves nothing")
        for side, array in (("the reference", expected), ("it", got)):
            if is_floating(array.dtype) and not np.isfinite(array).all():
                raise GateError(f"{where}: {side} has NaN or infinity in {name}")


def _check_varying(reference: Feed, where: str) -> None:
    if all(_is_constant(array) for array in reference.values()):
        raise GateError(
            f"{where}: the reference gives the same output for every sample, so agreement with it proves nothing",
            hint="is the model trained, and are the samples different from one another?",
        )


def _is_constant(array: Array) -> bool:
    # One sample cannot show it, and batch 1 of one sample is still a comparison.
    if len(array) < 2:
        return False
    values = np.asarray(array, np.float64)
    return bool(np.ptp(values, axis=0).max() <= _CONSTANT * max(np.abs(values).max(), np.finfo(np.float32).tiny))


def _largest(values: NDArray[np.float64]) -> float:
    return float(np.abs(values).max())


def _relative(expected: NDArray[np.float64], got: NDArray[np.float64]) -> float:
    error, size = _largest(got - expected), _largest(expected)
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)


def _sqnr_db(expected: NDArray[np.float64], got: NDArray[np.float64]) -> float | None:
    noise, signal = float(np.square(got - expected).sum()), float(np.square(expected).sum())
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _plausible_flips(count: int, rate: float) -> int:
    """The most flips among `count` that a true rate of `rate` gives in 99.9 % of draws."""
    cumulative = 0.0
    for flips in range(count + 1):
        cumulative += math.comb(count, flips) * rate**flips * (1 - rate) ** (count - flips)
        if cumulative >= _CONFIDENCE:
            return flips
    return count


def _check_tensors(stored: Array, made: Array, title: str) -> None:
    if stored.shape != made.shape or stored.dtype != made.dtype:
        raise GateError(
            f"{title}: preprocessing gives {made.dtype}{list(made.shape)}, stored is {stored.dtype}{list(stored.shape)}"
        )
    close = np.isclose(made, stored, rtol=_TENSOR_RTOL, atol=_TENSOR_ATOL)
    if not close.all():
        wrong = int((~close.reshape(len(close), -1).all(axis=1)).sum())
        raise GateError(
            f"{title}: preprocessing gives other tensors than at export for {wrong} of {len(close)} samples "
            f"(largest difference {_largest(np.asarray(made, np.float64) - np.asarray(stored, np.float64)):.3g})",
            hint="compare the Pillow version with the one in the artifact's provenance",
        )


def _check_batched(signature: Signature) -> None:
    for spec in (*signature.inputs, *signature.outputs):
        if not spec.is_batched:
            raise GateError(f"{spec.name} has no batch axis in front, so it cannot be checked sample by sample")
