"""Where a request's time goes, as stacked bars: what the server counts of itself, and the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from dlops.bench import cells, sentences
from dlops.bench.plots import Series
from dlops.bench.plots_frame import WIDE, Frame, linear_ticks, svg_of, text_at, tick_limit, x_grid
from dlops.bench.plots_labels import shorten, text_width
from dlops.report import ServerTime

# A name of the style sheet for each part, in the order that a request goes through them.
LOOKS = {
    "queue": "queue",
    "input": "input",
    "cache": "cache",
    "model": "model",
    "output": "output",
    cells.OUTSIDE: "outside",
}


def shown(series: Sequence[Series]) -> list[Series]:
    """Those whose server says where its time went."""
    return [one for one in series if one.row.server is not None]


def looks(series: Sequence[Series]) -> dict[str, str]:
    """The class of every part that any of them has, by its name: the legend."""
    found = {part for one in shown(series) for part in sentences.parts(_server(one))}
    return {part: look for part, look in LOOKS.items() if part in found}


def waterfall_bars(series: Sequence[Series], width: int) -> str:
    """A bar a row from zero to the client's mean, in ms, with a part's time in it where there is room.

    series: at least one that is shown. On a narrow page each name stands above its bar.
    """
    rows = [(one, _server(one)) for one in shown(series)]
    texts = [f"{cells.significant(server.client_ns / 1e6)} ms" for _, server in rows]
    beside = width >= WIDE
    left = 16 + math.ceil(min(width / 3, max(text_width(one.name) for one, _ in rows))) if beside else 12
    right = 16 + math.ceil(max(text_width(text) for text in texts))
    bar, pitch = (22, 34) if beside else (18, 48)
    high = max(sum(sentences.parts(server).values()) for _, server in rows) / 1e6 * 1.02 or 1.0

    def x(value: float) -> float:
        return left + value / high * (width - left - right)

    height = 16 + 48 + len(rows) * pitch
    frame = Frame(width=width, height=height, x=x, y=lambda value: value, left=left, right=right)
    marks = x_grid(frame, linear_ticks(0, high, tick_limit(frame)), "mean time of a request, ms")
    for index, ((one, server), total) in enumerate(zip(rows, texts, strict=True)):
        bottom = frame.top + (index + 1) * pitch - 6
        base = bottom - bar / 2 + 4
        begin = 0.0
        for part, ns in sentences.parts(server).items():
            place, extent = x(begin), x(begin + ns / 1e6) - x(begin)
            time = cells.significant(ns / 1e6)
            marks.append(
                f'<rect class="part {LOOKS[part]}" x="{place:.1f}" y="{bottom - bar}" width="{extent:.1f}" '
                f'height="{bar}"><title>{escape(one.name)}: {part} {time} ms</title></rect>'
            )
            if text_width(time) + 6 <= extent:
                marks.append(text_at("inside", place + extent / 2, base, time, anchor="middle"))
            begin += ns / 1e6
        name = shorten(one.name, left - 14 if beside else width - 24)
        if beside:
            marks.append(text_at("name", left - 10, base, name, one.name, anchor="end"))
        else:
            marks.append(text_at("name", left, bottom - bar - 6, name, one.name))
        marks.append(text_at("value", x(begin) + 8, base, total))
    return svg_of(frame, marks, "Where a request's time goes")


def _server(one: Series) -> ServerTime:
    assert one.row.server is not None
    return one.row.server
