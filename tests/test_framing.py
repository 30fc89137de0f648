"""What lies in a tensor is found again in the picture that it was made of."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dlops.framing import Framing, picture_size
from dlops.preprocess import CenterCrop, Decode, Preprocess, Resize, Scale, Step

SIDE = 32


def preprocess(*steps: Step) -> Preprocess:
    return Preprocess(input="image", shape=(1, SIDE, SIDE), steps=(Decode(mode="L"), *steps, Scale()))


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        ((), (SIDE, SIDE)),
        ((Resize(size=(SIDE, SIDE)),), (200, 90)),
        ((Resize(size=SIDE), CenterCrop(size=(SIDE, SIDE))), (200, 90)),
        ((Resize(size=SIDE), CenterCrop(size=(SIDE, SIDE))), (61, 143)),
        ((Resize(size=48), CenterCrop(size=(SIDE, SIDE))), (160, 120)),
        ((CenterCrop(size=(80, 80)), Resize(size=SIDE)), (131, 97)),
        # Padded: the tensor shows more than there is.
        ((CenterCrop(size=(SIDE, SIDE)),), (24, 20)),
    ],
    ids=str,
)
def test_a_bright_square_is_where_it_was(steps: tuple[Step, ...], size: tuple[int, int]) -> None:
    width, height = size
    half = min(width, height) // 5
    left, top, right, bottom = width // 2 - half, height // 2 - half, width // 2 + half, height // 2 + half // 2
    pixels = np.zeros((height, width), np.uint8)
    pixels[top:bottom, left:right] = 255
    recipe = preprocess(*steps)
    bright = recipe.apply(pixels)[0] > 0.5
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    framing = Framing.of(recipe, width, height)
    assert framing.size == (SIDE, SIDE)
    found = framing.in_picture((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    # To a pixel of the tensor, as large as it is in the picture.
    coarse = max(1.0, *(1 / scale for scale in framing.scale))
    np.testing.assert_allclose(found, (left, top, right, bottom), atol=coarse)
    area = framing.area
    # Its middle is the picture's, to half a pixel, as both are cut or stretched about it.
    assert (area[0] + area[2]) / 2 == pytest.approx(width / 2, abs=coarse)
    assert (area[1] + area[3]) / 2 == pytest.approx(height / 2, abs=coarse)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (40, 20)), (3, (40, 20)), (6, (20, 40)), (8, (20, 40))])
def test_a_picture_has_the_size_that_it_is_decoded_to(kind: str, orientation: int, size: tuple[int, int]) -> None:
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format=kind, exif=exif)
    assert picture_size(buffer.getvalue()) == size
    channels_first = Preprocess(input="image", shape=(3, size[1], size[0]), steps=(Decode(), Scale()))
    assert channels_first.apply(buffer.getvalue()).shape == (3, size[1], size[0])


def test_pixels_have_the_size_that_they_are() -> None:
    assert picture_size(np.zeros((5, 7, 3), np.uint8)) == (7, 5)
    assert picture_size([[0, 1, 2], [3, 4, 5]]) == (3, 2)
