"""The page that shows which layers int8 hurts: no script, no network, readable in light, dark and print."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources

from dlops.environment import describe_environment
from dlops.export.layers import LayerError, Ranking

# Drawn twice, and the style sheet shows the one that fits: scaled down, text could not be read.
_WIDE, _NARROW = 900, 360
# Below this share a bar has no length, and that many bars are more than a page wants.
_LEAST, _DRAWN = 0.001, 40
# About what one character of a name takes.
_CHARACTER = 7.2
_LONGEST = 44
_MOST = 0.9
_METHOD = (
    "Share of the error: each layer is quantized alone, the model is run on calibration samples, and the power of the "
    "error at its outputs is compared with fp32. The shares are of the sum over all layers. This is the order in which "
    "the export returns layers to fp32 where a gate refuses the model.",
    "Model dB: signal-to-quantization-noise ratio of the model's outputs with this layer alone quantized. 20 dB is an "
    "error of a tenth of the signal's amplitude, 40 dB of a hundredth.",
    "Own dB: the same ratio at the layer's own output with all layers quantized. It holds the error that comes in "
    "from before, so it falls along the network and says less about who is at fault.",
)


def render_page(ranking: Ranking, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """headings, rows: the table's cells as text, in the ranking's order."""
    style = resources.files("dlops.export").joinpath("layer_page.css").read_text(encoding="utf-8")
    body = [_header(ranking), _summary(ranking), _figure(ranking), _table(headings, rows), _notes()]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon: without one, a browser that is served the page asks for /favicon.ico.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(ranking.title)}: error by layer</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def _header(ranking: Ranking) -> str:
    made = datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC")
    return (
        f"<header><h1>{escape(ranking.title)}: error by layer</h1>"
        f"<p>{made} · {escape(describe_environment().cpu)} · {ranking.samples} calibration samples</p></header>"
    )


def _summary(ranking: Ranking) -> str:
    layers = ranking.layers
    most, reached = 0, 0.0
    while most < len(layers) and reached < _MOST:
        reached += layers[most].share
        most += 1
    figures = [
        (_decibels(ranking.output_db), "of the outputs, all layers quantized"),
        (f"{most} of {len(layers)}", f"layers add {reached:.0%} of the error"),
        (f"{layers[0].share:.0%}", f"is added by {layers[0].layer.name}"),
    ]
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in figures)
    return f'<ul class="card figures">{items}</ul>'


def _figure(ranking: Ranking) -> str:
    drawn = [error for error in ranking.layers[:_DRAWN] if error.share >= _LEAST]
    left = len(ranking.layers) - len(drawn)
    rest = sum(error.share for error in ranking.layers[len(drawn) :])
    more = f" The other {left}, not drawn, add {rest:.1%}." if left else ""
    return (
        "<section><h2>Share of the error at the outputs</h2><figure>"
        f"{_bars(drawn, width=_WIDE, kind='wide')}{_bars(drawn, width=_NARROW, kind='narrow')}"
        f"<figcaption>Each layer alone in int8, the worst first; beside the bar the model's SQNR.{more}</figcaption>"
        "</figure></section>"
    )


def _bars(errors: Sequence[LayerError], *, width: int, kind: str) -> str:
    """Names beside the bars where there is room, above them where there is not."""
    beside = width == _WIDE
    longest = max((len(_shortened(error.layer.name)) for error in errors), default=0)
    left, right, top = (20 + int(_CHARACTER * longest) if beside else 0), 130, 8
    step, thick = (24, 14) if beside else (40, 12)
    reach = max((error.share for error in errors), default=0.0) or 1.0
    scale = (width - left - right) / reach
    height = top + step * len(errors) + 4
    parts = [
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Share of the error by layer: {escape(_spoken(errors))}">'
    ]
    for place, error in enumerate(errors):
        y = top + step * place
        name = escape(_shortened(error.layer.name))
        bar = y if beside else y + 18
        label = f'x="{left - 12}" y="{y + 11}" text-anchor="end"' if beside else f'x="0" y="{y + 11}"'
        length = max(1.0, error.share * scale)
        value = f"{error.share:.1%} · {_decibels(error.alone_db)}"
        parts.append(
            f"<g><title>{escape(error.layer.name)}, {escape(error.layer.operator)}: {value}</title>"
            f'<text class="name" {label}>{name}</text>'
            f'<rect class="bar" x="{left}" y="{bar}" width="{length:.1f}" height="{thick}" rx="2"/>'
            f'<text class="value" x="{left + length + 8:.1f}" y="{bar + thick - 3}">{value}</text></g>'
        )
    return f"{''.join(parts)}</svg>"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<section><h2>All layers</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )


def _notes() -> str:
    items = "".join(f"<li>{note}</li>" for note in _METHOD)
    return f'<section><h2>How to read it</h2><ul class="notes">{items}</ul></section>'


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB".replace("-", "−")


def _spoken(errors: Sequence[LayerError]) -> str:
    return ", ".join(f"{error.layer.name} {error.share:.1%}" for error in errors[:5])


def _shortened(name: str) -> str:
    """The end of a module's path tells it from its neighbours."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
