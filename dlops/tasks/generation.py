"""Pictures: what a decoder, a super-resolution or a style network gives."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dlops.errors import InputError
from dlops.signature import Array, Feed
from dlops.tasks import SAME_BOX_IOU, Pair
from dlops.tasks.regression import Regression

_CHANNELS = (1, 3)


class Generation(Regression):
    """The first output holds pictures, (n, 1 or 3, height, width): uint8, or floats from 0 to 1.

    They are scored and compared as the numbers that they are.
    """

    name = "generation"

    def pair(self, reference: Feed, outputs: Feed, *, min_iou: float = SAME_BOX_IOU) -> Pair:
        _check(reference)
        return super().pair(reference, outputs, min_iou=min_iou)

    def answer(self, outputs: Feed, *, labels: Sequence[str], top: int = 5) -> list[dict[str, Any]]:
        """`{"size": [height, width], "image": str}` a sample: a PNG in base64. Values beyond 0 and 1 are cut off."""
        return [
            {"size": list(picture.shape[-2:]), "image": base64.b64encode(_png(picture)).decode()}
            for picture in _check(outputs)
        ]


def _check(outputs: Feed) -> Array:
    name, pictures = next(iter(outputs.items()))
    if pictures.ndim != 4 or pictures.shape[1] not in _CHANNELS or pictures.dtype.kind not in "fu":
        raise InputError(
            f"{name}: {pictures.dtype.name}{list(pictures.shape)}, generation gives pictures",
            field=name, hint="[samples, 1 or 3, height, width], floats from 0 to 1 or uint8",
        )  # fmt: skip
    return pictures


def _png(picture: Array) -> bytes:
    if picture.dtype != np.uint8:
        picture = np.rint(np.clip(np.asarray(picture, np.float32), 0, 1) * 255).astype(np.uint8)
    pixels = picture[0] if len(picture) == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
