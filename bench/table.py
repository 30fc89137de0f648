"""A report as a table for the console, for Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dlops.bench import breakdown, cells, sentences
from dlops.bench.calibration_text import line
from dlops.report import CLOCKS, Interval, Latency, Measurement, Report, ServerTime

_COLUMNS = 80
_SERVER = tuple(ServerTime.model_fields)


def render_table(report: Report) -> RenderableType:
    """For `Console.print`: one table with a section a load, then where it ran, then footnotes. Fits 80 columns."""
    report = cells.told_apart(report)
    groups = cells.groups(report)
    headings = cells.console_headings(report.measurements)
    # In full where there is room for it: `onnx-int8 with 8 in flight`, else `onnx-int8 ×8`.
    full = _width(groups, headings) <= _COLUMNS
    # The box's own divider is a space: with padding 0, ten columns and a long slug fit 80 characters.
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
    for heading in headings:
        left = heading == headings[0]
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for group in groups:
        table.add_section()
        table.add_row(Text(group.title, style="bold"))
        for row in group.rows:
            label = (cells.name(row) if full else cells.short_name(row)) + _mark(row)
            values = cells.values(row)
            style = "bold green" if row.target == report.chosen else ""
            table.add_row(Text(label, style=style), *[values[heading] for heading in headings[1:]])
    lines = [f"chosen: {report.chosen}: {report.chosen_because}"] if report.chosen else []
    lines += [report.chosen_because] if report.chosen_because and not report.chosen else []
    lines += [*sentences.placements(report.measurements), *breakdown.placements(report)]
    lines += [] if full else _legend(report.measurements)
    lines += sentences.explanations(report, brief=True)
    return Group(table, *[Text(line) for line in ("", *lines)], *breakdown.render_tables(report))


def _legend(rows: Sequence[Measurement]) -> list[str]:
    """What short names mean, by those of the table."""
    calls = max((row.load.concurrency for row in rows if " ×" in cells.short_name(row)), default=None)
    rate = max((row.load.rate for row in rows if row.load.rate is not None), default=None)
    lines = [] if calls is None else [f"×{calls}: with {calls} request{'' if calls == 1 else 's'} in flight"]
    return lines if rate is None else [*lines, f"@{rate:,.5g}: at {rate:,.5g} requests a second"]


def _ends(*intervals: Interval | None) -> list[float | None]:
    """Each value with its two ends, for CSV."""
    return [value for one in intervals for value in ((one.value, one.low, one.high) if one else (None, None, None))]


def _quantiles(latency: Latency | None) -> list[float | None]:
    return _ends(*((latency.p50_ns, latency.p90_ns, latency.p99_ns) if latency else (None, None, None)))


def _clock_values(row: Measurement) -> list[float | None]:
    parts: list[Latency | None] = [getattr(row.clocks, clock, None) for clock in CLOCKS.values()]
    return [one.value if one else None for part in parts for one in (part and part.p50_ns, part and part.p99_ns)]


def _mark(row: Measurement) -> str:
    return "" if row.verdict.steady else " *"


def _width(groups: list[cells.Group], headings: list[str]) -> int:
    """Characters that the console table takes with names in full, one space between columns."""
    rows = [row for group in groups for row in group.rows]
    labels = [len(group.title) for group in groups] + [len(cells.name(row) + _mark(row)) for row in rows]
    filled = [cells.values(row) for row in rows]
    return max(labels) + sum(1 + max(len(one), *(len(row[one]) for row in filled)) for one in headings[1:])


def table_text(report: Report, *, width: int = 80) -> str:
    """The console table without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False, no_color=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(render_table(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def to_markdown(report: Report) -> str:
    """One Markdown table a load, for a page or a pull request."""
    report = cells.told_apart(report)
    lines = []
    for group in cells.groups(report):
        headings = cells.headings(group.rows)
        lines += [f"**{group.title}**", "", "| " + " | ".join(headings) + " |"]
        lines.append("|---|" + "---:|" * (len(headings) - 1))
        for row in group.rows:
            values = cells.values(row)
            label = cells.name(row).replace("|", "\\|") + ("" if row.verdict.steady else " \\*")
            lines.append("| " + " | ".join((label, *[values[heading] for heading in headings[1:]])) + " |")
        lines.append("")
    places = (*sentences.placements(report.measurements), *breakdown.placements(report))
    notes = [*places, *sentences.explanations(report)]
    notes += [line(report.calibration)] if report.calibration else []
    lines += [f"- {note}" for note in notes]
    lines += breakdown.markdown(report)
    return "\n".join(lines) + "\n"


def to_csv(report: Report) -> str:
    """One line a row with every number in its base unit; empty where it is null."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    quantiles = [f"{q}_ns{end}" for q in ("p50", "p90", "p99") for end in ("", "_low", "_high")]
    service = [f"service_{name}" for name in quantiles]
    clocks = [f"{clock}_{q}_ns" for clock in CLOCKS.values() for q in ("p50", "p99")]
    writer.writerow(
        [
            "target", "artifact", "runtime", "provider", "device", "precision", "threads", "boundary", "scenario",
            "batch", "concurrency", "rate", "warmup_calls", "duration_ns", "samples", "effective_samples", *quantiles,
            "mean_ns", "min_ns", "max_ns", *service, "lag_p99_ns", *(f"server_{name}" for name in _SERVER),
            "throughput", "throughput_low", "throughput_high", "speedup", "speedup_low", "speedup_high", "errors",
            "model_bytes", "peak_memory_bytes", "device_memory_bytes", "cold_start_ns", "load_ns", "first_call_ns",
            *clocks, "accuracy", "accuracy_samples", "drop_points", "drop_low", "drop_high", "flips", "other_load",
            "energy_j_per_item", "macs", "peak_share", "moved_bytes", "bandwidth_share", "steady", "reasons",
            "engine", "result_metric", "result", "result_low", "result_high", "processes", "arrivals", "busy_s",
            "idle_s", "trace", "served_by",
        ]
    )  # fmt: skip
    for row in report.measurements:
        latency, start = row.latency, row.cold_start
        writer.writerow(
            [
                row.target, row.artifact, row.runtime, row.provider, row.device, row.precision, row.threads,
                row.boundary, row.load.scenario, row.load.batch, row.load.concurrency, row.load.rate,
                row.warmup_calls, row.duration_ns, latency.samples, latency.effective_samples, *_quantiles(latency),
                latency.mean_ns, latency.min_ns, latency.max_ns, *_quantiles(row.service), row.lag_p99_ns,
                *(getattr(row.server, name) if row.server else None for name in _SERVER),
                *_ends(row.throughput, row.speedup), row.error_count, row.model_bytes, row.peak_memory_bytes,
                row.device_memory_bytes,
                *((start.total_ns, start.load_ns, start.first_call_ns) if start else (None, None, None)),
                *_clock_values(row), row.accuracy, row.accuracy_samples, row.drop_points, row.drop_low, row.drop_high,
                row.flips, row.other_load, row.energy_j_per_item, row.macs, row.peak_share, row.moved_bytes,
                row.bandwidth_share, row.verdict.steady,
                "; ".join(row.verdict.reasons),
                row.engine, row.load.metric, *_ends(row.result), row.processes, row.load.arrivals,
                *(row.load.pauses_s or (None, None)), row.load.trace, row.served_by,
            ]
        )  # fmt: skip
    return buffer.getvalue()
