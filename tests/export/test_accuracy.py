from __future__ import annotations

import numpy as np
import pytest

from dlops.errors import GateError
from dlops.export.accuracy import check_drop, measure_accuracy, paired_interval
from dlops.tasks import open_task

TASK = open_task("classification")


def one_hot(labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"logits": np.eye(10, dtype=np.float32)[labels]}


def test_the_drop_is_paired_and_in_percentage_points() -> None:
    targets = np.arange(200) % 10
    dense, other = targets.copy(), targets.copy()
    dense[:4] += 1  # wrong on 4 of 200
    other[2:12] = (other[2:12] + 1) % 10  # wrong on 10, 2 of them the same and with the same answer
    found = measure_accuracy(one_hot(dense % 10), one_hot(other), targets, task=TASK, max_drop=1.0, strict=False)
    assert found.reference == pytest.approx(0.98)
    assert found.value == pytest.approx(0.95)
    assert found.drop_points == pytest.approx(3.0)
    assert found.flips == 2 + 8
    assert found.drop_low < 3.0 < found.drop_high
    with pytest.raises(GateError, match=r"3\.00 points lost"):
        check_drop(found, title="it")


def test_the_point_estimate_may_equal_the_bound() -> None:
    targets = np.arange(300) % 10
    other = targets.copy()
    other[:3] = (other[:3] + 1) % 10
    check_drop(
        measure_accuracy(one_hot(targets), one_hot(other), targets, task=TASK, max_drop=1.0, strict=False), title=""
    )
    with pytest.raises(GateError, match="upper end"):
        check_drop(
            measure_accuracy(one_hot(targets), one_hot(other), targets, task=TASK, max_drop=1.0, strict=True), title=""
        )


def test_no_difference_among_few_samples_is_not_certainty() -> None:
    low, high = paired_interval(np.zeros(20))
    assert low < -0.05
    assert high > 0.05
    low, high = paired_interval(np.zeros(20_000))
    assert -1e-3 < low < 0 < high < 1e-3


def test_the_interval_covers_the_true_drop_in_about_95_of_100() -> None:
    rng = np.random.default_rng(0)
    draws = rng.choice([-1.0, 0.0, 1.0], p=[0.01, 0.96, 0.03], size=(2000, 400))
    intervals = [paired_interval(row) for row in draws]
    covered = np.mean([low <= 0.02 <= high for low, high in intervals])
    assert 0.935 <= covered <= 0.98
