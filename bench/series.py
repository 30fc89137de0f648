"""A timeline as a report keeps it: shares and powers instead of counters, in at most a few hundred points."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dlops.bench.stats import Integers
from dlops.bench.telemetry import Timeline
from dlops.report import TIMES, Telemetry

MOST_POINTS = 300


def recorded(
    timeline: Timeline, *, spans: Mapping[str, tuple[int, int]], key: str
) -> tuple[Telemetry, dict[str, Integers]]:
    """The record, and its arrays under `key` and the names of `Telemetry.series`.

    spans: when each row began and ended, by its key, on the timeline's clock.
    """
    start = (
        int(timeline.times_ns[0]) if len(timeline.times_ns) else min((begin for begin, _ in spans.values()), default=0)
    )
    edges = _edges(timeline)
    series = _series(timeline, edges)
    arrays = {f"{key}.{name}": array for name, array in series.items()}
    if series:
        times = timeline.times_ns[edges]
        arrays[key + TIMES] = (times[:-1] + times[1:]) // 2 - start
    telemetry = Telemetry(
        key=key,
        interval_s=timeline.interval_s,
        samples=len(timeline.times_ns),
        cost=timeline.cost,
        cpus=timeline.cpus,
        gpus=tuple(gpu.name for gpu in timeline.gpus),
        series=tuple(series),
        spans={row: (begin - start, end - start) for row, (begin, end) in spans.items()},
        absent=dict(timeline.absent),
    )
    return telemetry, arrays


def _edges(timeline: Timeline) -> Integers:
    """The samples between which the points lie."""
    samples = len(timeline.times_ns)
    if samples < 2:
        return np.zeros(min(samples, 1), np.int64)
    step = math.ceil((samples - 1) / MOST_POINTS)
    edges = np.unique(np.append(np.arange(0, samples, step), samples - 1)).astype(np.int64)
    # The last sample comes when the run ends: a clock tick over so short a stretch would be a share of many times one.
    if len(edges) > 2 and np.ptp(timeline.times_ns[edges[-2:]]) < timeline.interval_s * 1e9 / 2:
        edges = np.delete(edges, -2)
    return edges


def _series(timeline: Timeline, edges: Integers) -> dict[str, Integers]:
    if len(edges) < 2:
        return {}
    seconds = np.diff(timeline.times_ns[edges]) / 1e9
    found: dict[str, Integers] = {}

    def growth(name: str) -> np.ndarray:
        return np.diff(timeline.values[name][edges])

    if "busy_ticks" in timeline.values:
        ticks = timeline.cpus * timeline.ticks_a_second * seconds
        busy, ours, steal = (growth(f"{name}_ticks") for name in ("busy", "ours", "steal"))
        other = np.maximum(0, busy - ours) + steal
        shares = {"ours": ours, "other": other, "steal": steal}
        found |= {f"cpu_{name}_ppm": _whole(share / ticks * 1e6) for name, share in shares.items()}
    for name, values in timeline.values.items():
        if (values < 0).any() or name.endswith("_ticks"):
            continue
        if name.endswith("_energy_uj"):
            # NVML gives a GPU's power itself.
            power = name.removesuffix("_energy_uj") + "_power_mw"
            if power not in timeline.values:
                found[power] = _whole(growth(name) / 1e3 / seconds)
        elif name.endswith("_stall_us"):
            found[name.removesuffix("us") + "ppm"] = _whole(growth(name) / seconds)
        elif name.endswith("_count"):
            found[name] = _whole(growth(name))
        elif name.endswith("_bits"):
            found[name] = np.bitwise_or.reduceat(values[1:], edges[:-1]).astype(np.int64)
        else:
            sums = np.add.reduceat(values[1:], edges[:-1])
            found[name] = _whole(sums / np.diff(edges))
    return found


def _whole(values: np.ndarray) -> Integers:
    return np.round(values).astype(np.int64)
