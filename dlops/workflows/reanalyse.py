"""`dlops bench --from`: a kept report worked out again from its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlops.bench.reanalysis import reanalyse
from dlops.console import say
from dlops.errors import UsageError
from dlops.report import read_report
from dlops.workflows.publish import NO_VERDICT, Outputs, exit_status, publish


def reanalyse_report(path: Path, outputs: Outputs, *, also_given: Sequence[str] = ()) -> int:
    """Write and print it anew; the report at `path` stays as it is. Returns what `dlops bench` would of these rows, and
    3 instead of 0 where the report is partial.

    also_given: the arguments that say what to measure, refused in one line. Raises UsageError for them and where the
    new report would replace the old one, CorruptError where the report or its samples were altered.
    """
    if also_given:
        raise UsageError(
            f"{', '.join(also_given)}: nothing is measured with --from", hint="leave them out, or leave --from out"
        )
    outputs.check()
    report = read_report(path)
    if outputs.directory is not None and outputs.directory.resolve() == report.directory.resolve():
        raise UsageError(f"--out {outputs.directory}: the report itself is there", hint="name another folder")
    for option, copy in outputs.copies.items():
        if copy != "-" and Path(copy).resolve().parent == report.directory.resolve():
            raise UsageError(f"{option} {copy}: the report itself is there", hint="name another folder")
    say(f"working out {report.directory} again: {len(report.measurements)} rows, nothing is measured")
    status = exit_status(publish(reanalyse(report), outputs))
    if report.partial and not status:
        say("no verdict on the whole: the report is partial")
        return NO_VERDICT
    return status
