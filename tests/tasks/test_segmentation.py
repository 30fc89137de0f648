"""A class a pixel: agreement as a share of pixels, intersection over union, masks for people."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dlops.errors import InputError
from dlops.parity import compare
from dlops.signature import Array, TensorSpec
from dlops.tasks import open_task

TASK = open_task("segmentation")
MASKS = np.array([[[0, 0], [1, 2]], [[2, 2], [2, 1]]])


def logits(masks: Array, classes: int = 3) -> dict[str, Array]:
    return {"out": np.ascontiguousarray(np.moveaxis(np.eye(classes, dtype=np.float32)[masks.astype(int)], -1, 1))}


def test_agreement_is_a_share_of_pixels() -> None:
    other = MASKS.copy()
    other[0, 0, 0] = 1
    found = compare(logits(MASKS), logits(other), task=TASK)
    assert (found.agreement, found.decisions, found.samples) == (0.875, 8, 2)


def test_the_score_is_the_mean_iou_of_an_image() -> None:
    assert TASK.score(logits(MASKS), MASKS).tolist() == [1.0, 1.0]
    other = MASKS.copy()
    other[0, 0, 0] = 1
    # Class 0: one of two; class 1: one of two; class 2: whole.
    assert TASK.score(logits(other), MASKS)[0] == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_ignored_pixels_do_not_count() -> None:
    other, targets = MASKS.copy(), MASKS.copy()
    other[0, 0, 0], targets[0, 0, 0] = 1, 255
    assert TASK.score(logits(other), targets)[0] == 1.0


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (np.zeros((2, 2), int), "one class index a pixel"),
        (np.full((2, 2, 2), 3), "outside 0 to 2"),
        (np.zeros((2, 3, 2), int), "3×2 pixels"),
    ],
)
def test_targets_that_are_none(targets: Array, said: str) -> None:
    with pytest.raises(InputError) as refused:
        TASK.check_targets(targets, TensorSpec(name="out", dtype="float32", shape=("batch", 3, 2, 2)))
    assert said in str(refused.value)


def test_answers_hold_shares_and_a_mask() -> None:
    first, _ = TASK.answer(logits(MASKS), labels=("sky", "sea", "land"), top=2)
    assert first["classes"][0] == {"label": "sky", "class": 0, "share": 0.5}
    assert len(first["classes"]) == 2
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["mask"]))))
    assert mask.tolist() == MASKS[0].tolist()
