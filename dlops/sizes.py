"""Inputs at other sizes than those of the samples: where a model leaves a dim open, every size in its range must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dlops.signature import Array, DimRange, Feed, Signature, TensorSpec

# Of the sizes between the ends, about this share of the way up, odd where it may be.
_BETWEEN = 0.3


def resized(feed: Feed, specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Array]:
    """The feed with each axis of a named dim cut to its size, or continued from its beginning; the batch as it is."""
    changed = {}
    for spec in specs:
        array = feed[spec.name]
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim in sizes and axis > 0 and array.shape[axis] != sizes[dim]:
                array = np.take(array, np.arange(sizes[dim]) % array.shape[axis], axis=axis)
        changed[spec.name] = array
    return changed


def sizes_of(feed: Feed, specs: Sequence[TensorSpec]) -> dict[str, int]:
    """The size of every named dim in a feed, the batch left out."""
    return {
        dim: size
        for spec in specs
        for dim, size in zip(spec.shape[1:], feed[spec.name].shape[1:], strict=True)
        if isinstance(dim, str)
    }


def open_dims(signature: Signature) -> list[str]:
    """The named dims of the inputs that may take several sizes, the batch left out."""
    names = dict.fromkeys(dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str))
    return [name for name in names if name != "batch" and signature.is_free(name)]


def other_sizes(limits: DimRange) -> tuple[int, ...]:
    """The ends of the range and one between, an odd one where the steps allow it."""
    steps = (limits.max - limits.min) // limits.step
    between = limits.min + round(steps * _BETWEEN) * limits.step
    if between % 2 == 0 and between + limits.step < limits.max:
        between += limits.step
    return tuple(sorted({limits.min, between, limits.max}))


def example_size(limits: DimRange) -> int:
    """A size to capture a graph with: exporters take 1 for a constant, and so they may a size of the network."""
    return limits.min if limits.min > 1 or limits.min == limits.max else limits.min + limits.step
