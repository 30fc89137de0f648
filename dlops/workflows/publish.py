"""A bench report given out: its folder, the copies that were asked for, the table, and what it comes to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlops import signals
from dlops.bench.results import HTML_NAME, Measured, save_report
from dlops.bench.table import render_table, to_csv, to_markdown
from dlops.console import out, say
from dlops.directory import check_writable, write_copy
from dlops.errors import DlopsError, MachineError, UsageError
from dlops.report import Report

_DONE, _MISSED, NO_VERDICT = 0, 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """directory: of the report, by default reports/<time>. json, markdown, csv, html: where copies go; "-" prints one
    of the first three instead of the table. Raises UsageError where two want that."""

    directory: Path | None = None
    json: str | None = None
    markdown: str | None = None
    csv: str | None = None
    html: Path | None = None

    def __post_init__(self) -> None:
        texts = {"--json": self.json, "--markdown": self.markdown, "--csv": self.csv}
        printed = [f"{name} -" for name, value in texts.items() if value == "-"]
        if len(printed) > 1:
            raise UsageError(f"{' and '.join(printed)} both want stdout", hint="give one of them a file")

    @property
    def copies(self) -> dict[str, str]:
        """Where copies go, by the option that says so."""
        given = {"--json": self.json, "--markdown": self.markdown, "--csv": self.csv, "--html": self.html}
        return {option: str(copy) for option, copy in given.items() if copy is not None}

    def check(self, *, report: bool = True, inputs: Sequence[Path] = ()) -> None:
        """Raise UsageError or MachineError where the report or a copy has no place: to be asked before measuring.

        report: without it, only copies are written. inputs: folders of what is measured or compared, whose files no
        copy may replace.
        """
        if report:
            check_writable(self.directory or Path("reports"), what="--out")
        places: dict[Path, str] = {}
        for option, copy in self.copies.items():
            if copy != "-" and (other := places.setdefault(Path(copy).resolve(), option)) != option:
                raise UsageError(f"{other} and {option} both name {copy}", hint="give each a file of its own")
            if copy == "-" and option == "--html":
                raise UsageError("--html -: a page is for a browser", hint="name a file; --markdown - prints a table")
            if copy != "-":
                if Path(copy).is_dir():
                    raise UsageError(f"{option} {copy}: a folder", hint="name a file")
                if report and self.directory and Path(copy).resolve().parent == self.directory.resolve():
                    raise UsageError(
                        f"{option} {copy}: in the report's own folder, which has files of its own", hint="name another"
                    )
                place = Path(copy).resolve()
                if place.exists() and place.parent in {folder.resolve() for folder in inputs}:
                    raise UsageError(f"{option} {copy}: a file of what is read", hint="name another")
                check_writable(Path(copy).parent, what=option)


def publish(measured: Measured, outputs: Outputs) -> Report:
    """Write the report, print the table or the one copy that is for stdout, say where it lies, and write the copies.

    Raises MachineError where the report, stdout or a copy cannot be written, the table printed and the report written
    all the same: see save_or_rescue. Ctrl-C does nothing until the report is written: then there is nothing left to
    lose.
    """
    try:
        with signals.shielded():
            report = save_or_rescue(measured, outputs.directory)
        signals.listen_again()
    except MachineError:
        if unprinted := printed(lambda: out.print(render_table(measured.report))):
            say(unprinted.message)
        raise
    texts = ((outputs.json, Report.to_json), (outputs.markdown, to_markdown), (outputs.csv, to_csv))
    wanted = [write for name, write in texts if name == "-"]
    unprinted = printed(lambda: out.write(wanted[0](report)) if wanted else out.print(render_table(report)))
    say(f"report: {report.directory / HTML_NAME}")
    for name, write in texts:
        if name not in (None, "-"):
            write_copy(Path(name), write(report))
    if outputs.html is not None:
        write_copy(outputs.html, (report.directory / HTML_NAME).read_text(encoding="utf-8"))
    if unprinted is not None:
        raise unprinted
    return report


def printed(show: Callable[[], None]) -> MachineError | None:
    """Print to stdout. Where that takes nothing: the error, to be raised once all else is written."""
    try:
        show()
    except OSError as error:
        out.let_go()
        return MachineError(
            f"stdout: {(error.strerror or str(error)).lower()}, so what was to be printed is missing",
            hint="files that were to be written are there",
        )
    return None


def save_or_rescue(measured: Measured, directory: Path | None) -> Report:
    """The report, written to its folder.

    Raises MachineError where it cannot be. Then it goes to the folder for temporary files where that has room, and the
    error says so: what took long to measure is not lost with a full disk, or with a folder that is gone.
    """
    try:
        return save_report(measured, directory)
    except DlopsError as error:
        raise _rescued(measured, error) from None


def _rescued(measured: Measured, error: DlopsError) -> MachineError:
    """The error, saying where else the report lies now, if anywhere."""
    # Of the machine whatever it was: the folder could be made when the command line was read.
    lost = MachineError(error.message, hint=error.hint)
    try:
        folder = Path(tempfile.mkdtemp(prefix="dlops-report-"))
    except OSError:
        # As full as the other, or there is none.
        return lost
    try:
        save_report(measured, folder)
    except DlopsError:
        shutil.rmtree(folder, ignore_errors=True)
        return lost
    return MachineError(f"{lost.message}; the report is in {folder} instead", hint="make room and move it there")


def exit_status(report: Report) -> int:
    """0, 1 where no rate kept an objective, 3 where no row is steady enough to quote; a line says why."""
    if any(objective.rate is None for objective in report.objectives.values()):
        say("no rate kept the objective")
        return _MISSED
    if not any(row.verdict.steady for row in report.measurements):
        say("no verdict: no row is steady enough to quote; its reasons are in the report")
        return NO_VERDICT
    return _DONE
