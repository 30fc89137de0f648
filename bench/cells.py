"""How a measurement's numbers and names are written: the same in the console, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dlops.report import Interval, Load, Measurement, Report

NONE = "–"
# The part of a request's time at the client that the server does not count.
OUTSIDE = "network and framework"
LOADGEN = "LoadGen, non-MLPerf workload"
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
        title += f", {row.processes} processes" if row.processes > 1 else ""
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
        return f"{model(row)} at {offered(row.load)}"
    return f"{model(row)} with {row.load.concurrency} in flight" if _says_in_flight(row) else model(row)


def short_name(row: Measurement) -> str:
    """The same where there is no room: `onnx-int8 ×8` with 8 requests in flight, `onnx-int8 @500` at 500 a second."""
    if row.load.rate is not None:
        words = "".join(f" {word}" for word in _schedule(row.load))
        return f"{model(row)} @{row.load.rate:,.5g}{words}{_second(row.load)}"
    return f"{model(row)} ×{row.load.concurrency}" if _says_in_flight(row) else model(row)


def offered(load: Load) -> str:
    """`500 a second`, and how they came where that is not as from independent users without pauses."""
    return ", ".join([f"{load.rate:,.5g} a second", *_schedule(load)]) + _second(load)


def _second(load: Load) -> str:
    return "" if load.attempt == 1 else f" ({'second' if load.attempt == 2 else 'third'} try)"


def _schedule(load: Load) -> list[str]:
    words = []
    if load.arrivals == "trace":
        words.append(f"trace {(load.trace or '')[:6]}")
    elif load.arrivals == "constant":
        words.append("constant")
    if load.pauses_s is not None:
        words.append(f"{load.pauses_s[0]:g} s busy, {load.pauses_s[1]:g} s idle")
    return words


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
        _tail(row.latency.p99_ns),
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
        texts["items/s"] = f"{per_second(row.throughput.low)}–{per_second(row.throughput.high)}"
    if (
        row.load.metric is not None
        and (interval := row.result)
        and interval.low is not None
        and interval.high is not None
    ):
        scale, number = (1.0, per_second) if row.load.metric == "throughput" else (1e6, significant)
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


def _tail(interval: Interval | None) -> str:
    """A p99, where it is known to the factor of two at least: what may be four hundred times as much is no number."""
    if interval is None or interval.high is None or interval.high > 2 * interval.value:
        return NONE
    return milliseconds(interval)


def milliseconds(interval: Interval | None) -> str:
    return NONE if interval is None else significant(interval.value / 1e6)


def rate(interval: Interval) -> str:
    return per_second(interval.value)


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


def per_second(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else significant(value)
