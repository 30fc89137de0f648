"""`dlops bench`: measure, write the report, print the table, and say with the exit status what became of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dlops.artifact import Artifact
from dlops.bench.arrivals import Arrivals, Offered, read_trace
from dlops.bench.profile import add_profiles
from dlops.bench.results import HTML_NAME, Measured, save_report
from dlops.bench.run import MeasureInterrupted, measure
from dlops.bench.slo import parse_objective
from dlops.bench.table import render_table
from dlops.checkpoint import Checkpoint, import_model_source
from dlops.console import out, say
from dlops.directory import write_json
from dlops.errors import UsageError
from dlops.report import Report
from dlops.runtimes.session import Device, SessionOptions

_DONE, _MISSED, _NO_VERDICT, _INTERRUPTED = 0, 1, 3, 130


def benchmark(
    targets: Sequence[Artifact | str],
    *,
    checkpoint: Checkpoint | None,
    batch: Sequence[int],
    concurrency: Sequence[int] | None,
    offered: Offered | None,
    duration_s: float,
    payload: Artifact | None,
    model: str | None,
    profile: bool,
    device: Device,
    threads: int | None,
    out_dir: Path | None,
    json: str | None,
    html: Path | None,
    command: Sequence[str],
) -> int:
    """Write and print a report; json, html: where copies go ("-" prints the JSON instead of the table).

    profile: run every target that is no URL once more under its runtime's profiler, after the timing.

    Returns 0, 1 where no rate kept an objective, 3 where no row is steady enough to quote, or 130 after Ctrl-C, with
    what was measured until then written and marked partial.
    """
    status = _DONE
    artifacts = [target for target in targets if isinstance(target, Artifact)]
    if profile and not artifacts and checkpoint is None:
        raise UsageError(
            "--profile is for artifacts: a service runs in a process of its own", hint="name the artifact's folder too"
        )
    source = import_model_source(model) if model else None
    try:
        measured = measure(
            targets,
            checkpoint=checkpoint,
            batch=batch,
            concurrency=concurrency,
            offered=offered,
            duration_s=duration_s,
            threads=threads,
            device=device,
            payload=payload,
            model=source,
            command=command,
        )
        if profile:
            options = SessionOptions(device=device, threads=threads)
            measured = add_profiles(measured, artifacts, checkpoint=checkpoint, model=source, options=options)
    except MeasureInterrupted as interruption:
        measured, status = interruption.measured, _INTERRUPTED
        say("interrupted: writing what was measured so far, marked partial")
    report = _write(measured, out_dir, json=json, html=html)
    if json == "-":
        sys.stdout.write(report.to_json())
    else:
        out.print(render_table(report))
    say(f"report: {report.directory / HTML_NAME}")
    if status == _DONE and any(objective.rate is None for objective in report.objectives.values()):
        say("no rate kept the objective")
        status = _MISSED
    if status == _DONE and not any(row.verdict.steady for row in report.measurements):
        say("no verdict: no row is steady enough to quote; its reasons are in the report")
        status = _NO_VERDICT
    return status


def offer(
    rates: Sequence[float], *, arrivals: Arrivals, pauses: str | None, trace: Path | None, slo: str | None,
    senders: int | None,
) -> Offered | None:  # fmt: skip
    """What the command line asks to offer, None where it names no rate, no trace and no objective.

    pauses: "BUSY:IDLE", both in seconds. Raises UsageError where that is not what it is.
    """
    if not rates and trace is None and slo is None:
        if pauses is not None or senders is not None:
            raise UsageError("--pauses and --senders are for requests at a rate", hint="add --rate, --trace or --slo")
        return None
    parts = None if pauses is None else _pauses(pauses)
    if parts is not None and not rates and slo is None:
        raise UsageError("--pauses is for --rate: a trace has its own", hint="leave --pauses out")
    due_ns = None if trace is None else read_trace(trace)
    objective = None if slo is None else parse_objective(slo)
    return Offered(
        rates=tuple(rates), arrivals=arrivals, pauses=parts, trace=due_ns, senders=senders, objective=objective
    )


def _pauses(text: str) -> tuple[float, float]:
    try:
        busy, idle = (float(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(
            f"--pauses {text!r}: expected BUSY:IDLE, two numbers of seconds", hint="such as 5:10"
        ) from None
    return busy, idle


def _write(measured: Measured, directory: Path | None, *, json: str | None, html: Path | None) -> Report:
    report = save_report(measured, directory)
    if json not in (None, "-"):
        write_json(Path(json), report.to_json())
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report.directory / HTML_NAME, html)
    return report
