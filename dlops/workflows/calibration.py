"""The calibration that a report carries: the one kept for this machine, or a quick one made within the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dlops.bench.calibrate import calibrate
from dlops.bench.calibrated import attach
from dlops.bench.calibration_text import facts
from dlops.bench.kept import keep, kept
from dlops.bench.results import Measured
from dlops.console import out, say
from dlops.directory import write_copy
from dlops.errors import DlopsError, MachineError, UsageError
from dlops.report import Calibration
from dlops.workflows.publish import Outputs


def calibrate_alone(*, json: str | None, also_given: Sequence[str] = ()) -> int:
    """`dlops bench --calibrate` without targets: measure, print, keep; 0.

    json: where a copy goes, "-" prints it instead of the table. also_given: the arguments that are for targets, refused
    in one line. Raises UsageError for them, MachineError where it cannot be kept, printed and copied all the same.
    """
    if also_given:
        raise UsageError(
            f"{', '.join(also_given)}: for targets, and there are none", hint="name one, or only --calibrate"
        )
    Outputs(json=json).check(report=False)
    calibration = _measure()
    unkept = None
    # First what takes half a minute to measure again.
    try:
        say(f"kept: {keep(calibration)}")
    except MachineError as error:
        unkept = error
    if json == "-":
        out.write(calibration.model_dump_json(indent=2) + "\n")
    else:
        out.print(_table(calibration))
        if json is not None:
            write_copy(Path(json), calibration.model_dump_json(indent=2) + "\n")
    if unkept is not None:
        raise unkept
    return 0


def calibrate_fully() -> Calibration:
    """A full calibration beside a run, kept where that is possible: a run without a cache is still a run."""
    calibration = _measure()
    try:
        say(f"kept: {keep(calibration)}")
    except MachineError as error:
        say(f"not kept: {error}")
    return calibration


def calibrated(
    measured: Measured, calibration: Calibration | None = None, *, senders: int | None = None, may_measure: bool = True
) -> Measured:
    """The report with `calibration`, else the kept one, else with a quick one made now; what happens is on stderr.

    may_measure: without it, a report for which none is kept stays without. Where a quick one fails, the report says
    so in its notes. Raises KeyboardInterrupt on Ctrl-C while one is made.
    """
    try:
        found = calibration or _kept()
        if found is None and may_measure:
            found = _quick(network=any(row.boundary == "network" for row in measured.measurements))
    except MachineError as error:
        say(f"no calibration: {error}")
        notes = (*measured.report.notes, f"the harness was not calibrated: {error.message}")
        return replace(measured, report=measured.report.model_copy(update={"notes": notes}))
    return measured if found is None else attach(measured, found, senders=senders)


def _kept() -> Calibration | None:
    try:
        return kept()
    except DlopsError as error:
        say(f"the calibration kept for this machine is not used: {error.message}")
        return None


def _quick(*, network: bool) -> Calibration:
    say("calibrating in short, about 2 s: none is kept for this machine (dlops bench --calibrate makes a full one)")
    return calibrate(quick=True, network=network)


def _measure() -> Calibration:
    say("calibrating: what timing and sending cost with nothing behind them, about 30 s")
    return calibrate()


def _table(calibration: Calibration) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, sentence in facts(calibration):
        table.add_row(Text(what, style="bold"), Text(sentence))
    return table
