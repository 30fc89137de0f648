from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dlops.errors import InputError
from dlops.tasks import open_task

TASK = open_task("generation")


def pictures_in(outputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    answers = TASK.answer(outputs, labels=(), top=5)
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["image"])))) for one in answers]
    assert [one["size"] for one in answers] == [list(one.shape[:2]) for one in found]
    return found


def test_floats_are_shares_of_white_and_what_is_beyond_is_cut_off() -> None:
    values = np.array([-3, 0, 0.1, 0.5, 1, 7], np.float32).reshape(1, 1, 2, 3)
    (found,) = pictures_in({"image": values})
    assert found.tolist() == [[0, 0, 26], [128, 255, 255]]


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_are_pixels(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, channels, 4, 5)).astype(np.uint8)
    for sent, found in zip(pixels, pictures_in({"image": pixels}), strict=True):
        np.testing.assert_array_equal(found.reshape(4, 5, channels), sent.transpose(1, 2, 0))


def test_pictures_are_compared_and_scored_as_numbers() -> None:
    reference = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)
    pair = TASK.pair({"image": reference}, {"image": reference + 0.001})
    assert pair.agreement.tolist() == [1, 1, 1]
    assert TASK.pair({"image": reference}, {"image": 1 - reference}).agreement.max() < 0.3
    np.testing.assert_array_equal(TASK.score({"image": reference}, reference), 1)


@pytest.mark.parametrize(
    "values",
    [np.zeros((2, 10), np.float32), np.zeros((2, 2, 8, 8), np.float32), np.zeros((2, 3, 8, 8), np.int64)],
    ids=["a row", "two channels", "integers"],
)
def test_what_is_no_picture_is_refused(values: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"image: .* generation gives pictures"):
        TASK.pair({"image": values}, {"image": values})
