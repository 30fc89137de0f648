"""How far the range of each activation goes, from what calibration samples give: minmax, entropy or percentile.

ONNX Runtime's own histograms begin with the range of the first batch: entropy then has nothing to choose from unless
later batches go further, and takes minutes where one goes much further. So the range is known here before the
histograms are filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCalibrater, MinMaxCalibrater, TensorsData

from dlops.export.formats import Calibration
from dlops.signature import Array, Feed

# Of the absolute values of an activation; what lies beyond is clipped.
PERCENTILE = 99.999
_BATCH = 32
_BINS = 2048
# Thresholds tried for entropy lie so many bins apart: 0.4 % of the largest value.
_STEP = 8

Range = tuple[NDArray[np.float32], NDArray[np.float32]]


def activation_ranges(
    model: Path, samples: Feed, *, method: Calibration, operators: list[str], folder: Path
) -> TensorsData:
    """By tensor, the smallest and largest value that is to be told apart.

    operators: those whose inputs and outputs count. minmax: the smallest and largest value seen. entropy: cut off where
    the values that are left, in as many levels as int8 has, resemble all of them most (least Kullback-Leibler
    divergence; Migacz 2017). percentile: cut off at the PERCENTILE of the absolute values. Every sample counts once.
    """
    extremes = MinMaxCalibrater(model, operators, augmented_model_path=str(folder / "extremes.onnx"))
    _open(extremes)
    for feed in _batches(samples):
        # One at a time, and merged: all of them at once would be kept until the end.
        extremes.collect_data(_Once(feed))
    seen: dict[str, Range] = {name: data.range_value for name, data in extremes.compute_data().items()}
    if method == "minmax":
        chosen = seen
    else:
        histograms = _histograms(model, samples, seen, operators, folder)
        chosen = {name: cut(seen[name], histograms[name], method=method) for name in seen}
    return TensorsData(CalibrationMethod.MinMax, chosen)


def cut(seen: Range, histogram: NDArray[np.int64], *, method: Calibration) -> Range:
    """The range after the absolute values above a threshold are given up.

    histogram: (bins,) counts of absolute values, even from zero to the largest. A side that ends before the threshold
    stays where it is.
    """
    low, high = (float(np.asarray(end).item()) for end in seen)
    largest = max(abs(low), abs(high))
    if not histogram.sum() or largest == 0:
        return seen
    # Both signs share the levels.
    kept = _percentile_bins(histogram) if method == "percentile" else _entropy_bins(histogram, 128 if low < 0 else 256)
    threshold = largest * kept / len(histogram)
    return np.array(max(low, -threshold), np.float32), np.array(min(high, threshold), np.float32)


def _percentile_bins(histogram: NDArray[np.int64]) -> int:
    total = np.cumsum(histogram)
    return int(np.searchsorted(total, total[-1] * PERCENTILE / 100)) + 1


def _entropy_bins(histogram: NDArray[np.int64], levels: int) -> int:
    counts = histogram.astype(np.float64)
    # Zeros cost nothing at any scale: a network after ReLU would be all of them.
    counts[0] = 0
    candidates = range(levels, len(counts) + 1, _STEP)
    return min(candidates, key=lambda kept: _divergence(counts, kept, levels), default=len(counts))


def _divergence(counts: NDArray[np.float64], kept: int, levels: int) -> float:
    """Of all values, those beyond `kept` bins moved to the last of them, from those kept in `levels` even levels."""
    clipped = counts[:kept].copy()
    clipped[-1] += counts[kept:].sum()
    if not clipped.sum():
        return float("inf")
    starts = np.arange(levels) * kept // levels
    level = np.repeat(np.arange(levels), np.diff(np.append(starts, kept)))
    filled = counts[:kept] > 0
    sizes = np.add.reduceat(filled.astype(np.float64), starts)
    spread = np.add.reduceat(counts[:kept], starts) / np.maximum(sizes, 1)
    coarse = np.where(filled, spread[level], 0)
    p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1)
    there = p > 0
    # What the levels have no room for is not infinitely bad.
    return float((p[there] * np.log(p[there] / np.maximum(q[there], 1e-9))).sum())


def _histograms(
    model: Path, samples: Feed, seen: dict[str, Range], operators: list[str], folder: Path
) -> dict[str, NDArray[np.int64]]:
    probe = HistogramCalibrater(model, operators, augmented_model_path=str(folder / "activations.onnx"))
    _open(probe)
    names = [output.name for output in probe.infer_session.get_outputs()]
    found = {name: np.zeros(_BINS, np.int64) for name in seen}
    for feed in _batches(samples):
        for name, values in zip(names, probe.infer_session.run(None, feed), strict=True):
            if name in found:
                largest = max(abs(np.asarray(end).item()) for end in seen[name])
                found[name] += np.histogram(np.abs(values), _BINS, range=(0, largest or 1))[0]
    return found


def _open(calibrater: Any) -> None:
    calibrater.augment_graph()
    calibrater.create_inference_session()


def _batches(samples: Feed) -> Iterator[dict[str, Array]]:
    for start in range(0, len(next(iter(samples.values()))), _BATCH):
        yield {name: array[start : start + _BATCH] for name, array in samples.items()}


class _Once(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feed: dict[str, Array]) -> None:
        self._left = [feed]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None
