"""How much of the machine's measured peaks a row reaches, and of which rows that cannot be said.

Calls that run at once on a CPU have threads of their own each: their row is held against a peak with as many in all.
"""

from __future__ import annotations

from collections.abc import Sequence

from dlops.report import Measurement, Peaks

# The peak that a precision is held against: products of float32 run in TF32 on a GPU unless told otherwise.
_GPU_KINDS = {"fp32": "tf32", "fp16": "fp16"}


def shared(row: Measurement, peaks: Peaks | None) -> Measurement:
    """The row with its shares of the peak FLOP/s and of the bandwidth, where they are known."""
    if peaks is None or row.boundary == "network":
        return row
    calls = row.throughput.value / row.load.batch
    update = {}
    peak, bandwidth = _peak(row, peaks), _bandwidth(row, peaks)
    if row.macs is not None and not isinstance(peak, str):
        update["peak_share"] = 2 * row.macs * calls / peak
    if row.moved_bytes is not None and bandwidth is not None:
        update["bandwidth_share"] = row.moved_bytes * calls / bandwidth
    return row.model_copy(update=update)


def unshared(rows: Sequence[Measurement], peaks: Peaks | None) -> list[str]:
    """Why rows in process have no share, a sentence for each reason."""
    if peaks is None:
        return []
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.boundary != "network" and row.peak_share is None:
            peak = _peak(row, peaks)
            why = peak if isinstance(peak, str) else f"its MACs are not known: {row.uncounted or 'an older dlops'}"
            reasons.setdefault(why, {})[row.label] = None
    return [f"no share of the peak FLOP/s for {', '.join(names)}: {why}" for why, names in reasons.items()]


def _peak(row: Measurement, peaks: Peaks) -> float | str:
    """FLOP/s, or why there are none to hold the row against."""
    if row.device.startswith("cuda"):
        number = int(row.device.partition(":")[2] or 0)
        kind = _GPU_KINDS.get(row.precision)
        if kind is None or number >= len(peaks.gpus):
            return f"no peak of {row.precision} on {row.device} was measured"
        return peaks.gpus[number].flops[kind]
    if row.precision != "fp32":
        return f"the peak is of fp32, not of {row.precision}"
    found = next((one.flops for one in peaks.cpu if one.threads == _threads(row)), None)
    return f"no peak with {_threads(row)} threads was measured" if found is None else found


def _bandwidth(row: Measurement, peaks: Peaks) -> float | None:
    """Bytes a second of a copy, read and written, with as many threads or on that GPU."""
    if row.device.startswith("cuda"):
        number = int(row.device.partition(":")[2] or 0)
        return peaks.gpus[number].bytes_per_s if number < len(peaks.gpus) else None
    return next((one.bytes_per_s for one in peaks.cpu if one.threads == _threads(row)), None)


def _threads(row: Measurement) -> int | None:
    """Of all calls that run at once; None where the row does not say."""
    return None if row.threads is None else row.threads * row.load.concurrency
