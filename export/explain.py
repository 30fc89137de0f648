"""A ranking of layers for a person: a table for the terminal, a page for the browser."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dlops.errors import from_os_error
from dlops.export.layer_page import render_page
from dlops.export.layers import LayerError, Ranking

HEADINGS = ("layer", "operator", "type", "weights", "own dB", "model dB", "share")


def cells(error: LayerError) -> tuple[str, ...]:
    """One layer under `HEADINGS`."""
    layer = error.layer
    weights = f"{layer.weights:,}" if layer.weights else "–"
    return (
        layer.name, layer.operator, layer.kind, weights, decibels(error.local_db), decibels(error.alone_db),
        f"{error.share:.1%}",
    )  # fmt: skip


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}".replace("-", "−")


def render_table(ranking: Ranking) -> Table:
    """Every layer, the one that adds most first."""
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left",
        title=f"{ranking.title}: the outputs keep {decibels(ranking.output_db)} dB with all layers quantized",
        caption="model dB: SQNR of the outputs where this layer alone is quantized. share: of the error that all add "
        f"so. own dB: SQNR of its own output, all quantized. {ranking.samples} calibration samples.",
        caption_justify="left",
    )  # fmt: skip
    for place, heading in enumerate(HEADINGS):
        # A name is there to be copied: it is folded where it must be, never cut.
        table.add_column(heading, justify="left" if place < 3 else "right", overflow="fold", no_wrap=place > 2)
    for error in ranking.layers:
        table.add_row(*(Text(cell) for cell in cells(error)))
    return table


def write_page(ranking: Ranking, folder: Path) -> Path:
    """Write `<name>-<variant>-layers.html` into the folder, and return its path."""
    path = folder / f"{ranking.title.replace('/', '-')}-layers.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(render_page(ranking, HEADINGS, [cells(error) for error in ranking.layers]), encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, doing="writing the page") from error
    return path
