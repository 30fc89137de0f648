"""Where the pixels of a tensor lie in the picture that it was made of: resizing and cropping, undone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dlops.preprocess import IMAGE_FORMATS, CenterCrop, Preprocess, Raw, Resize, crop_start, resized_size

# Widths and heights change places where a picture is turned by 90 degrees, mirrored or not.
_TURNED = 5
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """A point p of the picture is at p * scale - offset in the tensor, (x, y) both. size: (width, height) of that."""

    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    size: tuple[int, int]

    @classmethod
    def of(cls, preprocess: Preprocess, width: int, height: int) -> Framing:
        """For a picture of that size."""
        (w, h), (sx, sy), (ox, oy) = (width, height), (1.0, 1.0), (0.0, 0.0)
        for step in preprocess.steps:
            if isinstance(step, Resize):
                to_w, to_h = resized_size(step, w, h)
                across, down = to_w / w, to_h / h
                sx, sy, ox, oy = sx * across, sy * down, ox * across, oy * down
                w, h = to_w, to_h
            elif isinstance(step, CenterCrop):
                ox, oy = ox + crop_start(w, step.size[1]), oy + crop_start(h, step.size[0])
                h, w = step.size
        return cls(scale=(sx, sy), offset=(ox, oy), size=(w, h))

    def in_picture(self, box: Sequence[float]) -> list[float]:
        """x1, y1, x2, y2 in the tensor's pixels, in the picture's. Outside it where the tensor was padded."""
        (sx, sy), (ox, oy) = self.scale, self.offset
        x1, y1, x2, y2 = box
        return [(x1 + ox) / sx, (y1 + oy) / sy, (x2 + ox) / sx, (y2 + oy) / sy]

    @property
    def area(self) -> list[float]:
        """The box of the whole tensor in the picture's pixels."""
        return self.in_picture((0, 0, *self.size))


def picture_size(raw: Raw) -> tuple[int, int]:
    """(width, height) of encoded bytes or pixels that `Preprocess` takes, turned as their EXIF tag says."""
    if isinstance(raw, (bytes, bytearray, memoryview)):
        with Image.open(io.BytesIO(bytes(raw)), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # Of TIFF Pillow turns pixels and size by itself.
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) >= _TURNED
        return (height, width) if turned else (width, height)
    rows, columns = np.asarray(raw).shape[:2]
    return columns, rows
