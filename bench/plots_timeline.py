"""The machine over the time of a run: what used the processor, and what sensors said, with the rows above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from dlops.bench.cells import significant
from dlops.bench.nvml import THROTTLING
from dlops.bench.plots_frame import Frame, line_between, linear_ticks, svg_of, text_at, tick_limit, y_grid
from dlops.bench.plots_labels import shorten, text_width
from dlops.report import TIMES, Telemetry

Values = NDArray[np.float64]
_LEFT, _RIGHT, _LANE, _TRACK, _LINE, _GAP, _BOTTOM = 64, 24, 26, 76, 20, 10, 48
# A name as short as this says nothing.
_SHORTEST_NAME = 28
_KEY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """values: (n,), in the unit of its track."""

    name: str
    look: str
    values: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """A strip of the plot. stacked: its curves are parts of a whole of 100."""

    title: str
    curves: tuple[Curve, ...]
    stacked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """When rows were measured, in seconds; name: of them."""

    name: str
    begin_s: float
    end_s: float


# Title, what its series' names end with, and by how much they are divided. Series that never change are no track.
_LINES = (
    ("CPU frequency, GHz", "cpu_frequency_khz", 1e6),
    ("GPU in use, %", "_utilization_ppm", 1e4),
    ("GPU clock, GHz", "_sm_clock_khz", 1e6),
    ("Power, W", "_power_mw", 1e3),
    ("Temperature, °C", "_temperature_mc", 1e3),
    ("GPU memory in use, GB", "_memory_bytes", 1e9),
    ("Waiting for memory, %", "memory_stall_ppm", 1e4),
    ("Stopped by the CPU quota, %", "quota_stall_ppm", 1e4),
    ("Thermal throttle events of the CPU", "cpu_throttle_count", 1.0),
)


def tracks(telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]]) -> list[Track]:
    """What there is to draw, from the top: CPU time, then every sensor that moved."""
    found = []
    parts = [_series(telemetry, samples, f"cpu_{part}_ppm", 1e4) for part in ("ours", "other", "steal")]
    if all(len(part) for part in parts):
        ours, other, steal = parts
        curves = [
            Curve(name="this run and its service", look="s0", values=ours),
            Curve(name="other load", look="s1", values=other - steal),
        ]
        if steal.any():
            curves.append(Curve(name="steal", look="s3", values=steal))
        found.append(Track(title="CPU time, %", curves=tuple(curves), stacked=True))
    for title, ending, scale in _LINES:
        moved = [name for name in _named(telemetry, ending) if np.ptp(samples[f"{telemetry.key}.{name}"])]
        if moved:
            found.append(Track(title=title, curves=_curves(telemetry, samples, moved, ending, scale)))
    throttled = [name for name in _named(telemetry, "_clock_events_bits") if _slowed(telemetry, samples, name).any()]
    if throttled:
        slowed = (
            Curve(name=_of(name), look=_look(name), values=np.where(_slowed(telemetry, samples, name), 1.0, 0.0))
            for name in throttled
        )
        found.append(Track(title="GPU throttled (1) or not (0)", curves=tuple(slowed)))
    return found


def still(telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]]) -> list[tuple[str, str]]:
    """The sensors that never moved, as (what, value)."""
    found = []
    for title, ending, scale in _LINES:
        for name in _named(telemetry, ending):
            values = samples[f"{telemetry.key}.{name}"]
            if not np.ptp(values):
                what, _, unit = title.partition(", ")
                whose = f" ({_of(name)})" if name.startswith("gpu") else ""
                found.append((what + whose, f"{significant(values[0] / scale)} {unit} throughout".replace("  ", " ")))
    return found


def timeline(telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]], spans: Sequence[Span], width: int) -> str:
    """The plot. spans: in the order of time. At least one track is needed."""
    times = samples[telemetry.key + TIMES] / 1e9
    strips = tracks(telemetry, samples)
    begin, end = 0.0, max([float(times[-1]), *(span.end_s for span in spans)]) * 1.005
    keys = [_keys(track, width) for track in strips]
    tops = []
    y = _LANE + _GAP
    for lines in keys:
        y += _LINE * (max(line for line, _, _ in lines) + 1)
        tops.append(y)
        y += _TRACK + _GAP
    base = y - _GAP

    def x(value: float) -> float:
        return _LEFT + (value - begin) / (end - begin) * (width - _LEFT - _RIGHT)

    whole = Frame(width=width, height=base + _BOTTOM, x=x, y=lambda value: value)
    marks = _bands(spans, x, base)
    for track, top, lines in zip(strips, tops, keys, strict=True):
        marks += _strip(whole, track, times, top, lines)
    for tick in linear_ticks(begin, end, max(5, tick_limit(whole))):
        marks.append(line_between(x(tick), base, x(tick), base + 4, "grid"))
        marks.append(text_at("tick", x(tick), base + 18, f"{tick:.3g}", anchor="middle"))
    marks.append(text_at("axis", (_LEFT + width - _RIGHT) / 2, whole.height - 8, "time, s", anchor="middle"))
    return svg_of(whole, marks, "The machine during the run")


def _bands(spans: Sequence[Span], x: object, base: float) -> list[str]:
    """Behind the tracks, with a name where there is room, and the whole name where the pointer rests on it."""
    assert callable(x)
    marks = []
    for span in spans:
        left, right = x(span.begin_s), x(span.end_s)
        marks.append(
            f'<rect class="span" x="{left:.1f}" y="4" width="{max(1.0, right - left):.1f}" height="{base - 4}">'
            f"<title>{escape(span.name)}</title></rect>"
        )
        if right - left >= _SHORTEST_NAME:
            name = shorten(span.name, right - left - 6)
            marks.append(text_at("span", (left + right) / 2, 20, name, span.name, anchor="middle"))
    return marks


def _strip(whole: Frame, track: Track, times: Values, top: float, keys: Sequence[tuple[int, float, int]]) -> list[str]:
    low, high = (0.0, 100.0) if track.stacked else _range(track.curves)
    ticks = [0.0, 50.0, 100.0] if track.stacked else _few_ticks(low, high)

    def y(value: float) -> float:
        return top + (1 - (value - low) / (high - low)) * _TRACK

    frame = Frame(width=whole.width, height=whole.height, x=whole.x, y=y)
    marks = y_grid(frame, ticks, lambda tick: f"{tick:,.4g}")
    first = top - _LINE * (max(line for line, _, _ in keys) + 1)
    for line, place, index in keys:
        row = first + _LINE * (line + 1) - 7
        if index < 0:
            marks.append(text_at("name", place, row, track.title))
            continue
        curve = track.curves[index]
        marks.append(
            f'<rect class="fill {curve.look}" x="{place:.1f}" y="{row - 9:.1f}" width="{_KEY}" height="{_KEY}"/>'
        )
        marks.append(text_at("tick", place + _KEY + 5, row, curve.name))
    below = np.zeros(len(times))
    for curve in track.curves:
        if track.stacked:
            above = np.minimum(100.0, below + curve.values)
            edge = _points(frame, times, above) + _points(frame, times[::-1], below[::-1])
            marks.append(f'<polygon class="area {curve.look}" points="{" ".join(edge)}"/>')
            below = above
        else:
            points = " ".join(_points(frame, times, curve.values))
            marks.append(f'<polyline class="curve {curve.look}" points="{points}"/>')
    return marks


def _keys(track: Track, width: int) -> list[tuple[int, float, int]]:
    """Where the title (index -1) and each curve's name go, as (line, x, index); one curve alone needs no name."""
    places = [(0, float(_LEFT), -1)]
    line, x = 0, _LEFT + text_width(track.title) + 18
    for index, curve in enumerate(track.curves if len(track.curves) > 1 else ()):
        room = _KEY + 5 + text_width(curve.name)
        if x + room > width - _RIGHT:
            line, x = line + 1, float(_LEFT)
        places.append((line, x, index))
        x += room + 14
    return places


def _points(frame: Frame, times: Values, values: Values) -> list[str]:
    return [f"{frame.x(time):.1f},{frame.y(value):.1f}" for time, value in zip(times, values, strict=True)]


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    low = min(float(curve.values.min()) for curve in curves)
    high = max(float(curve.values.max()) for curve in curves)
    room = (high - low) * 0.08 or 1.0
    # What begins near zero is read from zero.
    return (0.0 if low < 0.35 * high else low - room), high + room


def _few_ticks(low: float, high: float) -> list[float]:
    """Two to four where round numbers allow it."""
    return next((ticks for limit in (4, 5, 6, 7) if len(ticks := linear_ticks(low, high, limit)) > 1), [])


def _series(telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]], name: str, scale: float) -> Values:
    if name not in telemetry.series:
        return np.empty(0, np.float64)
    return np.asarray(samples[f"{telemetry.key}.{name}"] / scale, np.float64)


def _named(telemetry: Telemetry, ending: str) -> list[str]:
    return [name for name in telemetry.series if name.endswith(ending)]


def _curves(
    telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]], names: Sequence[str], ending: str, scale: float
) -> tuple[Curve, ...]:
    return tuple(
        Curve(name=_of(name), look=_look(name), values=_series(telemetry, samples, name, scale)) for name in names
    )


def _slowed(telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]], name: str) -> NDArray[np.bool_]:
    mask = sum(THROTTLING)
    return np.asarray((samples[f"{telemetry.key}.{name}"] & mask) != 0, np.bool_)


def _of(name: str) -> str:
    """Whose series it is: "GPU 0", "package-0", "CPU"."""
    owner = name.partition("_")[0]
    return f"GPU {owner[3:]}" if owner.startswith("gpu") else "CPU" if owner == "cpu" else owner


def _look(name: str) -> str:
    """The same colour for the same owner in every track."""
    owner = name.partition("_")[0]
    if owner.startswith("gpu"):
        return f"s{(2, 4, 5, 6, 7, 0, 1, 3)[int(owner[3:]) % 8]}"
    return f"s{(0, 3, 6)[int(owner[-1]) % 3] if owner[-1].isdigit() else 0}"
