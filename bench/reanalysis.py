"""A kept report worked out again from its raw samples, by the statistics of this version; nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dlops.bench.analysis import Figures, analyse_closed_loop, analyse_rate, analyse_turns
from dlops.bench.results import Measured, choose_fastest
from dlops.bench.slo import found_among, judge
from dlops.errors import CorruptError, UsageError
from dlops.report import CLOCKS, EARLIER, PROCESSES, SERVICE, STARTS, TURNS, Measurement, Objective, Report
from dlops.timing import by_turn
from dlops.version import __version__

Arrays = Mapping[str, NDArray[np.int64]]


def reanalyse(report: Report) -> Measured:
    """The report with every number that follows from its samples made anew; `save_report` writes it.

    Quantiles, throughput and speed-ups with their intervals, verdicts, the rates that kept objectives and the choice
    are new. What no sample shows (targets, failed calls, warm-up, accuracy, memory, lag) stays, and so do the machine,
    the time and the command that measured it; a note says who worked it out. By the version that measured it, every
    row comes out the same to the last bit.

    Raises UsageError where a row does not keep what it takes, CorruptError where its samples do not belong together or
    it names rows that are not there.
    """
    _check_rows(report)
    samples = report.raw_samples()
    rows = {row.samples: row for row in report.measurements}
    new = {key: row.model_copy(update=_figures(report, row, rows, samples).as_fields()) for key, row in rows.items()}
    objectives = {target: _found_again(report, one, new, samples) for target, one in report.objectives.items()}
    update = {"measurements": tuple(new.values()), "objectives": objectives}
    traces = {one.trace: report.path(one.trace).read_bytes() for one in report.profiles}
    measured = Measured(report=report.model_copy(update=update), samples=samples, traces=traces)
    if report.max_drop is not None:
        measured = choose_fastest(measured, max_drop=report.max_drop)
    note = f"worked out again from its samples by dlops {__version__}: {_what_changed(report, measured.report)}"
    notes = tuple(dict.fromkeys((*report.notes, note)))
    return replace(measured, report=measured.report.model_copy(update={"notes": notes}))


def _check_rows(report: Report) -> None:
    """Raise CorruptError for what no version writes: no rows, two of one key, or telemetry of others."""
    keys = [row.samples for row in report.measurements]
    if not keys:
        raise CorruptError(f"{report.directory}: a report without rows")
    if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
        raise CorruptError(f"{report.directory}: two rows have the samples {twice}")
    if unknown := {key for one in report.telemetry for key in one.spans} - set(keys):
        raise CorruptError(f"{report.directory}: telemetry names {', '.join(sorted(unknown))}, which are no rows")


def _figures(report: Report, row: Measurement, rows: Mapping[str, Measurement], samples: Arrays) -> Figures:
    observed = row.verdict.observed
    if observed is None:
        raise _keeps_too_little(report, row)
    batch = row.load.batch
    if row.load.rate is not None:
        if row.duration_ns is None or row.lag_p99_ns is None:
            raise _keeps_too_little(report, row)
        response, due, service = _arrays(report, row, samples, "", STARTS, SERVICE)
        if not (service >= 0).any():
            raise CorruptError(f"{report.path('samples')}: {row.samples}: no request of it succeeded")
        (earlier,) = _arrays(report, row, samples, EARLIER, aligned=False)
        return analyse_rate(
            response, due, service, earlier, duration_ns=row.duration_ns, lag_p99_ns=row.lag_p99_ns, batch=batch,
            observed=observed, remarks=row.verdict.remarks,
        )  # fmt: skip
    if row.duration_ns is not None:
        latencies, starts = _arrays(report, row, samples, "", STARTS)
        (earlier,) = _arrays(report, row, samples, EARLIER, aligned=False)
        service = _arrays(report, row, samples, SERVICE)[0] if row.samples + SERVICE in samples else latencies
        return analyse_closed_loop(
            latencies, starts, earlier, duration_ns=row.duration_ns, batch=batch, succeeded=service >= 0,
            observed=observed, remarks=row.verdict.remarks,
        )  # fmt: skip
    latencies, turns = _arrays(report, row, samples, "", TURNS)
    return analyse_turns(
        latencies, turns, _parts(report, row, samples), batch=batch, concurrency=row.load.concurrency,
        processes=None if row.processes == 1 else _arrays(report, row, samples, PROCESSES)[0],
        baseline=_baseline(report, row, rows, samples),
        observed=observed, remarks=row.verdict.remarks,
    )  # fmt: skip


def _parts(report: Report, row: Measurement, samples: Arrays) -> dict[str, NDArray[np.int64]]:
    """What else was timed of each call, by the suffix of CLOCKS."""
    if row.clocks is None:
        return {}
    suffixes = [suffix for suffix, field in CLOCKS.items() if getattr(row.clocks, field) is not None]
    return dict(zip(suffixes, _arrays(report, row, samples, *suffixes), strict=True))


def _baseline(
    report: Report, row: Measurement, rows: Mapping[str, Measurement], samples: Arrays
) -> list[NDArray[np.int64]] | None:
    """The turns that the row's are paired with, of the same rounds; of several processes, those."""
    if row.paired_with is None:
        return None
    base = rows.get(row.paired_with)
    if base is None:
        raise CorruptError(f"{report.directory}: {row.samples} is paired with {row.paired_with}, which is no row")
    blocks = TURNS if row.processes == 1 else PROCESSES
    latencies, turns = _arrays(report, base, samples, "", blocks)
    (own,) = _arrays(report, row, samples, blocks)
    if len(by_turn(latencies, turns)) != len(by_turn(own, own)):
        raise CorruptError(
            f"{report.path('samples')}: {row.samples} and {base.samples} were not made in the same rounds"
        )
    return by_turn(latencies, turns)


def _arrays(
    report: Report, row: Measurement, samples: Arrays, *suffixes: str, aligned: bool = True
) -> list[NDArray[np.int64]]:
    """A row's arrays of those names; aligned: one entry a call."""
    names = [row.samples + suffix for suffix in suffixes]
    if missing := [name for name in names if name not in samples]:
        raise CorruptError(f"{report.path('samples')}: no {', '.join(missing)}")
    arrays = [samples[name] for name in names]
    shape = samples[row.samples].shape
    if any(array.ndim != 1 or (aligned and (array.shape != shape or not array.size)) for array in arrays):
        raise CorruptError(f"{report.path('samples')}: {', '.join(names)} do not hold one number a call")
    return arrays


def _found_again(report: Report, one: Objective, rows: Mapping[str, Measurement], samples: Arrays) -> Objective:
    """What the search found, by today's judgement of each rate that it tried."""
    if unknown := set(one.tried) - rows.keys():
        raise CorruptError(f"{report.directory}: an objective names {', '.join(sorted(unknown))}, which are no rows")
    if not one.tried:
        raise UsageError(
            f"{report.directory}: it does not say with which rows its objective was looked for: an older dlops made it",
            hint="measure it again",
        )
    outcomes = []
    for key in one.tried:
        row = rows[key]
        if row.load.rate is None:
            raise CorruptError(f"{report.directory}: an objective was looked for with {key}, which is under no rate")
        outcomes.append((row.load.rate, judge(row, samples[key], samples[key + STARTS], one)))
    found = found_among(outcomes)
    return one.model_copy(update={"rate": found.met, "missed": found.missed, "unsure": found.unsure})


def _what_changed(old: Report, new: Report) -> str:
    """In words: the rows whose numbers are not those of before, with the fields that differ."""
    changes = []
    for before, after in zip(old.measurements, new.measurements, strict=True):
        names = [name for name in Figures.__dataclass_fields__ if getattr(before, name) != getattr(after, name)]
        if names:
            changes.append(f"{after.samples} ({', '.join(names)})")
    if old.objectives != new.objectives:
        changes.append("objectives")
    if (old.chosen, old.chosen_because) != (new.chosen, new.chosen_because):
        changes.append("the choice")
    return "every number as before" if not changes else f"changed are {_some(changes)}"


def _some(names: Sequence[str], *, most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _keeps_too_little(report: Report, row: Measurement) -> UsageError:
    return UsageError(
        f"{report.directory}: {row.samples} ({row.target}) does not keep what working it out again takes: an older"
        " dlops measured it",
        hint="measure it again; dlops compare reads the report as it is",
    )
