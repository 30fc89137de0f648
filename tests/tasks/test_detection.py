"""Detections matched before they are compared: order, ties, swaps, nothing at all; and average precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dlops.errors import GateError, InputError
from dlops.parity import Errors, compare, shortfalls, tolerance_for
from dlops.signature import Array, Feed, TensorSpec
from dlops.tasks import open_task

TASK = open_task("detection")
ROOM = 8


Found = tuple[tuple[float, float, float, float], float, int]


def detections(
    *images: list[tuple[tuple[float, float, float, float], float, int]], room: int = ROOM
) -> dict[str, Array]:
    boxes = np.zeros((len(images), room, 4), np.float32)
    scores, labels = np.zeros((len(images), room), np.float32), np.zeros((len(images), room), np.int64)
    for place, image in enumerate(images):
        for row, (box, score, label) in enumerate(image):
            boxes[place, row], scores[place, row], labels[place, row] = box, score, label
    return {"boxes": boxes, "scores": scores, "labels": labels}


CAT = ((10.0, 10.0, 50.0, 40.0), 0.9, 1)
DOG = ((60.0, 20.0, 90.0, 80.0), 0.7, 2)
COW = ((5.0, 60.0, 30.0, 95.0), 0.4, 3)
REFERENCE = detections([CAT, DOG], [COW])


def errors(outputs: Feed, reference: Feed = REFERENCE, precision: str = "fp32") -> Errors:
    return compare(reference, outputs, task=TASK, min_iou=tolerance_for("detection", precision).min_iou)


def test_the_order_of_detections_does_not_count() -> None:
    found = errors(detections([DOG, CAT], [COW]))
    assert (found.agreement, found.decisions, found.max_abs, found.sqnr_db) == (1.0, 3, 0.0, None)


def test_a_moved_box_is_an_error_of_its_size() -> None:
    moved = ((10.5, 10.0, 50.0, 40.0), 0.9, 1)
    found = errors(detections([moved, DOG], [COW]))
    assert found.agreement == 1.0
    deviation = float(np.array([CAT[0], DOG[0], COW[0]]).std())
    assert found.max_abs == pytest.approx(0.5 / deviation)
    assert shortfalls(found, tolerance_for("detection", "fp32"))


@pytest.mark.parametrize(
    "outputs",
    [
        detections([CAT], [COW]),
        detections([CAT, (DOG[0], 0.7, 1)], [COW]),
        detections([CAT, ((160.0, 20.0, 190.0, 80.0), 0.7, 2)], [COW]),
        detections([CAT, DOG, ((0.0, 0.0, 9.0, 9.0), 0.3, 1)], [COW]),
    ],
    ids=["missing", "another label", "elsewhere", "one more"],
)
def test_what_finds_no_partner_counts_against_the_agreement(outputs: dict[str, Array]) -> None:
    found = errors(outputs)
    assert found.agreement < 1
    assert shortfalls(found, tolerance_for("detection", "fp32"))


def test_each_detection_finds_one_partner_only() -> None:
    twice = detections([CAT, CAT], [COW])
    assert errors(twice, detections([CAT], [COW])).agreement == pytest.approx(0.75)


def test_boxes_that_lie_on_one_another_find_their_own_by_the_score() -> None:
    pair = [(CAT[0], 0.9, 1), (CAT[0], 0.5, 1)]
    found = errors(detections(pair[::-1], [COW]), detections(pair, [COW]))
    assert (found.agreement, found.max_abs) == (1.0, 0.0)


def test_another_of_two_proposals_that_lie_on_one_another_is_a_decision() -> None:
    kept = ((10.0, 10.0, 50.0, 40.0), 0.400, 1)
    other = ((10.0, 10.4, 50.0, 40.0), 0.402, 1)
    crowd = [((100.0 + 60 * place, 10.0, 150.0 + 60 * place, 60.0), 0.9, 2) for place in range(100)]
    found = errors(detections([other, *crowd], room=101), detections([kept, *crowd], room=101))
    assert found.agreement == pytest.approx(100 / 101)
    assert (found.max_abs, found.max_rel) == (0.0, 0.0)
    assert not shortfalls(found, tolerance_for("detection", "fp32"))
    # Fewer bits move scores by as much, so there it is the same one, and its numbers count.
    narrow = errors(detections([other, *crowd], room=101), detections([kept, *crowd], room=101), "fp16")
    assert (narrow.agreement, narrow.max_abs > 0) == (1.0, True)
    # Scores that are all a little off are not so many other proposals.
    scaled = {**REFERENCE, "scores": REFERENCE["scores"] * np.float32(1.002)}
    assert shortfalls(errors(scaled), tolerance_for("detection", "fp32"))


def test_what_falls_off_a_full_list_by_a_tie_counts_neither_way() -> None:
    def full(last: Found) -> dict[str, Array]:
        return detections([CAT, DOG, last], room=3)

    here, there = ((0.0, 0.0, 8.0, 8.0), 0.2, 1), ((30.0, 60.0, 40.0, 70.0), 0.2, 1)
    found = errors(full(there), full(here))
    assert (found.agreement, found.decisions) == (1.0, 2)
    # With room left nothing falls off, and a clearly higher score would not have.
    assert errors(detections([CAT, DOG, there]), detections([CAT, DOG, here])).agreement < 1
    assert errors(full(there), full((here[0], 0.6, 1))).agreement < 1


def test_no_box_on_either_side_proves_nothing() -> None:
    with pytest.raises(GateError, match="no detection on either side"):
        errors(detections([], []), detections([], []))


def test_boxes_that_all_are_others_are_wrong_without_end() -> None:
    found = errors(detections([(DOG[0], 0.9, 1)], [(CAT[0], 0.4, 3)]), detections([CAT], [COW]))
    assert (found.agreement, found.max_abs, found.max_rel) == (0.0, np.inf, np.inf)
    assert shortfalls(found, tolerance_for("detection", "fp32"))


def test_what_belongs_to_the_boxes_moves_with_them() -> None:
    keypoints = np.arange(2 * ROOM * 3, dtype=np.float32).reshape(2, ROOM, 3)
    swapped = keypoints.copy()
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    found = errors({**detections([DOG, CAT], [COW]), "keypoints": swapped}, {**REFERENCE, "keypoints": keypoints})
    assert found.max_abs == 0


def truth(*images: list[Found]) -> Array:
    targets = np.zeros((len(images), ROOM, 5), np.float32)
    for place, image in enumerate(images):
        for row, (box, _, label) in enumerate(image):
            targets[place, row] = (*box, label)
    return targets


def with_keypoints(shift: Array | float = 0.0) -> dict[str, Array]:
    """Five of each detection, about the middle of its box. shift: of those of the first box, in pixels."""
    points = np.zeros((2, ROOM, 5, 3), np.float32)
    middle = (REFERENCE["boxes"][..., :2] + REFERENCE["boxes"][..., 2:]) / 2
    points[..., :2] = middle[:, :, None] + np.arange(5, dtype=np.float32)[:, None]
    points[..., 2] = 1
    points[0, 0, :, 0] += np.asarray(shift, np.float32)
    return {**REFERENCE, "keypoints": points}


def test_a_keypoint_of_two_spots_of_one_heat_is_a_decision() -> None:
    found = errors(with_keypoints(np.array([0, 0, 20, 0, 0])), with_keypoints())
    # Three boxes and fifteen keypoints, one of which is elsewhere.
    assert (found.decisions, found.max_abs) == (18, 0.0)
    assert found.agreement == pytest.approx((11 / 12 + 1) / 2)
    # One of eighteen is more than fp32 may change; one of very many is not.
    assert shortfalls(found, tolerance_for("detection", "fp32"))


def test_a_keypoint_of_another_heat_is_a_decision_and_all_of_another_heat_are_wrong() -> None:
    heat = np.full((2, ROOM, 5), 4.0, np.float32)
    one = heat.copy()
    one[0, 0, 3] = 4.1
    found = errors({**with_keypoints(), "keypoints_scores": one}, {**with_keypoints(), "keypoints_scores": heat})
    assert (found.decisions, found.max_abs, found.max_rel) == (18, 0.0, 0.0)
    assert found.agreement == pytest.approx((11 / 12 + 1) / 2)
    other = {**with_keypoints(), "keypoints_scores": heat * np.float32(1.01)}
    found = errors(other, {**with_keypoints(), "keypoints_scores": heat})
    assert shortfalls(found, tolerance_for("detection", "fp32"))


def test_keypoints_that_are_all_a_little_off_are_wrong() -> None:
    for shift in (0.4, 2.0):
        found = errors(with_keypoints(shift), with_keypoints())
        assert shortfalls(found, tolerance_for("detection", "fp32")), shift
    # A pixel in a box of forty is within a cell: in 8 bits a number, in fp32 a decision.
    assert errors(with_keypoints(0.45), with_keypoints(), "int8").agreement == 1.0
    assert errors(with_keypoints(0.7), with_keypoints()).agreement < 1
    # Within the pixel it is a number.
    found = errors(with_keypoints(0.4), with_keypoints())
    assert (found.agreement, found.max_abs > 0) == (1.0, True)
    assert not shortfalls(errors(with_keypoints(1e-4), with_keypoints()), tolerance_for("detection", "fp32"))


def test_average_precision_of_an_image() -> None:
    targets = truth([CAT, DOG], [COW])
    assert TASK.score(REFERENCE, targets).tolist() == [1.0, 1.0]
    # One of two classes found: half of it.
    assert TASK.score(detections([CAT], [COW]), targets).tolist() == [0.5, 1.0]
    # A false alarm of higher score halves the precision at every recall.
    alarm = ((60.0, 60.0, 99.0, 99.0), 0.95, 3)
    assert TASK.score(detections([CAT, DOG], [alarm, COW]), targets)[1] == pytest.approx(0.5)
    # An IoU of 0.8 counts at the thresholds 0.50 to 0.75, and at 0.80 by rounding or not.
    shifted = ((10.0, 10.0, 50.0, 34.0), 0.9, 1)
    assert TASK.score(detections([shifted, DOG], [COW]), targets)[0] == pytest.approx((0.65 + 1) / 2, abs=0.03)


def test_an_image_without_targets_scores_by_false_alarms() -> None:
    targets = truth([], [])
    assert TASK.score(detections([], [CAT]), targets).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (np.zeros((2, 3), np.float32), "shape"),
        (np.array([[[5, 5, 5, 9, 1]]], np.float32), "without an area"),
        (np.array([[[0, 0, np.nan, 9, 1]]], np.float32), "without an area"),
    ],
)
def test_targets_that_are_none(targets: Array, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TASK.check_targets(targets, TensorSpec(name="boxes", dtype="float32", shape=("batch", ROOM, 4)))


def test_answers_list_what_was_found_best_first() -> None:
    (first, second) = TASK.answer(detections([DOG, CAT], []), labels=("background", "cat", "dog"), top=1)
    assert [one["label"] for one in first["detections"]] == ["cat", "dog"]
    assert first["detections"][0]["box"] == [10.0, 10.0, 50.0, 40.0]
    assert second == {"detections": []}


def test_missing_outputs_are_named() -> None:
    with pytest.raises(InputError, match="'labels'"):
        TASK.pair({"boxes": np.zeros((1, 1, 4)), "scores": np.ones((1, 1))}, REFERENCE)


def test_int8_may_move_boxes_that_fp32_may_not() -> None:
    moved = detections([((13.0, 12.0, 53.0, 41.0), 0.88, 1), DOG], [COW])
    strict, loose = errors(moved), errors(moved, precision="int8")
    assert strict.agreement < 1
    assert loose.agreement == 1
    assert shortfalls(replace(loose, sqnr_db=30.0), tolerance_for("detection", "int8")) == []
