"""What is said of a report's rows below its tables, a sentence each: the same in the console, Markdown and HTML."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from dlops.bench.cells import OUTSIDE, groups, milliseconds, name, per_second, significant
from dlops.bench.knee import knee
from dlops.bench.pilot import WANTED
from dlops.bench.slo import INTERRUPTED
from dlops.report import Measurement, Objective, Report, ServerTime

_NUMBER = re.compile(r"(?<![A-Za-z\d])[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?")


def footnotes(report: Report, *, brief: bool = False) -> list[str]:
    """What a reader must know about the rows: one line for each thing that stands against them.

    Rows of a section against which the same thing stands share a line, which gives its numbers as a range. brief: what
    is under-sampled stands against no row, and is one line for them all.
    """
    lines = []
    short = sum(any(map(_is_of_samples, row.verdict.reasons)) for row in report.measurements) if brief else 0
    for group in groups(report):
        by_form: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        for row in group.rows:
            for reason in row.verdict.reasons:
                if brief and _is_of_samples(reason):
                    continue
                # Status codes and the like are no quantities: errors are joined only where they are the same.
                form = (reason,) if row.errors and "failed" in reason else tuple(_NUMBER.split(reason))
                by_form.setdefault(form, []).append((name(row), reason))
        for found in by_form.values():
            rows = ", ".join(dict.fromkeys(row for row, _ in found))
            lines.append(f"{group.title}: {rows}: {_in_one([reason for _, reason in found])}")
    if short:
        lines.append(
            f"under-sampled: {short} of {len(report.measurements)} rows do not know p50 to "
            f"±{WANTED[0.5]:.0%} and p99 to ±{WANTED[0.99]:.0%}; report.html says what each knows, and for how long to "
            "measure"
        )
    if report.partial:
        lines.insert(0, "This report is partial: the run was interrupted or a target failed.")
    return [*lines, *report.notes]


def _is_of_samples(reason: str) -> bool:
    return reason.startswith("under-sampled")


def _in_one(reasons: Sequence[str]) -> str:
    """Reasons that differ in their numbers alone, each number as its range: "vary by 28% to 183%"."""
    words = _NUMBER.split(reasons[0])
    text = words[0]
    for number, word in zip(zip(*map(_NUMBER.findall, reasons), strict=True), words[1:], strict=True):
        low, high = (pick(number, key=lambda one: float(one.strip("%").replace(",", ""))) for pick in (min, max))
        text += (low if low == high else f"{low} to {high}") + word
    return text


def objectives(report: Report) -> list[str]:
    """What was found of each objective, a sentence each."""
    lines = []
    for target, one in report.objectives.items():
        wanted = f"{one.quantile} ≤ {significant(one.limit_ns / 1e6)} ms"
        missed = None if one.missed is None else per_second(one.missed)
        how = "could not be judged, for the reasons of its row" if one.unsure else "did not"
        if one.rate is None:
            tried = "none was tried" if missed is None else f"the lowest, {missed} a second, {how}"
            parts = [f"no rate tried certainly kept {wanted}", tried]
        else:
            is_highest = "kept" if one.stopped else "is the highest rate that kept"
            parts = [f"{per_second(one.rate)} requests a second {is_highest} {wanted}"]
            if missed is not None or not one.stopped:
                parts.append("the search ended there" if missed is None else f"{missed} {how}")
        if one.stopped:
            parts.append(_cut_short(one))
        lines.append(f"{target}: {'; '.join(parts)}{_in_spite_of(report, one)}")
    return lines


def _cut_short(one: Objective) -> str:
    if one.stopped != INTERRUPTED:
        return f"the search ended early: {one.stopped}"
    return "the search was interrupted" + (" before a higher one was judged" if one.missed is None else "")


def _in_spite_of(report: Report, one: Objective) -> str:
    """What stands against the row by which the highest rate is known. What slowed it down could not make it keep more
    than it would have kept, so the rate stands; the row's own numbers do not."""
    tried = [row for row in report.measurements if row.samples in one.tried and row.load.rate == one.rate]
    if not tried or tried[-1].verdict.steady:
        return ""
    verdict = tried[-1].verdict
    against = [why for why in verdict.reasons if why not in verdict.remarks and not _is_of_samples(why)]
    # Where nothing else stands against it, its median is not known.
    return f"; its row is not to be quoted: {'; '.join(against or verdict.reasons)}"


def knees(report: Report) -> list[str]:
    """Where each service is best used, a sentence each; none where too few loads were tried to say."""
    lines = []
    for group in groups(report):
        # Those that the curves have a point of: where nothing is certified, the mean is worth as little.
        rows = [
            row for row in group.rows
            if row.boundary == "network" and row.throughput.value > 0 and (row.latency.p50_ns or row.latency.p99_ns)
        ]  # fmt: skip
        rows.sort(key=lambda row: (row.target, row.load.rate is not None, row.load.rate or 0.0, row.load.concurrency))
        for _, alike in itertools.groupby(rows, key=lambda row: (row.target, row.load.rate is not None)):
            best = knee(list(alike))
            if best is not None:
                lines.append(
                    f"{group.title}: {name(best)} is the knee, the most throughput for the mean time: with more load "
                    "the time grows faster than the throughput"
                )
    return lines


def parts(server: ServerTime) -> dict[str, float]:
    """The parts of a request's mean time at the client, in ns, in the order that it goes through them; the cache only
    where there is one."""
    cache = {"cache": server.cache_ns} if server.cache_ns else {}
    return {
        "queue": server.queue_ns, "input": server.compute_input_ns, **cache, "model": server.compute_infer_ns,
        "output": server.compute_output_ns, OUTSIDE: server.outside_ns,
    }  # fmt: skip


def waterfalls(report: Report) -> list[str]:
    """Where a request's time went, a line for each row whose server says so."""
    lines = []
    for group in groups(report):
        for row in group.rows:
            if row.server is None:
                continue
            times = ", ".join(f"{part} {significant(ns / 1e6)}" for part, ns in parts(row.server).items())
            batch = row.server.mean_batch
            formed = "" if batch is None else f"; {significant(batch)} items a run of the model"
            whole = significant(row.server.client_ns / 1e6)
            lines.append(f"{group.title}: {name(row)}: a mean request's {whole} ms: {times}{formed}")
    return lines


def clock_lines(report: Report) -> list[str]:
    """Where a call on a GPU spends its time, a line for each row that knows it."""
    lines = []
    for group in groups(report):
        for row in group.rows:
            if row.clocks is None:
                continue
            parts = {
                "call": row.latency, "GPU": row.clocks.device, "enqueueing": row.clocks.enqueue,
                "copy in": row.clocks.copy_in, "copy out": row.clocks.copy_out,
            }  # fmt: skip
            medians = [f"{what} {milliseconds(one.p50_ns)}" for what, one in parts.items() if one is not None]
            lines.append(f"{group.title}: {name(row)}: medians in ms: {', '.join(medians)}")
    return lines


def explanations(report: Report, *, brief: bool = False) -> list[str]:
    """What was found of the objectives, what the columns and marks mean here, where time went in servers, then the
    footnotes, `brief` or in full."""
    lines = [*objectives(report), *knees(report)]
    if report.baseline:
        lines.append(f"speed: how many times faster than {report.baseline}, from turns taken in the same run")
    if any(row.load.rate is not None for row in report.measurements):
        lines.append("at a rate, p50 and p99 are of the response time, from when a request was due to its answer")
    if any(row.service is not None and row.service.p99_ns is not None for row in report.measurements):
        local = any(row.service and row.boundary != "network" and row.engine == "dlops" for row in report.measurements)
        alone = "; in process, of its call alone" if local else ""
        lines.append(f"service p99: in ms, from a request's send to its answer{alone}")
    if any(row.load.metric is not None for row in report.measurements):
        lines.append("result: by MLPerf's rules the number of its scenario")
    sources = dict.fromkeys(name for row in report.measurements for name in row.energy_sources)
    if sources:
        lines.append(f"energy: of an item, by the counters of {', '.join(sources)}, which count all that they power")
    lines += [*waterfalls(report), *clock_lines(report)]
    if any(not row.verdict.steady for row in report.measurements):
        lines.append("*: not to be quoted, for the reason below")
    return [*lines, *footnotes(report, brief=brief)]


def placements(rows: Sequence[Measurement]) -> list[str]:
    """Where rows truly ran, one line for each distinct place."""
    places: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    for row in rows:
        threads = f", {row.threads} threads" if row.threads and row.threads > 1 else ", 1 thread" if row.threads else ""
        place = f"{row.runtime} on {row.provider}{threads}"
        if row.boundary == "network":
            place = f"{row.target} ({row.runtime}{f', served by {row.served_by}' if row.served_by else ''})"
        places.setdefault(place, []).append(name(row))
        if said := _elsewhere(row):
            elsewhere.setdefault(said, []).append(name(row))
    return [f"{what}: {', '.join(dict.fromkeys(names))}" for what, names in (places | elsewhere).items()]


def _elsewhere(row: Measurement) -> str | None:
    """Which nodes of its graph its own provider did not take; None where it took all, or that is not known."""
    own = row.provider.partition(",")[0]
    others = {provider: counts for provider, counts in row.nodes.items() if provider != own}
    if not others:
        return None
    total = sum(sum(counts.values()) for counts in row.nodes.values())
    parts = []
    for provider, counts in others.items():
        kinds = ", ".join(kind if count == 1 else f"{kind} ×{count}" for kind, count in counts.items())
        parts.append(f"{sum(counts.values())} of {total} nodes on {provider} ({kinds})")
    return "; ".join(parts)
