"""The plots of a report as SVG text. Colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from dlops.bench import cells
from dlops.bench.plots_frame import (
    WIDE,
    Frame,
    line_between,
    linear_ticks,
    log_scale,
    log_ticks,
    make_frame,
    percent_of,
    svg_of,
    text_at,
    tick_limit,
    x_grid,
    y_grid,
)
from dlops.bench.plots_labels import Box, Label, Point, Segment, place_labels, shorten, text_width
from dlops.bench.stats import proportion_interval
from dlops.report import Interval, Measurement

SERIES_COLOURS = 8
# Where the curves have points: evenly, and ever closer towards the slowest call, which is one of them.
_SHARES = np.concatenate([np.linspace(0, 0.98, 120), 1 - 0.02 * np.geomspace(1, 1e-3, 40)[1:], [1.0]])
# Where a logarithmic axis of latencies begins at the least, in ms: a coarse clock may show none at all.
_LEAST_MS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One row with its number on the page and its raw latencies."""

    row: Measurement
    number: int
    latencies_ns: NDArray[np.int64]

    @property
    def name(self) -> str:
        return cells.name(self.row)

    @property
    def look(self) -> str:
        """Classes of the style sheet: a colour, and a broken line where the colours begin again."""
        return f"s{self.number % SERIES_COLOURS}" + (" again" if self.number >= SERIES_COLOURS else "")


def latency_curves(series: Sequence[Series], width: int) -> str:
    """Share of calls that were at least as fast, against latency on a log axis; a dot with its interval at p50."""
    low = min(float(one.latencies_ns.min()) for one in series) * 0.95 / 1e6
    high = max(float(one.latencies_ns.max()) for one in series) * 1.05 / 1e6
    low, high = max(low, _LEAST_MS), max(high, 2 * _LEAST_MS)
    frame = make_frame(320, width, x=log_scale(low, high), y_range=(0.0, 1.0))
    parts = [*y_grid(frame, [0, 0.25, 0.5, 0.75, 1], lambda share: f"{share:.0%}")]
    parts += x_grid(frame, log_ticks(low, high, tick_limit(frame)), "latency of a call, ms (log scale)")
    for one in series:
        points = np.maximum(np.quantile(one.latencies_ns, _SHARES) / 1e6, low)
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(points, _SHARES, strict=True))
        parts.append(f'<polyline class="curve {one.look}" points="{path}"><title>{escape(one.name)}</title></polyline>')
    for one in series:
        median = one.row.latency.p50_ns
        if median is not None:
            parts += _error_bar(frame, median, 0.5, one)
            label = f"{one.name}: median {cells.milliseconds(median)} ms"
            parts.append(dot(frame.x(median.value / 1e6), frame.y(0.5), one, label))
    return svg_of(frame, parts, "Latency distributions")


def comparable(series: Sequence[Series]) -> list[Series]:
    """Those with a certified median and a known accuracy, which accuracy_against_latency draws."""
    return [one for one in series if one.row.latency.p50_ns is not None and one.row.accuracy is not None]


def pareto_front(series: Sequence[Series]) -> list[Series]:
    """Of the comparable, those that no other beats in both: from the fastest to the most accurate."""
    front: list[Series] = []
    for one in sorted(comparable(series), key=lambda one: (_median(one).value, -(one.row.accuracy or 0.0))):
        if not front or (one.row.accuracy or 0.0) > (front[-1].row.accuracy or 0.0):
            front.append(one)
    return front


def accuracy_against_latency(series: Sequence[Series], width: int) -> str:
    """Accuracy over median latency with both intervals, for the comparable; the Pareto front where it has two ends."""
    series = comparable(series)
    accuracies = [accuracy_interval(one.row) for one in series]
    bottom = min(interval.low or 0.0 for interval in accuracies)
    top = max(interval.high or 1.0 for interval in accuracies)
    room = max((top - bottom) * 0.1, 0.002)
    medians = [_median(one).value / 1e6 for one in series]
    low, high = max(min(medians) / 1.3, _LEAST_MS), max(max(medians) * 1.3, 2 * _LEAST_MS)
    y_range = (max(0.0, bottom - room), min(1.0, top + room))

    frame = make_frame(360, width, x=log_scale(low, high), y_range=y_range)
    parts = y_grid(frame, linear_ticks(*y_range), percent_of(y_range))
    parts += x_grid(frame, log_ticks(low, high, tick_limit(frame)), "median latency of a call, ms (log scale)")
    points = [_point(frame, one, accuracy) for one, accuracy in zip(series, accuracies, strict=True)]
    by_series = {id(one): point for one, point in zip(series, points, strict=True)}
    front = [(by_series[id(one)].x, by_series[id(one)].y) for one in pareto_front(series)]
    steps = [Segment(*one, *two) for one, two in itertools.pairwise(front)]
    if steps:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    area = Box(frame.left + 4, frame.top, width - 6, frame.height - frame.bottom - 4)
    labels = place_labels(points, steps, area)
    for one, point in zip(series, points, strict=True):
        parts += [line_between(bar.x1, bar.y1, bar.x2, bar.y2, f"bar {one.look}") for bar in point.bars]
    for one, label in zip(series, labels, strict=True):
        if label.leader:
            line = label.leader
            parts.append(line_between(line.x1, line.y1, line.x2, line.y2, f"leader {one.look}"))
    for one, accuracy, point in zip(series, accuracies, points, strict=True):
        title = f"{one.name}: {cells.percent(accuracy.value)} % at {cells.milliseconds(_median(one))} ms"
        parts.append(dot(point.x, point.y, one, title))
    parts += [_label(label) for label in labels]
    headroom = max(0.0, 4 - min(label.box.top for label in labels))
    return svg_of(frame, parts, "Accuracy against latency", headroom=math.ceil(headroom))


def throughput_bars(series: Sequence[Series], width: int) -> str:
    """Items a second with the interval, from zero; on a narrow page each name stands above its bar."""
    rates = [one.row.throughput for one in series]
    texts = [cells.rate(rate) for rate in rates]
    beside = width >= WIDE
    left = 16 + math.ceil(min(width / 3, max(text_width(one.name) for one in series))) if beside else 12
    right = 16 + math.ceil(max(text_width(text) for text in texts))
    bar, pitch = (22, 34) if beside else (14, 44)
    high = max(rate.high or rate.value for rate in rates) * 1.02 or 1.0

    def x(value: float) -> float:
        return left + value / high * (width - left - right)

    height = 16 + 48 + len(series) * pitch
    frame = Frame(width=width, height=height, x=x, y=lambda value: value, left=left, right=right)
    parts = x_grid(frame, linear_ticks(0, high, tick_limit(frame)), "items a second")
    for index, (one, rate, text) in enumerate(zip(series, rates, texts, strict=True)):
        bottom = frame.top + (index + 1) * pitch - 6
        middle = bottom - bar / 2
        parts.append(
            f'<rect class="fill {one.look}" x="{left}" y="{bottom - bar}" width="{max(1.0, x(rate.value) - left):.1f}" '
            f'height="{bar}" rx="2"><title>{escape(one.name)}: {text} items/s</title></rect>'
        )
        name = shorten(one.name, left - 14 if beside else width - 24)
        if beside:
            parts.append(text_at("name", left - 10, middle + 4, name, one.name, anchor="end"))
        else:
            parts.append(text_at("name", left, bottom - bar - 6, name, one.name))
        end = x(rate.value)
        if rate.low is not None and rate.high is not None:
            end = x(rate.high)
            parts += [line_between(x(rate.low), middle, end, middle, "whisker")]
            parts += [line_between(place, middle - 4, place, middle + 4, "whisker") for place in (x(rate.low), end)]
        parts.append(text_at("value", end + 8, middle + 4, text))
    return svg_of(frame, parts, "Throughput")


def accuracy_interval(row: Measurement) -> Interval:
    """An accuracy with an interval: of the paired drop where export measured one, else Wilson's for its sample."""
    assert row.accuracy is not None
    if row.drop_points is not None and row.drop_low is not None and row.drop_high is not None:
        reference = row.accuracy + row.drop_points / 100
        low, high = reference - row.drop_high / 100, reference - row.drop_low / 100
        return Interval(value=row.accuracy, low=max(0.0, low), high=min(1.0, high))
    if row.accuracy_samples:
        return proportion_interval(row.accuracy, row.accuracy_samples)
    return Interval(value=row.accuracy, low=row.accuracy, high=row.accuracy)


def _median(one: Series) -> Interval:
    assert one.row.latency.p50_ns is not None
    return one.row.latency.p50_ns


def _point(frame: Frame, one: Series, accuracy: Interval) -> Point:
    median = _median(one)
    x, y = frame.x(median.value / 1e6), frame.y(accuracy.value)
    bars = [Segment(x, frame.y(accuracy.low or 0.0), x, frame.y(accuracy.high or 1.0))]
    if median.low is not None and median.high is not None:
        bars.append(Segment(frame.x(median.low / 1e6), y, frame.x(median.high / 1e6), y))
    return Point(x=x, y=y, name=one.name, bars=tuple(bars))


def _error_bar(frame: Frame, latency_ns: Interval, height: float, one: Series) -> list[str]:
    if latency_ns.low is None or latency_ns.high is None:
        return []
    y = frame.y(height)
    return [line_between(frame.x(latency_ns.low / 1e6), y, frame.x(latency_ns.high / 1e6), y, f"bar {one.look}")]


def _label(label: Label) -> str:
    """Flush with the side of its box that faces the dot, because the box is wider than the text in most fonts."""
    box, x = label.box, label.point.x
    if box.left <= x <= box.right:
        place, anchor = (box.left + box.right) / 2, "middle"
    else:
        place, anchor = (box.left, "start") if x < box.left else (box.right, "end")
    return text_at("name label", place, box.bottom - 3, label.text, label.point.name, anchor=anchor)


def dot(x: float, y: float, one: Series, title: str) -> str:
    return f'<circle class="dot {one.look}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(title)}</title></circle>'
