from __future__ import annotations

import numpy as np
import pytest

from dlops.errors import UsageError
from dlops.train.data.dataset import Split, assemble, split_off
from dlops.train.data.source import open_data


def numbered(values: list[int], targets: list[int]) -> Split:
    """Tiny images, equal where their values are."""
    return Split(
        raw=tuple(np.full((2, 2), value, np.uint8) for value in values),
        targets=np.array(targets, dtype=np.int64),
        names=tuple(f"image {value}" for value in values),
    )


def values_of(split: Split) -> list[int]:
    return [int(np.asarray(raw)[0, 0]) for raw in split.raw]


def test_digits_are_split_stratified_and_alike_every_time() -> None:
    data, again = open_data("digits", split_seed=0), open_data("digits", split_seed=0)
    assert len(data.train) + len(data.validation) + len(data.test) + data.duplicates_dropped == 1797
    shares = np.bincount(data.test.targets) / (np.bincount(data.test.targets) + np.bincount(data.train.targets))
    assert len(shares) == 10
    assert shares.max() - shares.min() < 0.02
    assert data.digest() == again.digest()
    assert data.digest() != open_data("digits", split_seed=1).digest()
    assert max(int(np.asarray(raw).max()) for raw in data.train.raw) == 255


def test_samples_of_test_are_dropped_from_train_and_counted() -> None:
    train = numbered([*range(100), 7, 8], [0, 1] * 51)
    test = numbered([7, 8, 200], [1, 0, 0])
    data = assemble("some", ["a", "b"], train=train, test=test, split_seed=0)
    assert data.duplicates_dropped == 4
    assert values_of(data.test) == [7, 8, 200]
    assert not {7, 8} & {*values_of(data.train), *values_of(data.validation)}


def test_a_given_validation_split_is_kept_but_for_what_test_holds_too() -> None:
    data = assemble(
        "some",
        ["a", "b"],
        train=numbered([1, 2, 3, 4], [0, 1, 0, 1]),
        validation=numbered([1, 9, 10], [0, 0, 1]),
        test=numbered([9, 11], [0, 1]),
        split_seed=0,
    )
    assert (values_of(data.train), values_of(data.validation), values_of(data.test)) == ([2, 3, 4], [1, 10], [9, 11])
    assert data.duplicates_dropped == 2


def test_a_small_class_gives_one_sample_to_each_split_and_never_its_last() -> None:
    taken, rest = split_off(numbered(list(range(12)), [0] * 10 + [1] * 2), 0.1, seed=0)
    assert np.bincount(taken.targets).tolist() == [1, 1]
    assert np.bincount(rest.targets).tolist() == [9, 1]


def test_one_class_or_too_few_images_of_one_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"1 class \('a'\)"):
        assemble("some", ["a"], train=numbered([1, 2, 3], [0, 0, 0]), split_seed=0)
    with pytest.raises(UsageError, match=r"'b' has 2; at least 3 needed"):
        assemble("some", ["a", "b"], train=numbered([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), split_seed=0)


def test_a_class_that_is_all_duplicates_is_refused() -> None:
    with pytest.raises(UsageError, match=r"after 2 duplicates were dropped: 'b' has 0"):
        assemble(
            "some",
            ["a", "b"],
            train=numbered([1, 2, 3, 4], [0, 0, 1, 1]),
            validation=numbered([5, 6], [0, 1]),
            test=numbered([3, 4], [1, 1]),
            split_seed=0,
        )


def test_an_unknown_name_gets_the_nearest_data_set() -> None:
    with pytest.raises(UsageError, match=r"'digit', and no folder or archive of that name.*did you mean digits"):
        open_data("digit", split_seed=0)
