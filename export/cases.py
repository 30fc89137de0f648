"""Parity beyond the samples: sizes that nothing was captured with, and inputs at the edges of what can come.

Each is computed by the eager module and by the written file, and the two are compared as on the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from dlops.adapters import Detector
from dlops.artifact import ParityCase, Tolerance
from dlops.errors import DlopsError, GateError, LossError, first_line
from dlops.export.module import eager_outputs
from dlops.parity import compare, run_batched, shortfalls
from dlops.runtimes.session import Session
from dlops.signature import Array, Feed, Signature, is_floating
from dlops.sizes import open_dims, other_sizes, resized, sizes_of
from dlops.tasks import Task

# Of the evaluation samples, how many go through each case: their content matters less than their size or range here.
_SAMPLES = 2
_TINY, _HUGE = 1e-3, 1e2
_LAST_BIT = 2.0**-23
_TINIEST = float(np.finfo(np.float32).tiny)
# Where the module's own rounding takes more of the tolerance than this, another order of the same sums is no error: an
# instance norm divides the noise of a black image by its own deviation.
_OWN_SHARE = 0.25
# A network whose answer is a million times the usual one has left what it was made for: where it saturates kernels keep
# few digits (ONNX Runtime's sigmoid is 17 % off at -15, and 0 from -18 on), and the rest is multiplied by that.
_OUT_OF_SCALE = 1e6
# Arithmetic with fewer bits ends sooner, and integers are calibrated for what the samples hold: beyond it they may
# saturate, and must stay numbers.
_HELD: Mapping[str, frozenset[str]] = {
    "fp32": frozenset({"black", "saturated", "tiny", "huge"}),
    "fp16": frozenset({"black", "saturated", "tiny"}),
    "bf16": frozenset({"black", "saturated", "tiny"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """name: "height 64, width 96" or "black". feed, reference: inputs and what the eager module gives for them.

    own_error: how far the answers move, over the largest of them, where the inputs move by their last bit. growth: how
    many times as large as the usual answers these are.
    """

    name: str
    feed: Feed
    reference: Feed
    is_size: bool = False
    own_error: float = 0.0
    growth: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usual:
    """The largest magnitudes of samples: of all inputs, and of each output."""

    input: float
    outputs: Mapping[str, float]


def make_cases(module: nn.Module, feed: Feed, signature: Signature) -> list[Case]:
    """Every other size of each open dim, and the edges of floating inputs.

    feed: evaluation samples. What the eager module itself answers with NaN or infinity is left out.
    """
    few = {name: array[:_SAMPLES] for name, array in feed.items()}
    cases = [
        Case(name=name, feed=inputs, reference=eager_outputs(module, inputs, signature), is_size=True)
        for name, inputs in _sizes(few, signature)
    ]
    answered = eager_outputs(module, few, signature)
    usual = Usual(
        input=max((_largest(array) for array in few.values() if is_floating(array.dtype)), default=0.0),
        outputs={name: _largest(array) for name, array in answered.items()},
    )
    for name, inputs in _edges(few, feed):
        if name == "huge" and isinstance(module, Detector):
            # They take images in [0, 1]: of boxes beyond all bounds none is left, and exporters expect no empty list.
            continue
        reference = eager_outputs(module, inputs, signature)
        if all(np.isfinite(array).all() for array in reference.values() if is_floating(array.dtype)):
            own = _own_error(module, inputs, reference, signature, usual)
            growth = max(
                (_largest(array) / max(usual.outputs[output], _TINIEST) for output, array in reference.items()),
                default=1.0,
            )
            cases.append(Case(name=name, feed=inputs, reference=reference, own_error=own, growth=growth))
    return cases


def _own_error(module: nn.Module, feed: Feed, reference: Feed, signature: Signature, usual: Usual) -> float:
    """How far the answers move, over the usual ones, where the inputs move by the last bit of the usual ones, or of
    their own where those are larger: a step below it would be rounded away."""
    draw = np.random.default_rng(0)
    step = _LAST_BIT * max(usual.input, *(_largest(array) for array in feed.values() if is_floating(array.dtype)), 0.0)
    moved = {
        name: (np.asarray(array, np.float64) + step * draw.normal(size=array.shape)).astype(array.dtype)
        if is_floating(array.dtype) else array
        for name, array in feed.items()
    }  # fmt: skip
    outputs = eager_outputs(module, moved, signature)
    return max(
        _largest(np.asarray(outputs[name], np.float64) - np.asarray(array, np.float64))
        / max(_largest(array), usual.outputs[name], _TINIEST)
        for name, array in reference.items()
    )


def _largest(array: Array) -> float:
    return float(np.abs(np.asarray(array, np.float64)).max(initial=0.0))


def check_cases(
    session: Session, cases: list[Case], *, task: Task, precision: str, tolerance: Tolerance, title: str
) -> tuple[ParityCase, ...]:
    """What was found in each. Raises LossError where one breaks the tolerance, GateError where NaN comes out.

    Detectors are held at other sizes alone: a black image has thousands of boxes of one score.
    """
    return tuple(_check(session, case, task, precision, tolerance, title) for case in cases)


def _check(
    session: Session, case: Case, task: Task, precision: str, tolerance: Tolerance, title: str
) -> ParityCase:  # fmt: skip
    where = f"{title} at {case.name}"
    held = case.is_size or (case.name in _HELD.get(precision, ()) and task.name != "detection")
    if case.growth > _OUT_OF_SCALE:
        held = False
    if tolerance.max_rel is not None and case.own_error > _OWN_SHARE * tolerance.max_rel:
        held = False
    try:
        outputs = run_batched(session, case.feed, min(_SAMPLES, session.signature.max_batch))
    except DlopsError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise GateError(
            f"{where}: it does not run: {first_line(error)}", hint="a size was baked in when it was captured"
        ) from error
    errors = compare(
        case.reference, outputs, task=task, where=where, min_iou=tolerance.min_iou, edge=not case.is_size
    )  # fmt: skip
    broken = shortfalls(errors, tolerance) if held else []
    if broken:
        raise LossError(
            f"{where}: outputs differ from the reference on {session.placement.provider}: {'; '.join(broken)}",
            hint="a size or a range was baked in when it was captured" if case.is_size else
            "a kernel of this runtime computes otherwise at the edges",
        )  # fmt: skip
    return ParityCase(
        name=case.name, samples=errors.samples, max_abs=errors.max_abs, max_rel=errors.max_rel, sqnr_db=errors.sqnr_db,
        agreement=errors.agreement, held=held,
    )  # fmt: skip


def _sizes(few: Feed, signature: Signature) -> Iterator[tuple[str, dict[str, Array]]]:
    """All dims at their smallest, at their largest and between, and each alone at its ends beside the samples' size."""
    names = open_dims(signature)
    if not names:
        return
    base = sizes_of(few, signature.inputs)
    found: list[dict[str, int]] = []
    choices = {name: other_sizes(signature.dims[name]) for name in names}
    for place in (0, -1, 1):
        found.append(base | {name: sizes[place if len(sizes) > 1 else 0] for name, sizes in choices.items()})
    if len(names) > 1:
        # Which of two was baked in, and whether one was taken for the other.
        found += [base | {name: choices[name][0]} for name in names]
    seen = [base]
    for sizes in found:
        if sizes not in seen:
            seen.append(sizes)
            said = ", ".join(f"{name} {sizes[name]}" for name in names)
            yield said, resized(few, signature.inputs, sizes)


def _edges(few: Feed, feed: Feed) -> Iterator[tuple[str, dict[str, Array]]]:
    """black: all zero. saturated: all as large as the largest sample. tiny, huge: the samples scaled."""
    floating = {name for name, array in few.items() if is_floating(array.dtype)}
    if not floating:
        return

    def changed(name: str, array: Array, how: str) -> Array:
        if name not in floating:
            return array
        match how:
            case "black":
                return np.zeros_like(array)
            case "saturated":
                return np.full_like(array, np.asarray(feed[name]).max())
            case "tiny":
                return (array * array.dtype.type(_TINY)).astype(array.dtype)  # type: ignore[operator]
            case _:
                return (array * array.dtype.type(_HUGE)).astype(array.dtype)  # type: ignore[operator]

    for how in ("black", "saturated", "tiny", "huge"):
        yield how, {name: changed(name, array, how) for name, array in few.items()}
