"""Pillow's resizing of 8-bit images as matrices, for a size that is known beforehand: the same pixels, bit for bit.

Pillow resamples lines and then columns, each with weights in fixed point, and rounds to whole numbers after either.
ONNX's Resize antialiases too, but with other weights at the edges and no rounding between, so it gives other pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]
# Weights are whole numbers of 2^-22: 32 bits without 8 of a pixel and 2 for sums above the range.
FIXED_POINT = 2**22
_A = -0.5


def taken_pixels(source: int, target: int) -> NDArray[np.int64]:
    """(target,): which pixel of a line of `source` the nearest-neighbour filter takes, by asking it."""
    ramp = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    taken: NDArray[np.int64] = np.array(ramp.resize((target, 1), Image.Resampling.NEAREST), np.int64)[0]
    return taken


def resampling_weights(source: int, target: int, interpolation: Literal["bilinear", "bicubic"]) -> NDArray[np.float64]:
    """(target, source) weights, whole numbers of 1 / FIXED_POINT, of one line resized to `target` pixels.

    As precompute_coeffs and normalize_coeffs_8bpc of Pillow's src/libImaging/Resample.c compute them.
    """
    kernel, reach = _KERNELS[interpolation]
    scale = source / target
    stretch = max(scale, 1.0)
    support = reach * stretch
    weights = np.zeros((target, source))
    for place in range(target):
        center = (place + 0.5) * scale
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), source)
        line = [kernel((pixel - center + 0.5) * (1.0 / stretch)) for pixel in range(first, last)]
        # One after the other, as Pillow adds them: the last bit may decide how a weight is rounded.
        total = sum(line)
        weights[place, first:last] = [weight / total for weight in line] if total else line
    return np.trunc(weights * FIXED_POINT + np.where(weights < 0, -0.5, 0.5))


def _bilinear(x: float) -> float:
    return max(1.0 - abs(x), 0.0)


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return ((_A + 2) * x - (_A + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * _A if x < 2 else 0.0


_KERNELS: dict[str, tuple[Callable[[float], float], float]] = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}
