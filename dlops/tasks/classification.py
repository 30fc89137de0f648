"""One label of many: top-1 accuracy, and labels with probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dlops.errors import InputError
from dlops.signature import BFLOAT16, Array, Feed, TensorSpec
from dlops.tasks import SAME_BOX_IOU, Pair, label_of

# Outputs of a model that ends in a softmax of its own; no other may bear these names.
PROBABILITIES = "probabilities"
LABEL = "label"


class Classification:
    """The first output holds logits, (n, classes), or probabilities where that is its name."""

    name = "classification"
    metric = "accuracy"

    def score(self, outputs: Feed, targets: Array) -> NDArray[np.float64]:
        decided = self.decide(outputs)
        if targets.shape != decided.shape:
            # Numpy would stretch (n, 1) to (n, n) and count the wrong pairs.
            raise InputError(
                f"targets of shape {list(targets.shape)} for {len(decided)} samples",
                field="target",
                hint="one class index a sample",
            )
        return np.equal(decided, targets).astype(np.float64)

    def check_targets(self, targets: Array, output: TensorSpec) -> None:
        if targets.ndim != 1 or targets.dtype.kind not in "iu":
            raise InputError(
                f"targets of shape {list(targets.shape)} and dtype {targets.dtype.name}",
                field="target",
                hint="classification takes one class index a sample, whole numbers of shape [samples]",
            )
        if len(output.shape) != 2 or not isinstance(classes := output.shape[1], int):
            raise InputError(
                f"{output.name}: shape {list(output.shape)}, classification takes [samples, classes]",
                field=output.name,
                hint="the first output has to hold the logits",
            )
        indices = cast("NDArray[np.integer[Any]]", targets)
        wrong = indices[(indices < 0) | (indices >= classes)]
        if len(wrong):
            raise InputError(
                f"{len(wrong)} targets are outside 0 to {classes - 1}, {wrong[0]} among them",
                field="target",
                hint=f"the model tells {classes} classes apart, counted from 0",
            )

    def decide(self, outputs: Feed) -> Array:
        """The class of each sample, (n,)."""
        return np.asarray(np.argmax(_logits(outputs), axis=1))

    def pair(self, reference: Feed, outputs: Feed, *, min_iou: float = SAME_BOX_IOU) -> Pair:
        ordered = {name: outputs[name] for name in reference}
        kept = np.equal(self.decide(reference), self.decide(ordered)).astype(np.float64)
        if PROBABILITIES in reference and LABEL in reference:
            # An index is a decision and has no distance: one that differs lowers the agreement and nothing else.
            kept *= np.equal(reference[LABEL], ordered[LABEL])
            reference, ordered = ({PROBABILITIES: side[PROBABILITIES]} for side in (reference, ordered))
        return Pair(reference=reference, outputs=ordered, agreement=kept, decisions=len(kept))

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int = 5) -> list[dict[str, Any]]:
        """`{"label": str, "probability": float, "top": [{"label", "probability"}, ...]}` a sample."""
        answers = []
        first = _logits(outputs)
        for row in first if next(iter(outputs)) == PROBABILITIES else softmax(first):
            best = np.argsort(-row, kind="stable")[:top]
            ranked = [{"label": label_of(labels, int(i)), "probability": float(row[i])} for i in best]
            answers.append({**ranked[0], "top": ranked})
        return answers


def softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    probabilities: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def _logits(outputs: Feed) -> NDArray[np.floating[Any]]:
    name, logits = next(iter(outputs.items()))
    if logits.ndim != 2:
        raise InputError(f"{name}: shape {list(logits.shape)}, classification takes [samples, classes]", field=name)
    # Exactly, and numpy ranks them.
    return cast("NDArray[np.floating[Any]]", logits.astype(np.float32) if logits.dtype == BFLOAT16 else logits)
