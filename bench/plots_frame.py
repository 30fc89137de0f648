"""A plotting area as SVG text: its frame, scales, grids and lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Every plot is drawn twice, and the style sheet shows the one that fits: scaled down, text could not be read.
WIDE, NARROW = 840, 420


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A plotting area inside its margins, and how values become places in it."""

    width: int
    height: int
    x: Callable[[float], float]
    y: Callable[[float], float]
    left: int = 64
    right: int = 24
    top: int = 16
    bottom: int = 48


def make_frame(
    height: int, width: int, *, x: Callable[[float, int, int], float], y_range: tuple[float, float]
) -> Frame:
    left, right, top, bottom = 64, 24, 16, 48
    low, high = y_range

    def place(value: float) -> float:
        return top + (1 - (value - low) / (high - low)) * (height - top - bottom)

    return Frame(
        width=width, height=height, x=lambda value: x(value, left, width - right), y=place,
        left=left, right=right, top=top, bottom=bottom,
    )  # fmt: skip


def log_scale(low: float, high: float) -> Callable[[float, int, int], float]:
    """What lies below `low`, nothing itself included, is placed there: it may have no logarithm."""
    reach = math.log(high / low) or 1.0
    return lambda value, left, right: left + math.log(max(value, low) / low) / reach * (right - left)


def tick_limit(frame: Frame) -> int:
    """How many numbers fit the axis without touching."""
    return max(3, (frame.width - frame.left - frame.right) // 70)


def log_ticks(low: float, high: float, limit: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / limit)]
    # Over so short a way a logarithmic axis is all but a linear one.
    return linear_ticks(low, high, limit)


def linear_ticks(low: float, high: float, limit: int = 7) -> list[float]:
    rough = (high - low) / (limit - 1)
    scale = 10 ** math.floor(math.log10(rough))
    step = next(scale * nice for nice in (1, 2, 2.5, 5, 10) if scale * nice >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def percent_of(y_range: tuple[float, float]) -> Callable[[float], str]:
    """With as many decimals as ticks over this range need to differ."""
    decimals = 2 if y_range[1] - y_range[0] < 0.005 else 1 if y_range[1] - y_range[0] < 0.05 else 0
    return lambda share: f"{share * 100:.{decimals}f}%"


def y_grid(frame: Frame, ticks: Sequence[float], text: Callable[[float], str]) -> list[str]:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(line_between(frame.left, y, frame.width - frame.right, y, "grid"))
        parts.append(text_at("tick", frame.left - 8, y + 4, text(tick), anchor="end"))
    return parts


def x_grid(frame: Frame, ticks: Sequence[float], title: str) -> list[str]:
    base = frame.height - frame.bottom
    parts = []
    for tick in ticks:
        x = frame.x(tick)
        parts.append(line_between(x, frame.top, x, base, "grid"))
        parts.append(text_at("tick", x, base + 18, f"{tick:,.0f}" if tick >= 1000 else f"{tick:.3g}", anchor="middle"))
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(text_at("axis", middle, frame.height - 8, title, anchor="middle"))
    return parts


def text_at(kind: str, x: float, y: float, text: str, whole: str = "", *, anchor: str = "start") -> str:
    """whole: what the text is short for, shown where the pointer rests on it."""
    title = f"<title>{escape(whole)}</title>" if whole not in ("", text) else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{title}</text>'


def line_between(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg_of(frame: Frame, parts: Sequence[str], title: str, *, headroom: int = 0) -> str:
    """headroom: what the plot needs above its frame."""
    size = "wide" if frame.width >= WIDE else "narrow"
    return (
        f'<svg class="{size}" viewBox="0 {-headroom} {frame.width} {frame.height + headroom}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
