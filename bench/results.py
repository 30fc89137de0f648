"""A report in memory, and what one does with it: put several together, choose a variant, write it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from dlops.bench import stats
from dlops.bench.render import render_html
from dlops.directory import DirectoryWriter, write_json
from dlops.environment import Environment
from dlops.errors import UsageError, from_os_error
from dlops.report import SUFFIXES, Measurement, Objective, Profile, Report, Telemetry

HTML_NAME = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """report: not yet in a directory. samples: int64 arrays under the names that Report.raw_samples describes.

    traces: the files of the report's profiles by their role.
    """

    report: Report
    samples: dict[str, NDArray[np.int64]]
    traces: dict[str, bytes] = field(default_factory=dict)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return self.report.measurements

    @property
    def partial(self) -> bool:
        return self.report.partial


class MeasureInterrupted(KeyboardInterrupt):
    """Ctrl-C in the middle; `measured` holds the rows made until then, at least one, and is marked partial."""

    def __init__(self, measured: Measured) -> None:
        super().__init__()
        self.measured = measured


def merge(first: Measured, *others: Measured) -> Measured:
    """One report with the rows of all in order; title, command, baseline and choice are the first's that has one.

    Raises UsageError where they are not of one machine with the same versions: a report has one environment.
    """
    parts = (first, *others)
    here = first.report.environment
    for other in (part.report.environment for part in others):
        differing = [name for name in Environment.model_fields if getattr(other, name) != getattr(here, name)]
        if differing:
            raise UsageError(
                f"these reports are of different environments ({', '.join(differing)})",
                hint="dlops compare BASE NEW sets them side by side",
            )
    numbers = itertools.count()
    rows: list[Measurement] = []
    samples: dict[str, NDArray[np.int64]] = {}
    objectives: dict[str, Objective] = {}
    telemetry: list[Telemetry] = []
    for part in parts:
        keys = {row.samples: row_key(next(numbers)) for row in part.report.measurements}
        for row in part.report.measurements:
            key = keys[row.samples]
            for suffix in SUFFIXES:
                if row.samples + suffix in part.samples:
                    samples[key + suffix] = part.samples[row.samples + suffix]
            paired_with = keys[row.paired_with] if row.paired_with else None
            rows.append(row.model_copy(update={"samples": key, "paired_with": paired_with}))
        for target, one in part.report.objectives.items():
            objectives[target] = one.model_copy(update={"tried": tuple(keys[key] for key in one.tried)})
        for watched in part.report.telemetry:
            new = telemetry_key(len(telemetry))
            arrays = {name: part.samples[name] for name in part.samples if name.startswith(watched.key + ".")}
            samples |= {new + name.removeprefix(watched.key): array for name, array in arrays.items()}
            spans = {keys[key]: span for key, span in watched.spans.items() if key in keys}
            telemetry.append(watched.model_copy(update={"key": new, "spans": spans}))
    numbers = itertools.count()
    profiles: list[Profile] = []
    traces: dict[str, bytes] = {}
    for part in parts:
        for profile in part.report.profiles:
            role = trace_role(next(numbers))
            traces[role] = part.traces[profile.trace]
            profiles.append(profile.model_copy(update={"trace": role}))
    reports = [part.report for part in parts]
    chosen = next((report for report in reports if report.chosen), first.report)
    report = first.report.model_copy(
        update={
            "measurements": tuple(rows),
            "objectives": objectives,
            "baseline": next((report.baseline for report in reports if report.baseline), None),
            "chosen": chosen.chosen,
            "chosen_because": chosen.chosen_because,
            "max_drop": chosen.max_drop,
            "notes": tuple(dict.fromkeys(note for report in reports for note in report.notes)),
            "partial": any(report.partial for report in reports),
            "profiles": tuple(profiles),
            "telemetry": tuple(telemetry),
        }
    )
    return Measured(report=report, samples=samples, traces=traces)


def choose_fastest(measured: Measured, *, max_drop: float) -> Measured:
    """The same with `chosen`: the artifact of the lowest median in process that loses at most `max_drop` points.

    Rows at the smallest batch measured count. An artifact whose accuracy is not known is not chosen. Where too few
    calls were made to certify the median of the one chosen, `chosen_because` says so: to take a slower one for being
    surer of it would be worse. Where nothing qualifies, `chosen` is None and `chosen_because` says why.
    """
    rows = [row for row in measured.measurements if row.boundary == "host" and row.artifact and row.load.rate is None]
    fewest = min((row.load.concurrency for row in rows), default=1)
    rows = [row for row in rows if row.load.concurrency == fewest]
    smallest = min((row.load.batch for row in rows), default=1)
    candidates = [row for row in rows if row.load.batch == smallest]
    kept = [row for row in candidates if row.drop_points is not None and row.drop_points <= max_drop]
    rest = _what_the_rest_lose(candidates, kept)
    if not kept:
        return _with_choice(measured, max_drop, None, f"no variant is known to lose {_at_most(max_drop)}: {rest}")
    best = min(kept, key=lambda row: float(np.median(measured.samples[row.samples])))
    if len(candidates) == 1:
        because = f"the only variant measured, and it loses {_at_most(max_drop)}"
    elif len(kept) == 1:
        because = f"the only variant that is known to lose {_at_most(max_drop)} ({rest})"
    elif rest:
        because = f"the fastest at batch {smallest} of the {len(kept)} variants that lose {_at_most(max_drop)} ({rest})"
    else:
        because = f"the fastest of {len(kept)} variants at batch {smallest}, and all of them lose {_at_most(max_drop)}"
    if best.latency.p50_ns is None:
        because += "; too few calls were made to be sure of its median"
    elif alike := [
        row.target for row in kept if row is not best and stats.overlap(row.latency.p50_ns, best.latency.p50_ns)
    ]:
        because += f"; by the intervals of their p50 it is not told from {', '.join(alike)}"
    if not best.verdict.steady:
        because += "; its row is not to be quoted, for the reasons beside it"
    return _with_choice(measured, max_drop, best.target, because)


def save_report(measured: Measured, directory: Path | str | None = None) -> Report:
    """Write report.json, samples and traces beside it and report.html.

    A kill leaves the old report or the new one, at worst without its page, and never a page of another report.

    directory: by default reports/<time> in the working folder. Raises MachineError where it cannot be written,
    UsageError where something else is in its place or the working folder is gone.
    """
    directory = _fresh_directory() if directory is None else Path(directory)
    with DirectoryWriter(directory) as writer:
        files = {"samples": writer.add("samples.safetensors", save(measured.samples))}
        for profile in measured.report.profiles:
            files[profile.trace] = writer.add(_trace_name(profile), measured.traces[profile.trace])
        report = measured.report.model_copy(update={"files": files})
        page = render_html(report, measured.samples)
        _remove_page(directory)
        report = writer.commit(report)
    write_json(directory / HTML_NAME, page)
    return report


def _remove_page(directory: Path) -> None:
    try:
        (directory / HTML_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, doing=f"replacing {directory / HTML_NAME}") from error


def row_key(number: int) -> str:
    return f"row{number:02d}"


def telemetry_key(number: int) -> str:
    return f"telemetry{number:02d}"


def trace_role(number: int) -> str:
    return f"trace{number:02d}"


def _trace_name(profile: Profile) -> str:
    model = re.sub(r"[^A-Za-z0-9]+", "_", profile.artifact or profile.target)
    return f"trace_{model}_batch{profile.batch}.json.gz"


def _at_most(max_drop: float) -> str:
    if max_drop == 0:
        return "no accuracy"
    return f"at most {max_drop:g} percentage point{'' if max_drop == 1 else 's'} of accuracy"


def _what_the_rest_lose(candidates: Sequence[Measurement], kept: Sequence[Measurement]) -> str:
    """`2 lose more, and the accuracy of 1 is not known`; empty where nothing was left out."""
    unknown = sum(row.drop_points is None for row in candidates)
    more = len(candidates) - len(kept) - unknown
    parts = [f"{more} lose{'s' if more == 1 else ''} more"] if more else []
    parts += [f"the accuracy of {unknown} is not known"] if unknown else []
    return ", and ".join(parts)


def _with_choice(measured: Measured, max_drop: float, chosen: str | None, because: str) -> Measured:
    report = measured.report.model_copy(update={"chosen": chosen, "chosen_because": because, "max_drop": max_drop})
    return replace(measured, report=report)


def _fresh_directory() -> Path:
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    candidates = itertools.chain([stamp], (f"{stamp}-{number}" for number in itertools.count(2)))
    return next(path for name in candidates if not (path := Path("reports") / name).exists())
