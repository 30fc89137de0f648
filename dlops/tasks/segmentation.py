"""One class a pixel: intersection over union, and how much of an image each class covers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dlops.errors import InputError
from dlops.signature import Array, Feed, TensorSpec
from dlops.tasks import SAME_BOX_IOU, Pair, label_of

# What data sets mark the pixels with that nobody is asked about: VOC's borders, Cityscapes' rest.
IGNORED = 255


class Segmentation:
    """The first output holds logits, (n, classes, height, width)."""

    name = "segmentation"
    metric = "mean IoU"

    def score(self, outputs: Feed, targets: Array) -> NDArray[np.float64]:
        """The intersection over union of a sample, the mean over the classes that are in it or found in it."""
        logits = _logits(outputs)
        found = self.decide(outputs)
        if targets.shape != found.shape:
            raise InputError(
                f"targets of shape {list(targets.shape)} for decisions of shape {list(found.shape)}",
                field="target", hint="one class index a pixel",
            )  # fmt: skip
        classes = logits.shape[1]
        return np.array([_mean_iou(one, truth, classes) for one, truth in zip(found, targets, strict=True)])

    def check_targets(self, targets: Array, output: TensorSpec) -> None:
        if targets.ndim != 3 or targets.dtype.kind not in "iu":
            raise InputError(
                f"targets of shape {list(targets.shape)} and dtype {targets.dtype.name}", field="target",
                hint="segmentation takes one class index a pixel, whole numbers of shape [samples, height, width]",
            )  # fmt: skip
        if len(output.shape) != 4 or not isinstance(classes := output.shape[1], int):
            raise InputError(
                f"{output.name}: shape {list(output.shape)}, segmentation takes [samples, classes, height, width]",
                field=output.name, hint="the first output has to hold the logits",
            )  # fmt: skip
        sizes = tuple(dim for dim in output.shape[2:] if isinstance(dim, int))
        if len(sizes) == 2 and targets.shape[1:] != sizes:
            raise InputError(
                f"targets of {targets.shape[1]}×{targets.shape[2]} pixels, the model answers {sizes[0]}×{sizes[1]}",
                field="target", hint="bring the targets to the size of the model's output, by the nearest pixel",
            )  # fmt: skip
        indices = cast("NDArray[np.integer[Any]]", targets)
        wrong = indices[(indices < 0) | ((indices >= classes) & (indices != IGNORED))]
        if len(wrong):
            raise InputError(
                f"{len(wrong)} pixels' targets are outside 0 to {classes - 1}, {wrong[0]} among them", field="target",
                hint=f"the model tells {classes} classes apart, counted from 0; {IGNORED} is left out of the score",
            )  # fmt: skip

    def decide(self, outputs: Feed) -> Array:
        """The class of each pixel, (n, height, width)."""
        return np.asarray(np.argmax(_logits(outputs), axis=1))

    def pair(self, reference: Feed, outputs: Feed, *, min_iou: float = SAME_BOX_IOU) -> Pair:
        ordered = {name: outputs[name] for name in reference}
        same = np.equal(self.decide(reference), self.decide(ordered))
        shares = same.reshape(len(same), -1).mean(axis=1)
        return Pair(reference=reference, outputs=ordered, agreement=shares, decisions=same.size)

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int = 5) -> list[dict[str, Any]]:
        """`{"size": [height, width], "classes": [{"label", "class", "share"}, ...], "mask": str}` a sample.

        share: of the pixels, the largest first. mask: a PNG in base64 with one class index a pixel.
        """
        answers = []
        for mask in self.decide(outputs):
            indices, counts = np.unique(mask, return_counts=True)
            order = np.argsort(-counts, kind="stable")[:top]
            answers.append(
                {
                    "size": list(mask.shape),
                    "classes": [
                        {
                            "label": label_of(labels, int(indices[i])),
                            "class": int(indices[i]),
                            "share": float(counts[i] / mask.size),
                        }
                        for i in order
                    ],
                    "mask": _png(mask),
                }
            )
        return answers


def _mean_iou(found: Array, truth: Array, classes: int) -> float:
    counted = truth != IGNORED
    pairs = truth[counted].astype(np.int64) * classes + found[counted]
    table = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    both, either = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    present = either > 0
    return float((both[present] / either[present]).mean()) if present.any() else 1.0


def _png(mask: Array) -> str:
    # 16 bits where there are more classes than a byte counts.
    pixels = mask.astype(np.uint8 if math.prod(mask.shape) == 0 or mask.max() < 256 else np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _logits(outputs: Feed) -> NDArray[np.floating[Any]]:
    name, logits = next(iter(outputs.items()))
    if logits.ndim != 4:
        raise InputError(
            f"{name}: shape {list(logits.shape)}, segmentation takes [samples, classes, height, width]", field=name
        )
    return cast("NDArray[np.floating[Any]]", logits)
