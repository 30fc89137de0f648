"""Latency against load as SVG: over the rates offered, and over the throughput of calls kept in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dlops.bench import cells
from dlops.bench.knee import knee
from dlops.bench.plots import Series, dot
from dlops.bench.plots_frame import (
    Frame,
    line_between,
    log_scale,
    log_ticks,
    make_frame,
    svg_of,
    text_at,
    tick_limit,
    x_grid,
    y_grid,
)
from dlops.bench.plots_labels import text_width
from dlops.report import Interval, Objective

# Two loads of one service make a line.
_FEWEST = 2


@dataclass(frozen=True, slots=True)
class _Point:
    """A quantile of one row. load: where it lies on the x axis."""

    one: Series
    kind: str
    load: Interval
    time: Interval


def at_rates(series: Sequence[Series]) -> list[Series]:
    """The rows under a rate that have a certified quantile, which latency_against_rate draws."""
    return [one for one in series if one.row.load.rate is not None and _times(one)]


def not_drawn(series: Sequence[Series]) -> list[Series]:
    """The rows under a rate that have none."""
    return [one for one in series if one.row.load.rate is not None and not _times(one)]


def in_flight(series: Sequence[Series]) -> list[Series]:
    """The rows with calls kept in flight that have a certified quantile, of the services with two or more of them."""
    rows = [
        one for one in series
        if one.row.boundary == "network" and one.row.load.rate is None and one.row.throughput.value > 0 and _times(one)
    ]  # fmt: skip
    models = [cells.model(one.row) for one in rows]
    return [one for one, model in zip(rows, models, strict=True) if models.count(model) >= _FEWEST]


def latency_against_rate(series: Sequence[Series], width: int, objectives: Sequence[Objective] = ()) -> str:
    """p50 (whole line) and p99 (broken) of the response time over the rate offered, both axes logarithmic.

    A level line is an objective's limit, an upright one the highest rate that kept it. series: at least one of
    at_rates.
    """
    points = [
        _Point(one, kind, Interval(value=one.row.load.rate or 0.0, low=None, high=None), time)
        for one in at_rates(series)
        for kind, time in _times(one).items()
    ]
    return _draw(points, width, "requests offered a second (log scale)", objectives, "Response time against rate")


def latency_against_throughput(series: Sequence[Series], width: int) -> str:
    """p50 (whole line) and p99 (broken) over the throughput, both axes logarithmic: a point for each number in flight.

    series: at least one of in_flight.
    """
    points = [
        _Point(one, kind, one.row.throughput, time) for one in in_flight(series) for kind, time in _times(one).items()
    ]
    return _draw(points, width, "items answered a second (log scale)", (), "Latency against throughput")


def knees(series: Sequence[Series]) -> dict[str, Series]:
    """The knee of every service that has one, by its name. series: under rates, or with calls in flight."""
    found = {}
    for model in dict.fromkeys(cells.model(one.row) for one in series):
        rows = {id(one.row): one for one in _by_load(series) if cells.model(one.row) == model}
        best = knee([one.row for one in rows.values()])
        if best is not None:
            found[model] = rows[id(best)]
    return found


def _draw(points: Sequence[_Point], width: int, axis: str, objectives: Sequence[Objective], title: str) -> str:
    limits_ms = [one.limit_ns / 1e6 for one in objectives]
    times = [end / 1e6 for point in points for end in _ends(point.time)] or [1.0]
    # A limit far from all that was measured is not worth squeezing it for.
    shown = [one for one, ms in zip(objectives, limits_ms, strict=True) if min(times) / 10 <= ms <= max(times) * 10]
    times += [one.limit_ns / 1e6 for one in shown]
    loads = [end for point in points for end in _ends(point.load)]
    y_range = (math.log10(min(times) / 1.2), math.log10(max(times) * 1.2))
    least, most = min(loads) / 1.15, max(loads) * 1.15
    frame = make_frame(340, width, x=log_scale(least, most), y_range=y_range)
    parts = y_grid(
        frame, [math.log10(tick) for tick in log_ticks(10 ** y_range[0], 10 ** y_range[1], 7)],
        lambda tick: f"{10**tick:,.0f} ms" if tick >= 2 else f"{10**tick:.3g} ms",
    )  # fmt: skip
    parts += x_grid(frame, log_ticks(least, most, tick_limit(frame)), axis)
    for objective in shown:
        parts += _objective(frame, objective)
    parts += _knees(frame, points)
    parts += _lines(frame, points)
    for point in points:
        x, y = frame.x(point.load.value), _y(frame, point.time.value)
        if point.time.low is not None and point.time.high is not None:
            ends = (_y(frame, end) for end in (point.time.low, point.time.high))
            parts.append(line_between(x, next(ends), x, next(ends), f"bar {point.one.look}"))
        if point.load.low is not None and point.load.high is not None:
            low, high = frame.x(point.load.low), frame.x(point.load.high)
            parts.append(line_between(low, y, high, y, f"bar {point.one.look}"))
        said = f"{point.one.name}: {point.kind} {cells.milliseconds(point.time)} ms"
        parts.append(dot(x, y, point.one, said))
    return svg_of(frame, parts, title)


def _lines(frame: Frame, points: Sequence[_Point]) -> list[str]:
    parts = []
    for model in dict.fromkeys(cells.model(point.one.row) for point in points):
        own = [point for point in points if cells.model(point.one.row) == model]
        for kind in ("p50", "p99"):
            line = [point for point in own if point.kind == kind]
            line.sort(key=lambda point: (point.one.row.load.rate or 0.0, point.one.row.load.concurrency))
            path = " ".join(f"{frame.x(one.load.value):.1f},{_y(frame, one.time.value):.1f}" for one in line)
            broken = " again" if kind == "p99" else ""
            parts.append(f'<polyline class="curve {own[0].one.look}{broken}" points="{path}"/>')
    return parts


def _objective(frame: Frame, objective: Objective) -> list[str]:
    right, bottom = frame.width - frame.right, frame.height - frame.bottom
    y = _y(frame, objective.limit_ns)
    said = f"{objective.quantile} ≤ {cells.significant(objective.limit_ns / 1e6)} ms"
    parts = [
        line_between(frame.left, y, right, y, "limit"), text_at("limit-name", frame.left + 6, y - 5, said),
    ]  # fmt: skip
    if objective.rate is None:
        return parts
    x = frame.x(objective.rate)
    if frame.left <= x <= right:
        kept = f"kept {'at least ' if objective.stopped else ''}to {objective.rate:,.5g} a second"
        anchor = "end" if x + text_width(kept) + 6 > right else "start"
        parts.append(line_between(x, y, x, bottom, "limit"))
        parts.append(text_at("limit-name", x + (-6 if anchor == "end" else 6), bottom - 6, kept, anchor=anchor))
    return parts


def _knees(frame: Frame, points: Sequence[_Point]) -> list[str]:
    parts = []
    series = list({id(point.one): point.one for point in points}.values())
    for one in knees(series).values():
        load = next(point.load.value for point in points if point.one is one)
        x = frame.x(load)
        parts.append(line_between(x, frame.top, x, frame.height - frame.bottom, "knee"))
        parts.append(text_at("limit-name", x + 6, frame.top + 12, f"knee: {load:,.5g}"))
    return parts


def _by_load(series: Sequence[Series]) -> list[Series]:
    return sorted(series, key=lambda one: (one.row.load.rate or 0.0, one.row.load.concurrency))


def _times(one: Series) -> dict[str, Interval]:
    """The certified quantiles that are drawn."""
    found = {"p50": one.row.latency.p50_ns, "p99": one.row.latency.p99_ns}
    return {kind: interval for kind, interval in found.items() if interval is not None}


def _ends(interval: Interval) -> list[float]:
    return [end for end in (interval.low, interval.value, interval.high) if end]


def _y(frame: Frame, ns: float) -> float:
    """Nothing at all has no logarithm: it is placed where the axis begins."""
    bottom = frame.height - frame.bottom
    return min(bottom, frame.y(math.log10(ns / 1e6))) if ns > 0 else bottom
