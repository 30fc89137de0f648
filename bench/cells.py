"""How a measurement's numbers are written: the same in the console, Markdown and HTML."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dlops.bench.knee import knee
from dlops.report import Interval, Measurement, Report, ServerTime

NONE = "–"
# The part of a request's time at the client that the server does not count.
OUTSIDE = "network and framework"
LOADGEN = "LoadGen, non-MLPerf workload"
_NUMBER = re.compile(r"(?<![A-Za-z\d])[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?")
COLUMNS = (
    "size", "acc %", "change", "result", "p50 ms", "p99 ms", "service p99", "items/s", "speed", "memory", "energy"
)  # fmt: skip
# A dash in these is a finding, in the others only what does not apply.
_ALWAYS = ("p50 ms", "p99 ms", "items/s")
# What the console leaves out where it shows results of scenarios; pages, Markdown and CSV have it.
_BESIDE_RESULT = ("size", "acc %", "change", "service p99")
BOUNDARIES = {
    "device": "on the device",
    "host": "in process",
    "preprocessing": "in process, preprocessing included",
    "network": "over HTTP",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows under one load at one boundary, which are the ones to compare. title says which."""

    title: str
    rows: tuple[Measurement, ...]


def told_apart(report: Report) -> Report:
    """The report for showing: where two models have a variant of one slug, each is called by its target instead."""
    local = [row for row in report.measurements if row.boundary != "network"]
    titles = {(row.artifact, row.target.partition("#")[0]) for row in local}
    slugs = [slug for slug, _ in titles if slug]
    shared = {slug for slug in slugs if slugs.count(slug) > 1}
    if not shared:
        return report
    rows = [
        row.model_copy(update={"artifact": None}) if row.boundary != "network" and row.artifact in shared else row
        for row in report.measurements
    ]
    profiles = [one.model_copy(update={"artifact": None}) if one.artifact in shared else one for one in report.profiles]
    return report.model_copy(update={"measurements": tuple(rows), "profiles": tuple(profiles)})


def groups(report: Report) -> list[Group]:
    """The rows by boundary, batch and, where a target ran with several, by threads and device, in the order measured.

    Network rows of one transport are together, whatever their concurrencies and rates; by target where several of one
    transport serve the same artifact.
    """
    local = [row for row in report.measurements if row.boundary != "network"]
    remote = [row for row in report.measurements if row.boundary == "network"]
    services_vary = _vary((f"{over_grpc(row)} {model(row)}", row.target) for row in remote)
    threads_vary = _vary((row.target, row.threads) for row in local)
    devices_vary = _vary((row.target, row.device) for row in local)

    def under(row: Measurement) -> str:
        title = f"{'over gRPC' if over_grpc(row) else BOUNDARIES[row.boundary]}, {_load(row)}"
        if row.engine == "loadgen":
            title = f"{LOADGEN}: {title}"
        if row.boundary == "network":
            return f"{title}, {row.target}" if services_vary else title
        title += f", {row.threads} thread{'' if row.threads == 1 else 's'}" if threads_vary else ""
        return title + (f", on {row.device}" if devices_vary else "")

    found: dict[str, list[Measurement]] = {}
    for row in report.measurements:
        found.setdefault(under(row), []).append(row)
    return [Group(title=title, rows=tuple(rows)) for title, rows in found.items()]


def _load(row: Measurement) -> str:
    """`batch 32`, or the scenario that was asked for by name."""
    if row.load.metric is None:
        return f"batch {row.load.batch}"
    items = {"multi_stream": f" of {row.load.batch}", "offline": f", batch {row.load.batch}"}
    return row.load.scenario + items.get(row.load.scenario, "")


def over_grpc(row: Measurement) -> bool:
    return row.boundary == "network" and row.target.startswith("oip+grpc://")


def _vary(pairs: Iterable[tuple[str, object]]) -> bool:
    """Whether any name comes with two values."""
    seen = set(pairs)
    return len({name for name, _ in seen}) < len(seen)


def name(row: Measurement) -> str:
    """What a row is called inside its group, in full."""
    if row.load.rate is not None:
        return f"{model(row)} at {row.load.rate:,.5g} a second"
    return f"{model(row)} with {row.load.concurrency} in flight" if _says_in_flight(row) else model(row)


def short_name(row: Measurement) -> str:
    """The same where there is no room: `onnx-int8 ×8` with 8 requests in flight, `onnx-int8 @500` at 500 a second."""
    if row.load.rate is not None:
        return f"{model(row)} @{row.load.rate:,.5g}"
    return f"{model(row)} ×{row.load.concurrency}" if _says_in_flight(row) else model(row)


def _says_in_flight(row: Measurement) -> bool:
    # A stream is one call at a time by its name, and in process that is what is usual.
    if row.boundary != "network":
        return row.load.concurrency > 1
    return row.load.metric is None or row.load.scenario == "offline"


def model(row: Measurement) -> str:
    """What was measured, whatever the load."""
    if row.boundary == "network":
        return row.artifact or row.target
    return row.artifact if row.artifact and "#" not in row.target else row.target


def service(row: Measurement) -> str:
    """What a report's objectives call the service that the row is of."""
    return row.target if row.load.batch == 1 else f"{row.target} at batch {row.load.batch}"


def headings(rows: Sequence[Measurement]) -> list[str]:
    """Latency, throughput and the columns that hold anything for these rows, variant first."""
    filled = [values(row) for row in rows]
    return ["variant", *[one for one in COLUMNS if one in _ALWAYS or any(cell[one] != NONE for cell in filled)]]


def console_headings(rows: Sequence[Measurement]) -> list[str]:
    """The same for 80 characters: beside a scenario's result there is no room for everything."""
    left_out = _BESIDE_RESULT if any(row.load.metric is not None for row in rows) else ()
    return [one for one in headings(rows) if one not in left_out]


def values(row: Measurement) -> dict[str, str]:
    """Every column of a row but its name, as text."""
    texts = (
        size(row.model_bytes),
        percent(row.accuracy),
        change(row.drop_points),
        result(row),
        milliseconds(row.latency.p50_ns),
        milliseconds(row.latency.p99_ns),
        NONE if row.service is None else milliseconds(row.service.p99_ns),
        rate(row.throughput),
        ratio(row.speedup),
        size(row.peak_memory_bytes),
        energy(row.energy_j_per_item),
    )
    return dict(zip(COLUMNS, texts, strict=True))


def ranges(row: Measurement) -> dict[str, str]:
    """The 95 % intervals of a row's columns, and how many predictions changed; a column without one is left out."""
    intervals = {"p50 ms": row.latency.p50_ns, "p99 ms": row.latency.p99_ns, "speed": row.speedup}
    texts = {}
    for column, interval in intervals.items():
        if interval is not None and interval.low is not None and interval.high is not None:
            scale = 1.0 if column == "speed" else 1e6
            texts[column] = f"{significant(interval.low / scale)}–{significant(interval.high / scale)}"
    if row.throughput.low is not None and row.throughput.high is not None:
        texts["items/s"] = f"{_rate(row.throughput.low)}–{_rate(row.throughput.high)}"
    if (
        row.load.metric is not None
        and (interval := row.result)
        and interval.low is not None
        and interval.high is not None
    ):
        scale, number = (1.0, _rate) if row.load.metric == "throughput" else (1e6, significant)
        texts["result"] = f"{number(interval.low / scale)}–{number(interval.high / scale)}"
    if row.flips is not None:
        texts["change"] = f"{row.flips} of {row.accuracy_samples} flipped"
    return texts


def result(row: Measurement) -> str:
    """Its scenario's number, where it was asked for by name: `p90 0.21 ms`, `9,105/s`."""
    if row.load.metric is None:
        return NONE
    if row.load.metric == "throughput":
        return f"{rate(row.throughput)}/s"
    return f"{row.load.metric} {NONE if row.result is None else f'{milliseconds(row.result)} ms'}"


def milliseconds(interval: Interval | None) -> str:
    return NONE if interval is None else significant(interval.value / 1e6)


def rate(interval: Interval) -> str:
    return _rate(interval.value)


def ratio(interval: Interval | None) -> str:
    return NONE if interval is None else f"{significant(interval.value)}×"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.2f}"


def change(drop_points: float | None) -> str:
    """A drop as a signed change: −0.28 is 0.28 points lost."""
    if drop_points is None:
        return NONE
    return f"{-drop_points:+.2f}".replace("-", "−") if round(drop_points, 2) else "0.00"


def size(byte_count: int | None) -> str:
    if byte_count is None:
        return NONE
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if byte_count >= scale:
            value = byte_count / scale
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    return f"{byte_count} B"


def energy(joules: float | None) -> str:
    if joules is None:
        return NONE
    unit, scale = next(((unit, scale) for unit, scale in (("J", 1.0), ("mJ", 1e-3)) if joules >= scale), ("µJ", 1e-6))
    return f"{significant(joules / scale)} {unit}"


def significant(value: float) -> str:
    """Three significant digits, never in exponents: 0.0123, 1.23, 12.3, 123, 1,234."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2
    while abs(value) < 10 ** (2 - digits) and digits < 6:
        digits += 1
    return f"{value:.{digits if abs(value) < 10 else 1}f}"


def footnotes(report: Report) -> list[str]:
    """What a reader must know about the rows: one line for each thing that stands against them.

    Rows of a section against which the same thing stands share a line, which gives its numbers as a range.
    """
    lines = []
    for group in groups(report):
        by_form: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        for row in group.rows:
            for reason in row.verdict.reasons:
                # Status codes and the like are no quantities: errors are joined only where they are the same.
                form = (reason,) if row.errors and "failed" in reason else tuple(_NUMBER.split(reason))
                by_form.setdefault(form, []).append((name(row), reason))
        for found in by_form.values():
            rows = ", ".join(dict.fromkeys(row for row, _ in found))
            lines.append(f"{group.title}: {rows}: {_in_one([reason for _, reason in found])}")
    if report.partial:
        lines.insert(0, "This report is partial: the run was interrupted or a target failed.")
    return [*lines, *report.notes]


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
        if one.rate is None:
            lines.append(
                f"{target}: no rate tried certainly kept {wanted}; the lowest was {_rate(one.missed or 0.0)} a second"
            )
        else:
            beyond = (
                f"; {_rate(one.missed)} could not be shown to" if one.missed is not None else "; the search ended there"
            )
            lines.append(
                f"{target}: {_rate(one.rate)} requests a second is the highest rate that kept {wanted}{beyond}"
            )
    return lines


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


def explanations(report: Report) -> list[str]:
    """What was found of the objectives, what the columns and marks mean here, where time went in
    servers, then the footnotes."""
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
    return [*lines, *footnotes(report)]


def placements(rows: Sequence[Measurement]) -> list[str]:
    """Where rows truly ran, one line for each distinct place."""
    places: dict[str, list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    for row in rows:
        threads = f", {row.threads} threads" if row.threads and row.threads > 1 else ", 1 thread" if row.threads else ""
        place = f"{row.runtime} on {row.provider}{threads}"
        if row.boundary == "network":
            place = f"{row.target} ({row.runtime})"
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


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else significant(value)
