"""What a model is for: how its answers are scored, and how a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dlops import catalog
from dlops.signature import Array, Feed, TensorSpec


class Task(Protocol):
    """metric: the name of what `score` averages to, a fraction where more is better."""

    name: str
    metric: str

    def score(self, outputs: Feed, targets: Array) -> NDArray[np.float64]:
        """One number in [0, 1] a sample; the metric is their mean. Kept apart so that two variants can be paired."""

    def check_targets(self, targets: Array, output: TensorSpec) -> None:
        """Raise InputError unless they are what `score` takes beside outputs whose first is like `output`."""

    def decide(self, outputs: Feed) -> Array:
        """One decision a sample: what must not flip between variants."""

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int) -> list[dict[str, Any]]:
        """One JSON object a sample, for a person or a client."""


def open_task(name: str) -> Task:
    task: Task = catalog.resolve(catalog.TASKS, "task", name)()
    return task
