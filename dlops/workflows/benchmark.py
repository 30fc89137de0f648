"""`dlops bench`: measure, write the report, print the table, and say with the exit status what became of it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dlops.artifact import Artifact
from dlops.bench.results import HTML_NAME, Measured, save_report
from dlops.bench.run import MeasureInterrupted, measure
from dlops.bench.table import render_table
from dlops.checkpoint import Checkpoint, import_model_source
from dlops.console import out, say
from dlops.directory import write_json
from dlops.report import Report
from dlops.runtimes.session import Device

_DONE, _NO_VERDICT, _INTERRUPTED = 0, 3, 130


def benchmark(
    targets: Sequence[Artifact | str],
    *,
    checkpoint: Checkpoint | None,
    batch: Sequence[int],
    concurrency: Sequence[int],
    duration_s: float,
    payload: Artifact | None,
    model: str | None,
    device: Device,
    threads: int | None,
    out_dir: Path | None,
    json: str | None,
    html: Path | None,
    command: Sequence[str],
) -> int:
    """Write and print a report; json, html: where copies go ("-" prints the JSON instead of the table).

    Returns 0, 3 where no row is steady enough to quote, or 130 after Ctrl-C, with what was measured until then
    written and marked partial.
    """
    status = _DONE
    try:
        measured = measure(
            targets,
            checkpoint=checkpoint,
            batch=batch,
            concurrency=concurrency,
            duration_s=duration_s,
            threads=threads,
            device=device,
            payload=payload,
            model=import_model_source(model) if model else None,
            command=command,
        )
    except MeasureInterrupted as interruption:
        measured, status = interruption.measured, _INTERRUPTED
        say("interrupted: writing what was measured so far, marked partial")
    report = _write(measured, out_dir, json=json, html=html)
    if json == "-":
        sys.stdout.write(report.to_json())
    else:
        out.print(render_table(report))
    say(f"report: {report.directory / HTML_NAME}")
    if status == _DONE and not any(row.verdict.steady for row in report.measurements):
        say("no verdict: no row is steady enough to quote; its reasons are in the report")
        status = _NO_VERDICT
    return status


def _write(measured: Measured, directory: Path | None, *, json: str | None, html: Path | None) -> Report:
    report = save_report(measured, directory)
    if json not in (None, "-"):
        write_json(Path(json), report.to_json())
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(report.directory / HTML_NAME, html)
    return report
