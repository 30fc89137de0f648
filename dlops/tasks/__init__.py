"""What a model is for: how its answers are scored, compared with a reference's, and read by a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dlops import catalog
from dlops.signature import Array, Feed, TensorSpec

# Two boxes are the same where their intersection over union is at least this, unless a tolerance says otherwise.
SAME_BOX_IOU = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Outputs beside their reference, in the same order, ready to be subtracted.

    reference, outputs: tensor name to array; what found no partner is left out of both. agreement: (samples,), the
    share of a sample's decisions that stay, in [0, 1]. decisions: how many there are in all samples together.
    """

    reference: Feed
    outputs: Feed
    agreement: NDArray[np.float64]
    decisions: int


class Task(Protocol):
    """metric: the name of what `score` averages to, a fraction where more is better."""

    name: str
    metric: str

    def score(self, outputs: Feed, targets: Array) -> NDArray[np.float64]:
        """One number in [0, 1] a sample; the metric is their mean. Kept apart so that two variants can be paired."""

    def check_targets(self, targets: Array, output: TensorSpec) -> None:
        """Raise InputError unless they are what `score` takes beside outputs whose first is like `output`."""

    def pair(self, reference: Feed, outputs: Feed, *, min_iou: float = SAME_BOX_IOU) -> Pair:
        """Both sides with the same names and shapes, put in the same order.

        min_iou: from which on two boxes are the same, where there are boxes. Raises GateError where nothing is there
        to be compared.
        """

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int) -> list[dict[str, Any]]:
        """One JSON object a sample, for a person or a client."""


def open_task(name: str) -> Task:
    task: Task = catalog.resolve(catalog.TASKS, "task", name)()
    return task


def label_of(labels: Sequence[str], index: int) -> str:
    """The name of a class, or its number where the labels do not reach it."""
    return labels[index] if 0 <= index < len(labels) else str(index)
