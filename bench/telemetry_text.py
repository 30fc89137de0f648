"""The telemetry of a report in words, and its section of the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

from dlops.bench import cells
from dlops.bench.plots_frame import NARROW, WIDE
from dlops.bench.plots_timeline import Span, still, timeline, tracks
from dlops.report import Report, Telemetry

_CAPTION = (
    "Shares are of all processors that the run may use; each point is the mean of what was sampled around it. The "
    "bands are when rows were measured, without their warm-up."
)


def render_section(report: Report, samples: Mapping[str, NDArray[np.int64]]) -> str:
    """A timeline for each run, and what was not told below; nothing where a report has no telemetry."""
    parts = []
    said: dict[tuple[str, str], None] = {}
    for telemetry in report.telemetry:
        if tracks(telemetry, samples):
            spans = _spans(report, telemetry)
            drawn = "".join(timeline(telemetry, samples, spans, width) for width in (WIDE, NARROW))
            parts.append(
                f"<figure><h3>The machine during the run</h3>{drawn}<figcaption>{_CAPTION}</figcaption></figure>"
            )
        # What holds for every run is said once.
        said |= dict.fromkeys(facts(telemetry, samples))
    rows = "".join(f"<dt>{escape(what)}</dt><dd>{escape(how)}</dd>" for what, how in said)
    parts += [f'<div class="card"><dl>{rows}</dl></div>'] if rows else []
    return f"<section><h2>Telemetry</h2>{''.join(parts)}</section>" if parts else ""


def facts(telemetry: Telemetry, samples: Mapping[str, NDArray[np.int64]]) -> list[tuple[str, str]]:
    """As (what, sentence): how it was sampled, what never moved, and what this machine does not tell."""
    found = []
    if telemetry.samples:
        cost = "" if telemetry.cost is None else f", which took {telemetry.cost:.2%} of one processor"
        found.append(("Sampled", f"every {telemetry.interval_s:g} s, {telemetry.samples} times{cost}"))
    found += [(f"GPU {number}", name) for number, name in enumerate(telemetry.gpus)]
    found += still(telemetry, samples)
    found += [(f"No {what}", reason) for what, reason in telemetry.absent.items()]
    return found


def _spans(report: Report, telemetry: Telemetry) -> list[Span]:
    """Rows that took turns are one."""
    titles = {row.samples: group.title for group in cells.groups(report) for row in group.rows}
    names = {
        row.samples: cells.short_name(row) if row.boundary == "network" else titles[row.samples].partition(", ")[2]
        for row in report.measurements
    }
    found: dict[tuple[int, int], str] = {}
    for key, span in telemetry.spans.items():
        if key in names:
            found.setdefault(span, names[key])
    return [Span(name=name, begin_s=begin / 1e9, end_s=end / 1e9) for (begin, end), name in sorted(found.items())]
