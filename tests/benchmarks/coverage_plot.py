"""Coverage against the number of calls as one SVG: a panel a quantile, a line a distribution, with error bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f")
_PANEL, _HEIGHT, _LEFT, _TOP, _GAP = 250, 220, 48, 34, 34
_LOWEST, _HIGHEST = 90.0, 100.0


@dataclass(frozen=True, slots=True)
class Dot:
    """calls: of each run. right, error: in per cent."""

    calls: int
    right: float
    error: float


def plot(panels: Mapping[str, Mapping[str, Sequence[Dot]]]) -> str:
    """panels: by title, by distribution, dots by ascending number of calls. Text and lines keep to mid greys, which
    light and dark pages show alike."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    width = _LEFT + len(panels) * (_PANEL + _GAP)
    height = _TOP + _HEIGHT + 40 + 18 * len(names)
    parts = [part for place, (title, lines) in enumerate(panels.items()) for part in _panel(place, title, lines, names)]
    for place, name in enumerate(names):
        y = _TOP + _HEIGHT + 44 + 18 * place
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + 22}" y1="{y - 4}" y2="{y - 4}" stroke="{COLOURS[place]}"/>')
        parts.append(_text(_LEFT + 30, y, name, anchor="start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="#808080" stroke-width="1.6">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(place: int, title: str, lines: Mapping[str, Sequence[Dot]], names: Sequence[str]) -> list[str]:
    left = _LEFT + place * (_PANEL + _GAP)
    sizes = sorted({dot.calls for dots in lines.values() for dot in dots})
    low, high = math.log(min(sizes)) - 0.3, math.log(max(sizes)) + 0.3

    def x(calls: float) -> float:
        return left + _PANEL * (math.log(calls) - low) / (high - low)

    def y(right: float) -> float:
        return _TOP + _HEIGHT * (_HIGHEST - max(_LOWEST, right)) / (_HIGHEST - _LOWEST)

    parts = [_text(left + _PANEL / 2, _TOP - 14, title)]
    for right in range(round(_LOWEST), round(_HIGHEST) + 1, 1):
        if right % 5 == 0:
            dashed = ' stroke-dasharray="5 4"' if right == 95 else ""
            parts.append(
                f'<line x1="{left}" x2="{left + _PANEL}" y1="{y(right)}" y2="{y(right)}" stroke="#9a9a9a"{dashed}/>'
            )
            parts.append(_text(left - 6, y(right) + 4, f"{right} %", anchor="end"))
    parts += [_text(x(calls), _TOP + _HEIGHT + 18, f"{calls:,}") for calls in sizes]
    for name, dots in lines.items():
        index = names.index(name)
        # Side by side, bars of one size can be told apart.
        shift = 4 * (index - len(names) / 2)
        points = [(x(dot.calls) + shift, dot) for dot in dots]
        colour = COLOURS[index]
        way = " ".join(f"{at:.1f},{y(dot.right):.1f}" for at, dot in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for at, dot in points:
            ends = y(dot.right - dot.error), y(dot.right + dot.error)
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{at:.1f}" cy="{y(dot.right):.1f}" r="3" fill="{colour}"/>')
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
