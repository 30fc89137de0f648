"""Boxes with labels and scores: average precision, and boxes matched before they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dlops.errors import GateError, InputError
from dlops.signature import Array, Feed, TensorSpec
from dlops.tasks import SAME_BOX_IOU, Pair, label_of

Floats = NDArray[np.float64]
# COCO's: the mean over these.
_THRESHOLDS = np.arange(0.5, 1.0, 0.05)
# Where an image holds nothing, finding something with more confidence than this is an error.
_SURE = 0.5
# A detection at the end of a full list falls off it where its score moves by as much as the others' do.
_SLACK = 2.0
_ROUNDING = 1e-6
_KEYPOINTS = "keypoints"
# Across a box, in torchvision's Keypoint R-CNN. Fewer bits, whose boxes may overlap by less, move within one.
_HEAT_CELLS = 56
_HEAT = "keypoints_scores"
# Of the largest, as fp32's numbers may be off. What says more is another detection, or another spot of the heat.
_STRICT_IOU, _SAME = SAME_BOX_IOU, 1e-3


class Detection:
    """Outputs boxes (n, most, 4) as x1, y1, x2, y2 in pixels of the input, scores (n, most), labels (n, most).

    Others (masks, keypoints) belong to the boxes, in their order. An image with fewer than `most` is filled up with
    zeros: a score of 0 is no detection.
    """

    name = "detection"
    metric = "AP"

    def score(self, outputs: Feed, targets: Array) -> Floats:
        """COCO's average precision within each image, the mean over its classes and over IoUs from 0.50 to 0.95.

        Not pooled over images, so that two variants can be paired image by image. An image without targets scores 1
        where nothing is found in it with a score above 0.5, else 0.
        """
        if len(targets) != len(outputs["boxes"]):
            raise InputError(f"{len(targets)} targets for {len(outputs['boxes'])} samples", field="target")
        return np.array([_image_ap(outputs, place, truth) for place, truth in enumerate(targets)])

    def check_targets(self, targets: Array, output: TensorSpec) -> None:
        if targets.ndim != 3 or targets.shape[2] != 5 or targets.dtype.kind not in "fiu":
            raise InputError(
                f"targets of shape {list(targets.shape)} and dtype {targets.dtype.name}", field="target",
                hint="detection takes [samples, most, 5]: x1, y1, x2, y2 and the label, filled up with label 0",
            )  # fmt: skip
        boxes = np.asarray(targets, np.float64)
        real = boxes[boxes[..., 4] > 0]
        if not np.isfinite(boxes).all() or (real[:, 2:4] <= real[:, :2]).any():
            raise InputError(
                "targets hold boxes without an area", field="target", hint="x1 < x2 and y1 < y2, in pixels of the input"
            )

    def pair(self, reference: Feed, outputs: Feed, *, min_iou: float = SAME_BOX_IOU) -> Pair:
        """Detections of the same label matched by their overlap, each once. A keypoint that lies in another cell of its
        heat map is a decision that changed, and those that stay are compared as numbers.

        In full precision (`min_iou` of 0.9) two of other scores are not the same: of proposals that lie almost on one
        another, suppression keeps whichever was rounded up, with its own score and corners.

        Raises GateError where there is no detection on either side: that they agree would say nothing.
        """
        for side in (reference, outputs):
            if missing := {"boxes", "scores", "labels"} - set(side):
                raise InputError(f"no output {sorted(missing)[0]!r}: detection takes boxes, scores and labels")
        counts = [int(np.count_nonzero(np.asarray(side["scores"], np.float64) > 0)) for side in (reference, outputs)]
        if counts == [0, 0]:
            raise GateError(
                "no detection on either side, so that they agree proves nothing",
                hint="take samples that show something, or a lower score threshold",
            )
        matches = [_match(reference, outputs, place, min_iou) for place in range(len(reference["boxes"]))]
        left = {name: _rows(array, [(place, one) for place, match in enumerate(matches) for one, _ in match.pairs])
                for name, array in reference.items()}  # fmt: skip
        right = {name: _rows(outputs[name], [(place, other) for place, match in enumerate(matches)
                                             for _, other in match.pairs])
                 for name in reference}  # fmt: skip
        kept = np.array([len(match.pairs) for match in matches])
        of = np.array([match.of for match in matches])
        if (points := left.get(_KEYPOINTS)) is not None and points.ndim == 3 and points.shape[2] >= 2:
            moved = _moved_keypoints(left, right, strict=min_iou >= _STRICT_IOU)
            right[_KEYPOINTS] = np.where(moved[..., None], points, right[_KEYPOINTS]).astype(points.dtype)
            if _HEAT in left and left[_HEAT].shape == moved.shape:
                right[_HEAT] = np.where(moved, left[_HEAT], right[_HEAT]).astype(left[_HEAT].dtype)
            image = np.repeat(np.arange(len(matches)), kept)
            kept = kept + np.bincount(image, weights=(~moved).sum(1), minlength=len(matches)).astype(np.int64)
            of = of + np.bincount(image, minlength=len(matches)) * points.shape[1]
        agreement = np.where(of > 0, kept / np.maximum(of, 1), 1.0)
        return Pair(reference=left, outputs=right, agreement=agreement, decisions=int(of.sum()))

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int = 5) -> list[dict[str, Any]]:
        """`{"detections": [{"label", "score", "box": [x1, y1, x2, y2]}, ...]}` a sample, the highest score first.

        Boxes are in pixels of the tensor that the model was given, and `dlops.framing` undoes resizing and cropping.
        All of them are listed, whatever `top` says.
        """
        answers = []
        for place in range(len(outputs["boxes"])):
            boxes, scores, found = (outputs[name][place] for name in ("boxes", "scores", "labels"))
            order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0]
            answers.append(
                {
                    "detections": [
                        {
                            "label": label_of(labels, int(found[i])),
                            "score": float(scores[i]),
                            "box": [float(edge) for edge in boxes[i]],
                        }
                        for i in order
                    ]
                }
            )
        return answers


class _Match:
    """pairs: places in the reference and in the outputs. of: how many there would be if all agreed."""

    def __init__(self, pairs: list[tuple[int, int]], of: int) -> None:
        self.pairs, self.of = pairs, of


def _moved_keypoints(reference: Feed, outputs: Feed, *, strict: bool) -> NDArray[np.bool_]:
    """(pairs, keypoints): which lie in another cell of their heat map; where boxes must overlap strictly, in another
    pixel of the box, to which the map is stretched.

    Each is where its map is the hottest, and which of two spots of one heat that is is a matter of rounding: a
    decision, as is the box that is kept of two, and no number that is off by the distance between them. So is the
    number of pixels that a map is stretched to, which a box of almost a whole number of them decides, and by which its
    heat changes: strictly, a keypoint of another heat counts as one that moved.
    """
    here, there = (np.asarray(side[_KEYPOINTS], np.float64)[..., :2] for side in (reference, outputs))
    boxes = np.asarray(reference["boxes"], np.float64)
    longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0.0)
    cell = np.ones_like(longest) if strict else np.maximum(longest / _HEAT_CELLS, 1.0)
    moved: NDArray[np.bool_] = np.abs(here - there).max(axis=2, initial=0.0) > cell[:, None] / 2
    if strict and _HEAT in reference and reference[_HEAT].shape == moved.shape:
        heat, other = (np.asarray(side[_HEAT], np.float64) for side in (reference, outputs))
        moved |= np.abs(heat - other) > _SAME * np.abs(heat).max(initial=0.0)
    return moved


def _match(reference: Feed, outputs: Feed, place: int, min_iou: float) -> _Match:
    """The detections of one image, the pairs that overlap most first.

    What is missing at the end of a list as long as the outputs have room for counts neither way: of many with almost
    the same score the last one is a matter of rounding.
    """
    sides = [_detections(side, place) for side in (reference, outputs)]
    (here, boxes, scores, labels), (there, other_boxes, other_scores, other_labels) = sides
    overlaps = _iou(boxes, other_boxes)
    overlaps[labels[:, None] != other_labels[None]] = 0.0
    pairs: list[tuple[int, int]] = []
    taken: tuple[set[int], set[int]] = set(), set()
    # Equal overlaps by the nearer score, so that boxes that lie on one another find their own.
    apart = np.abs(scores[:, None] - other_scores[None])
    if min_iou >= _STRICT_IOU:
        overlaps[apart > _SAME * scores.max(initial=0.0)] = 0.0
    for flat in np.lexsort((apart.ravel(), -overlaps.ravel())):
        row, column = divmod(int(flat), len(other_scores))
        if overlaps[row, column] < min_iou:
            break
        if row not in taken[0] and column not in taken[1]:
            pairs.append((row, column))
            taken[0].add(row)
            taken[1].add(column)
    moved = max((abs(float(scores[row] - other_scores[column])) for row, column in pairs), default=0.0)
    slack = _SLACK * moved + _ROUNDING
    room = len(reference["scores"][place])
    fallen = [
        _fallen(own, mine, others, slack, room)
        for own, mine, others in ((scores, taken[0], other_scores), (other_scores, taken[1], scores))
    ]
    of = max(len(scores) - fallen[0], len(other_scores) - fallen[1])
    return _Match([(int(here[row]), int(there[column])) for row, column in sorted(pairs)], of)


def _fallen(own: Floats, matched: set[int], others: Floats, slack: float, room: int) -> int:
    """How many without a partner may have fallen off the end of the other list, which is full."""
    if len(others) < room:
        return 0
    last = float(others.min()) + slack
    return sum(1 for place, score in enumerate(own) if place not in matched and score <= last)


def _detections(side: Feed, place: int) -> tuple[NDArray[np.int64], Floats, Floats, NDArray[np.int64]]:
    """Places, boxes, scores and labels of what was found in one image."""
    scores = np.asarray(side["scores"][place], np.float64)
    found = np.flatnonzero(scores > 0)
    return (
        found,
        np.asarray(side["boxes"][place], np.float64)[found],
        scores[found],
        np.asarray(side["labels"][place], np.int64)[found],
    )


def _iou(boxes: Floats, others: Floats) -> Floats:
    """(a, b): intersection over union of boxes (a, 4) and (b, 4); of two without an area 1 where they are equal."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(side[:, 2:] - side[:, :2], 0, None).prod(axis=1) for side in (boxes, others)]
    either = areas[0][:, None] + areas[1][None] - both
    equal = np.isclose(boxes[:, None], others[None], rtol=0, atol=1e-2).all(axis=2)
    result: Floats = np.where(either > 0, both / np.where(either > 0, either, 1), 0.0)
    return np.where(equal & (either <= 0), 1.0, result)


def _rows(array: Array, places: list[tuple[int, int]]) -> Array:
    images, found = (np.array([pair[side] for pair in places], np.int64) for side in (0, 1))
    return np.asarray(array[images, found])


def _image_ap(outputs: Feed, place: int, truth: Array) -> float:
    _, boxes, scores, labels = _detections(outputs, place)
    wanted = np.asarray(truth, np.float64)
    wanted = wanted[wanted[:, 4] > 0]
    if not len(wanted):
        return float(not (scores > _SURE).any())
    precisions = []
    for label in np.unique(wanted[:, 4]):
        own = labels == int(label)
        order = np.argsort(-scores[own], kind="stable")
        overlaps = _iou(boxes[own][order], wanted[wanted[:, 4] == label][:, :4])
        precisions += [_average_precision(overlaps, threshold) for threshold in _THRESHOLDS]
    return float(np.mean(precisions))


def _average_precision(overlaps: Floats, threshold: float) -> float:
    """The area under precision against recall, each found box (row, best score first) taking one true box at most."""
    count, total = overlaps.shape
    taken, hits = np.zeros(total, bool), np.zeros(count)
    for row in range(count):
        free = np.where(taken, -1.0, overlaps[row])
        best = int(free.argmax())
        if free[best] >= threshold:
            taken[best] = True
            hits[row] = 1
    if not hits.any():
        return 0.0
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, count + 1), found / total
    # As COCO does: the best precision at that recall or a higher one.
    best_after = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best_after).sum())
