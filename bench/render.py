"""A report as one self-contained HTML page: no script, no network, readable in light, dark and print."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from dlops.bench import breakdown, cells, plots, plots_load, plots_waterfall, sentences, stats, telemetry_text
from dlops.bench.calibration_text import facts
from dlops.bench.plots_frame import NARROW, WIDE
from dlops.report import Measurement, Objective, Report

_METHOD = (
    "Latency is what one call took at the boundary that the table names. In process: from numpy arrays to numpy "
    "arrays, each target in a process of its own, the targets taking turns within one run. On the device: the same "
    "without the copies to and from the model's buffers. Over HTTP and gRPC: from the send to the last byte of the "
    "answer.",
    "Small figures are 95 % intervals from order statistics, with as many independent samples as the run is worth. "
    f"{cells.NONE} stands where there are too few to give one: p99 needs 368, and is certified from 662.",
    "Throughput is items a second under that load. Memory is the most that a fresh process held that loaded the "
    "model and ran it, interpreter and runtime included.",
)
_PROCESSES = (
    "Where several processes ran a target one after the other, its intervals are of what differs between processes, "
    "too: p50's is of the trimmed mean over their medians, the others take processes as blocks."
)


def render_html(report: Report, samples: Mapping[str, NDArray[np.int64]]) -> str:
    """The page. samples: what Report.raw_samples gives."""
    report = cells.told_apart(report)
    groups = cells.groups(report)
    numbers = _numbers(report)
    body = [_header(report), _summary(report), _at_a_glance(report, groups), "<section><h2>Results</h2>"]
    body += [_table(group, report) for group in groups]
    body += [_cold_starts(groups), "</section>"]
    for group in groups:
        series = [
            plots.Series(row=row, number=numbers[cells.name(row)], latencies_ns=samples[row.samples])
            for row in group.rows
        ]
        kept = [
            one for target, one in report.objectives.items() if target in {cells.service(row) for row in group.rows}
        ]
        body.append(_plots(group, series, kept))
    body += [breakdown.render_section(report), telemetry_text.render_section(report, samples)]
    body += [_notes(report), _calibration(report), _environment(report)]
    body.append(_footer(report))
    style = resources.files("dlops.bench").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An empty icon: without one, a browser that is served the page asks for /favicon.ico.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(report.title)}: dlops report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def _numbers(report: Report) -> dict[str, int]:
    """A number for each name, so that a name looks the same in all plots; names over HTTP are counted anew."""
    names: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for row in report.measurements:
        names[row.boundary == "network"][cells.name(row)] = None
    return {name: number for group in names.values() for number, name in enumerate(group)}


def _header(report: Report) -> str:
    made = report.created.strftime("%d %B %Y, %H:%M UTC")
    machine = report.environment
    where = f"{machine.cpu}, {machine.cores_in_words}" + "".join(f", {gpu}" for gpu in machine.gpus)
    return f"<header><h1>{escape(report.title)}</h1><p>{made} · {escape(where)}</p></header>"


def _summary(report: Report) -> str:
    parts = []
    if report.partial:
        parts.append(
            '<div class="card warning"><p class="verdict">Partial</p><p>The run was interrupted or a target failed: '
            "what is below was measured, and something is missing.</p></div>"
        )
    row = next((row for row in report.measurements if row.target == report.chosen), None)
    if row is not None:
        figures = _figures(row, report)
        parts.append(
            f'<div class="card chosen"><p class="verdict">{escape(row.target)}</p>'
            f'<p class="because">Chosen: {escape(report.chosen_because or "")}.</p>'
            f'<ul class="figures">{figures}</ul></div>'
        )
    elif report.chosen_because:
        parts.append(
            '<div class="card warning"><p class="verdict">No variant chosen</p>'
            f"<p>{escape(report.chosen_because)}.</p></div>"
        )
    return "\n".join(parts)


def _at_a_glance(report: Report, groups: Sequence[cells.Group]) -> str:
    """What a run without a choice to make comes to: what was found of objectives, and the best of each table."""
    if report.chosen_because:
        return ""
    lines = [*sentences.objectives(report)]
    for group in groups:
        if (line := _best_of(group, report)) is not None:
            lines.append(line)
    quotable = sum(row.verdict.steady for row in report.measurements)
    lines.append(f"{quotable} of {len(report.measurements)} rows can be quoted")
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="card"><p class="verdict">At a glance</p><ul class="notes">{items}</ul></div>'


def _best_of(group: cells.Group, report: Report) -> str | None:
    """A line on the lowest median of the rows that can be quoted and had the same load, the least that was given."""
    known = [row for row in group.rows if row.latency.p50_ns is not None and row.verdict.steady]
    if len(group.rows) > 1:
        # At a rate the median is the queue's, too: what became of rates is in the objectives and the plots.
        known = [row for row in known if row.load.rate is None]
        fewest = min((row.load.concurrency for row in known), default=1)
        known = [row for row in known if row.load.concurrency == fewest]
    if not known:
        return None
    best = min(known, key=lambda row: row.latency.p50_ns.value if row.latency.p50_ns else 0.0)
    values = cells.values(best)
    alike = [
        cells.name(row) for row in known if row is not best and stats.overlap(row.latency.p50_ns, best.latency.p50_ns)
    ]
    if len(known) == 1:
        among = ""
    elif alike:
        among = f" has the lowest median of {len(known)}, and is not told from {', '.join(alike)}"
    else:
        among = f" is the fastest of {len(known)}"
    certain = best.speedup is not None and best.speedup.low is not None and best.speedup.low > 1
    speed = f", {values['speed']} as fast as {report.baseline}" if certain and _is_faster(best, report) else ""
    return f"{_capital(group.title)}: {cells.name(best)}{among}: median {values['p50 ms']} ms{speed}"


def _is_faster(row: Measurement, report: Report) -> bool:
    return row.speedup is not None and row.target != report.baseline


def _figures(row: Measurement, report: Report) -> str:
    values = cells.values(row)
    figures = [(f"{values['p50 ms']} ms", "median latency")]
    if _is_faster(row, report):
        figures.append((values["speed"], f"as fast as {report.baseline}"))
    if row.accuracy is not None:
        figures.append((f"{values['acc %']} %", _accuracy_label(row)))
    if row.model_bytes is not None:
        figures.append((values["size"], "model file"))
    figures.append((values["items/s"], "items a second"))
    return "".join(f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in figures)


def _accuracy_label(row: Measurement) -> str:
    if row.drop_points is None:
        return "accuracy"
    change = cells.change(row.drop_points)
    return "accuracy, unchanged" if change == "0.00" else f"accuracy ({change} points)"


def _table(group: cells.Group, report: Report) -> str:
    headings = cells.headings(group.rows)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    rows = "".join(_table_row(row, headings[1:], report) for row in group.rows)
    return (
        f'<div class="scroll"><table><caption>{escape(_capital(group.title))}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _table_row(row: Measurement, headings: Sequence[str], report: Report) -> str:
    values, ranges = cells.values(row), cells.ranges(row)
    reasons = escape("; ".join(row.verdict.reasons))
    mark = "" if row.verdict.steady else f' <span class="mark" title="{reasons}">*</span>'
    # The notes give the provider's full name.
    where = f"{row.runtime} · {row.provider.removesuffix('ExecutionProvider')}"
    where = row.target if row.boundary == "network" else where
    cells_ = [f'<th scope="row">{escape(cells.name(row))}{mark}<small>{escape(where)}</small></th>']
    for heading in headings:
        # A range may break after its dash where the page is narrow.
        small = escape(ranges.get(heading, "")).replace("–", "–<wbr>")
        none = ' class="none"' if values[heading] == cells.NONE else ""
        cells_.append(f"<td{none}>{escape(values[heading])}{f'<small>{small}</small>' if small else ''}</td>")
    kind = ' class="chosen"' if row.target == report.chosen else ""
    return f"<tr{kind}>{''.join(cells_)}</tr>"


def _cold_starts(groups: Sequence[cells.Group]) -> str:
    """How long each took to a first answer, where rows know it."""
    rows = []
    for group in groups:
        for row in group.rows:
            start = row.cold_start
            if start is not None:
                figures = (
                    f"{start.total_ns / 1e9:.2f}",
                    *(f"{ns / 1e6:.3g}" for ns in (start.load_ns, start.first_call_ns)),
                )
                cells_ = "".join(f"<td>{figure}</td>" for figure in figures)
                name = f"{escape(cells.name(row))}<small>{escape(group.title)}</small>"
                rows.append(f'<tr><th scope="row">{name}</th>{cells_}</tr>')
    if not rows:
        return ""
    several = any(row.processes > 1 for group in groups for row in group.rows)
    often = "once, of several processes the one in the middle" if several else "once"
    head = "".join(f'<th scope="col">{one}</th>' for one in ("variant", "cold start s", "load ms", "first call ms"))
    return (
        f'<div class="scroll"><table><caption>Cold start: from the start of a process to its first answer, {often}; '
        "its files were in the page cache</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plots(group: cells.Group, series: Sequence[plots.Series], objectives: Sequence[Objective]) -> str:
    legend = "".join(f'<li><i class="{one.look}"></i>{escape(one.name)}</li>' for one in series)
    figures = [
        _figure(
            "Latency distributions",
            f'<ul class="legend">{legend}</ul>{_both_widths(plots.latency_curves, series)}',
            "Share of calls that took at most so long. Further left is faster, steeper is steadier. "
            "Dots are medians; the curves go from the fastest call to the slowest.",
        )
    ]
    if group.rows[0].boundary != "network" and len(plots.comparable(series)) > 1:
        drawn = _both_widths(plots.accuracy_against_latency, series)
        figures.append(_figure("Accuracy against latency", drawn, _accuracy_caption(series)))
    figures += _load_curves(series, objectives)
    figures.append(
        _figure(
            "Throughput",
            _both_widths(plots.throughput_bars, series),
            "Items finished a second. Further right is better. Whiskers are 95 % intervals.",
        )
    )
    if plots_waterfall.shown(series):
        figures.append(_waterfall(series))
    return f"<section><h2>{escape(_capital(group.title))}</h2>{''.join(figures)}</section>"


def _load_curves(series: Sequence[plots.Series], objectives: Sequence[Objective]) -> list[str]:
    """A service's latency against what it was given to do, where there are two points or more of it."""
    figures = []
    knee = " The upright line marks the knee: the most throughput for the mean time."
    if len(offered := plots_load.at_rates(series)) > 1:
        left_out = [one.name for one in plots_load.not_drawn(series)]
        figures.append(
            _figure(
                "Response time against rate",
                _both_widths(partial(plots_load.latency_against_rate, objectives=objectives), offered),
                "From when a request was due to its answer. Whole line: p50; broken: p99, where it is certified. "
                "Whiskers are 95 % intervals. Where the lines turn upwards the service no longer keeps up."
                + (knee if plots_load.knees(offered) else "")
                + (f" Not drawn, for too few calls to give a quantile: {', '.join(left_out)}." if left_out else ""),
            )
        )
    if closed := plots_load.in_flight(series):
        figures.append(
            _figure(
                "Latency against throughput",
                _both_widths(plots_load.latency_against_throughput, closed),
                "A point for each number of calls in flight. Whole line: p50; broken: p99, where it is certified. "
                "Whiskers are 95 % intervals. Where the lines turn upwards, more calls only wait."
                + (knee if plots_load.knees(closed) else ""),
            )
        )
    return figures


def _waterfall(series: Sequence[plots.Series]) -> str:
    parts = plots_waterfall.looks(series).items()
    legend = "".join(f'<li><i class="part {look}"></i>{escape(part)}</li>' for part, look in parts)
    return _figure(
        "Where a request&#x27;s time goes",
        f'<ul class="legend">{legend}</ul>{_both_widths(plots_waterfall.waterfall_bars, series)}',
        "Mean of a request, from the send. Queue, input, model and output are what the server counts of itself; "
        f"{cells.OUTSIDE} is the rest of what the client saw.",
    )


def _figure(title: str, content: str, caption: str) -> str:
    return f"<figure><h3>{title}</h3>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _both_widths(draw: Callable[[Sequence[plots.Series], int], str], series: Sequence[plots.Series]) -> str:
    return draw(series, WIDE) + draw(series, NARROW)


def _accuracy_caption(series: Sequence[plots.Series]) -> str:
    front = plots.pareto_front(series)
    lines = ["Up and to the left is better. Vertical bars are 95 % intervals:"]
    paired = [one.row.drop_low is not None for one in plots.comparable(series)]
    if all(paired):
        lines.append("of the change against the reference, on the same samples.")
    elif any(paired):
        lines.append("of the change on the same samples where there is a reference, else of the accuracy itself.")
    else:
        lines.append("of the accuracy.")
    if len(front) > 1:
        lines.append("The dashed line joins those that no other beats in both accuracy and latency.")
    else:
        lines.append(f"{front[0].name} is the fastest, and none is more accurate.")
    left_out = [one.name for one in series if one.row.accuracy is not None and one.row.latency.p50_ns is None]
    if left_out:
        lines.append(f"Not drawn, for too few calls to give a median: {', '.join(left_out)}.")
    return " ".join(lines)


def _notes(report: Report) -> str:
    lines = [*sentences.explanations(report), *sentences.placements(report.measurements), *breakdown.placements(report)]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    several = any(row.processes > 1 for row in report.measurements)
    method = "".join(f"<li>{escape(line)}</li>" for line in (*_METHOD, *([_PROCESSES] if several else [])))
    return (
        f'<section><h2>Verdicts and notes</h2><div class="card"><ul class="notes">{items}</ul></div></section>'
        f'<section><h2>How it was measured</h2><div class="card"><ul class="notes">{method}</ul></div></section>'
    )


def _calibration(report: Report) -> str:
    if report.calibration is None:
        return ""
    rows = "".join(f"<dt>{escape(what)}</dt><dd>{escape(said)}</dd>" for what, said in facts(report.calibration))
    return (
        '<section><h2>Calibration</h2><div class="card"><p class="because">What the harness itself costs on this '
        f"machine, with nothing behind it.</p><dl>{rows}</dl></div></section>"
    )


def _environment(report: Report) -> str:
    machine = report.environment
    facts = [
        ("System", f"{machine.system}, {machine.machine}"),
        ("Processor", machine.cpu),
        ("Instruction sets", ", ".join(machine.instruction_sets) or "none of note"),
        ("Cores and memory", f"{machine.cores_in_words}, {cells.size(machine.memory_bytes)}"),
        ("GPU", ", ".join(machine.gpus) or "none"),
        ("Python", machine.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())),
    ]
    if report.command:
        facts.append(("To repeat it", shlex.join(report.command)))
    rows = "".join(
        f"<dt>{what}</dt><dd>{f'<code>{escape(value)}</code>' if what == 'To repeat it' else escape(value)}</dd>"
        for what, value in facts
    )
    return f'<section><h2>Environment</h2><div class="card"><dl>{rows}</dl></div></section>'


def _footer(report: Report) -> str:
    return (
        f"<footer>Made by dlops {escape(report.dlops_version)}. Every number comes from report.json and the raw "
        "samples beside this page.</footer>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
