"""Numbers: how much of the targets' deviation is explained, and which of them stay."""

from __future__ import annotations

import numpy as np
import pytest

from dlops.errors import InputError
from dlops.parity import compare
from dlops.signature import Array, TensorSpec
from dlops.tasks import open_task

TASK = open_task("regression")
TARGETS = np.array([[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]], np.float32)


def test_exact_scores_1_and_the_mean_scores_0() -> None:
    assert TASK.score({"values": TARGETS}, TARGETS).tolist() == [1.0, 1.0, 1.0]
    mean = np.broadcast_to(TARGETS.mean(axis=0), TARGETS.shape)
    # The middle sample is the mean; the others are as far off as can count.
    assert TASK.score({"values": mean}, TARGETS).tolist() == [0.0, 1.0, 0.0]


def test_a_value_stays_within_a_twentieth_of_the_deviation() -> None:
    step = 0.05 * float(TARGETS.std())
    outputs = TARGETS.copy()
    outputs[0, 0] += 0.9 * step
    outputs[1, 0] += 1.5 * step
    found = compare({"values": TARGETS}, {"values": outputs}, task=TASK)
    assert (found.agreement, found.decisions) == (pytest.approx(5 / 6), 6)


@pytest.mark.parametrize(
    ("targets", "said"),
    [(np.zeros(3), "of the shape of"), (np.zeros((3, 5)), "is ['batch', 2]"), (np.full((3, 2), np.nan), "NaN")],
)
def test_targets_that_are_none(targets: Array, said: str) -> None:
    with pytest.raises(InputError) as refused:
        TASK.check_targets(targets, TensorSpec(name="values", dtype="float32", shape=("batch", 2)))
    assert said in str(refused.value)


def test_answers_are_named_where_there_are_names() -> None:
    assert TASK.answer({"values": TARGETS[:1]}, labels=("x", "y"), top=5) == [{"values": {"x": 0.0, "y": 2.0}}]
    assert TASK.answer({"values": TARGETS[:1]}, labels=(), top=5) == [{"values": [0.0, 2.0]}]
