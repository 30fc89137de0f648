"""Accuracy lost against the dense checkpoint, paired on the same samples, with its interval and its gate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dlops.artifact import Accuracy
from dlops.errors import LossError
from dlops.signature import Array, Feed
from dlops.tasks import Task

# The 97.5 % point of the normal distribution.
_Z = 1.959964


def measure_accuracy(
    dense: Feed, outputs: Feed, targets: Array, *, task: Task, max_drop: float, strict: bool
) -> Accuracy:
    """The task's metric of `outputs` beside that of `dense`, what the dense checkpoint gives on the same samples."""
    reference, value = task.score(dense, targets), task.score(outputs, targets)
    low, high = paired_interval(reference - value)
    flips = task.pair(dense, outputs).agreement < 1
    return Accuracy(
        metric=task.metric,
        samples=len(value),
        value=float(value.mean()),
        reference=float(reference.mean()),
        drop_points=100 * float((reference - value).mean()),
        drop_low=100 * low,
        drop_high=100 * high,
        flips=int(flips.sum()),
        max_drop=max_drop,
        strict=strict,
    )


def check_drop(accuracy: Accuracy, *, title: str) -> None:
    """Raise LossError where more is lost than allowed: the point estimate decides, with `strict` the interval's end."""
    lost = accuracy.drop_high if accuracy.strict else accuracy.drop_points
    # Drops are multiples of 100 / n points; the last bits of a float must not decide.
    if lost <= accuracy.max_drop + 1e-9:
        return
    which = "the upper end of its interval" if accuracy.strict else "the point estimate"
    raise LossError(
        f"{title}: {accuracy.metric} {accuracy.value:.2%} against the dense checkpoint's {accuracy.reference:.2%}: "
        f"{accuracy.drop_points:.2f} points lost (95 % interval {accuracy.drop_low:.2f} to {accuracy.drop_high:.2f}, "
        f"{accuracy.samples} samples); {which} is above the {accuracy.max_drop:g} allowed",
        hint="allow more with --max-drop, or take a milder variant",
    )


def at_chance(dense: Feed, accuracy: float) -> bool:
    """Whether a classifier scores no better than guessing: one of its classes, drawn at random."""
    classes = int(next(iter(dense.values())).shape[-1])
    return classes > 1 and accuracy <= 1 / classes


def paired_interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences in [-1, 1].

    Two pseudo-observations, half of one at each end and one at zero, are added (Agresti and Min 2005), so that no
    difference at all among few samples does not pass for certainty.
    """
    count = len(differences) + 2
    mean = float(differences.sum()) / count
    square = (float(np.square(differences).sum()) + 1) / count
    half = _Z * math.sqrt(max(square - mean**2, 0) / count)
    point = float(differences.mean())
    return max(-1.0, min(mean - half, point)), min(1.0, max(mean + half, point))
