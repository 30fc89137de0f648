"""How much less a run says because what is near in time is alike: pure functions over what its blocks add to a sum."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# A run is cut into this many stretches of equal time; more turns than these are joined.
STRETCHES = 30
# Beyond this the estimate of how neighbouring blocks resemble one another says nothing more.
_MOST_ALIKE = 0.9

Floats = NDArray[np.float64]


def joined(deviations: Floats) -> Floats:
    """Sums over neighbours, of as many each as leave at most 30: slow spells last many turns."""
    size = math.ceil(len(deviations) / STRETCHES)
    return np.add.reduceat(deviations, np.arange(0, len(deviations), size))


def resemblance(blocks: Floats) -> tuple[float, float]:
    """The correlation of each block with the one before it, and what it multiplies the variance of their sum by.

    As if each followed the one before it (an autoregression of order 1), never the other way. The estimate of such a
    correlation r is (1 + 4r)/n too low on average (Marriott and Pope 1954).
    """
    squares = float(np.sum(blocks**2))
    if squares == 0:
        return 0.0, 1.0
    seen = float(np.sum(blocks[1:] * blocks[:-1])) / squares
    alike = min(_MOST_ALIKE, max(0.0, seen + (1 + 4 * max(0.0, seen)) / len(blocks)))
    return seen, (1 + alike) / (1 - alike)


def effective_pairs(ratios: Floats) -> int:
    """How many independent ones the ratios of pairs in order are worth, by their ranks."""
    ordered = np.sort(ratios)
    # Equal ones share a rank.
    ranks = np.searchsorted(ordered, ratios, "left") + np.searchsorted(ordered, ratios, "right")
    deviations = np.asarray(ranks - ranks.mean(), np.float64)
    squares = float(np.sum(deviations**2))
    if squares == 0:
        return len(ratios)
    blocks = joined(deviations)
    effect = float(np.sum(blocks**2)) / squares * resemblance(blocks)[1]
    return math.floor(len(ratios) / max(1.0, effect))
