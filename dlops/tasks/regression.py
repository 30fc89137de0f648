"""Numbers, and fields of them such as optical flow: how much of the targets' deviation is explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dlops.errors import InputError
from dlops.signature import BFLOAT16, Array, Feed, TensorSpec
from dlops.tasks import SAME_BOX_IOU, Pair, label_of

# A value stays where it moves by no more than this share of the standard deviation of the reference.
_STAYS = 0.05


class Regression:
    """The first output holds the numbers, (n, ...)."""

    name = "regression"
    metric = "explained deviation"

    def score(self, outputs: Feed, targets: Array) -> NDArray[np.float64]:
        """1 less the mean absolute error of a sample, over the targets' mean absolute deviation; 0 where that is worse.

        So 1 is exact, and 0 no better than always answering the targets' mean.
        """
        found = np.asarray(_first(outputs), np.float64)
        if targets.shape != found.shape:
            raise InputError(
                f"targets of shape {list(targets.shape)} for outputs of shape {list(found.shape)}", field="target",
                hint="one number for each that the model gives",
            )  # fmt: skip
        truth = np.asarray(targets, np.float64)
        errors = np.abs(found - truth).reshape(len(truth), -1).mean(axis=1)
        deviation = float(np.abs(truth - truth.mean(axis=0)).mean())
        if deviation == 0:
            return np.asarray(errors == 0, np.float64)
        return np.asarray(np.clip(1 - errors / deviation, 0, 1), np.float64)

    def check_targets(self, targets: Array, output: TensorSpec) -> None:
        if targets.dtype.kind not in "fiu" or targets.ndim != len(output.shape):
            raise InputError(
                f"targets of shape {list(targets.shape)} and dtype {targets.dtype.name}", field="target",
                hint=f"regression takes numbers of the shape of {output.name}, {list(output.shape)}",
            )  # fmt: skip
        if any(isinstance(dim, int) and dim != size for dim, size in zip(output.shape, targets.shape, strict=True)):
            raise InputError(
                f"targets of shape {list(targets.shape)}, {output.name} is {list(output.shape)}", field="target"
            )
        if not np.isfinite(np.asarray(targets, np.float64)).all():
            raise InputError("targets hold NaN or infinity", field="target")

    def pair(self, reference: Feed, outputs: Feed, *, min_iou: float = SAME_BOX_IOU) -> Pair:
        ordered = {name: outputs[name] for name in reference}
        expected, got = (np.asarray(_first(side), np.float64) for side in (reference, ordered))
        close = np.abs(got - expected) <= _STAYS * expected.std()
        shares = close.reshape(len(close), -1).mean(axis=1)
        return Pair(reference=reference, outputs=ordered, agreement=shares, decisions=close.size)

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int = 5) -> list[dict[str, Any]]:
        """`{"values": ...}` a sample, nested as the output is; with labels one number each by its name."""
        answers = []
        for row in _first(outputs):
            if labels and row.ndim == 1 and len(labels) == len(row):
                named = {label_of(labels, place): float(value) for place, value in enumerate(row)}
                answers.append({"values": named})
            else:
                answers.append({"values": row.tolist()})
        return answers


def _first(outputs: Feed) -> NDArray[np.floating[Any]]:
    name, values = next(iter(outputs.items()))
    if values.dtype == BFLOAT16:
        values = values.astype(np.float32)
    if values.dtype.kind not in "fiu":
        raise InputError(f"{name}: {values.dtype.name}, regression takes numbers", field=name)
    return cast("NDArray[np.floating[Any]]", values)
