"""`dlops compare`: measure two artifacts or two services, or read two reports, print what changed, and say it with the
exit status."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from dlops import signals
from dlops.artifact import Artifact, open_artifact
from dlops.bench.compare import Comparison, Quantity, compare_reports, compare_turns
from dlops.bench.compare_table import comparison_markdown, render_comparison
from dlops.bench.results import HTML_NAME, Measured
from dlops.bench.run import MeasureInterrupted, measure
from dlops.console import out, say
from dlops.directory import write_copy
from dlops.errors import MachineError, UsageError
from dlops.report import Report, read_report
from dlops.runtimes.session import Device
from dlops.workflows.calibration import calibrated
from dlops.workflows.publish import Outputs, printed, save_or_rescue

Kind = Literal["artifact", "service", "report"]
DURATION_S = 5.0
# Of each side: a service has one process, and its calls more to vary by.
SERVICE_S = 20.0
_OF_SERVICES = frozenset(("--concurrency", "--payload"))
_OF_ARTIFACTS = frozenset(("--processes", "--threads", "--device", "--trust"))
# Of each side. Between processes of one artifact the median differs by a per cent or two.
PROCESSES = 8
_SAME, _REGRESSED, _NO_VERDICT, _INTERRUPTED = 0, 1, 3, 130
_PERCENT = re.compile(r"(?P<sign>[+-]?)(?P<number>\d+(?:\.\d+)?|\.\d+)%")
_MARGIN_EXAMPLE = "such as --margin 5%"
_GATE_EXAMPLE = "such as --gate p99=+5%,throughput=-3%"
# Where each side is one process, intervals see how its calls vary, not how another process of the same would.
_FLOOR = 0.01


def compare(
    base: str | Path,
    new: str | Path,
    *,
    batch: Sequence[int] | None,
    concurrency: Sequence[int] | None = None,
    payload: Artifact | None = None,
    duration_s: float | None,
    processes: int | None,
    threads: int | None,
    device: Device | None,
    margin: str | None,
    gate: str | None,
    out_dir: Path | None,
    markdown: str | None,
    json: str | None,
    command: Sequence[str],
    trust: bool = False,
) -> int:
    """Print NEW against BASE; markdown, json: where copies go ("-" prints that instead of the table).

    Two artifacts, or two URLs of services, are measured now in turns and their report is written; of two reports the
    samples are compared. concurrency, payload: of services, calls in flight and whose samples are sent. Returns 1 where
    anything regressed, else 4 where a target failed after others were measured, else 3 where anything is inconclusive,
    else 0; 130 after Ctrl-C, with what was measured until then compared and marked partial. Raises UsageError before
    anything is measured where the arguments are wrong.
    """
    if markdown == "-" and json == "-":
        raise UsageError("--markdown - and --json - both want stdout", hint="give one of them a file")
    limits = read_gate(gate) if gate is not None else None
    if limits is not None and margin is not None:
        raise UsageError("--gate has limits of its own, and --margin is one more", hint="leave one of them out")
    fraction = read_margin(margin) if margin is not None else None
    kind = _one_kind(str(base), str(new))
    given = {
        "--batch": batch, "--concurrency": concurrency, "--payload": payload, "--duration": duration_s,
        "--processes": processes, "--threads": threads, "--device": device, "--out": out_dir, "--trust": trust,
    }  # fmt: skip
    _check_options(kind, [name for name, value in given.items() if value])
    if kind == "artifact" and processes == 1:
        _check_floor(fraction, limits)
    paths = [] if kind == "service" else [Path(base), Path(new)]
    Outputs(directory=out_dir, markdown=markdown, json=json).check(
        report=kind != "report", inputs=[path if path.is_dir() else path.parent for path in paths]
    )
    status = None
    if kind == "report":
        comparison = compare_reports(_read(paths[0]), _read(paths[1]), margin=fraction, gate=limits)
        # Reports of one model bear the same title.
        comparison = comparison.model_copy(update={"base": str(base), "new": str(new)})
    else:
        with signals.heard_once():
            if kind == "artifact":
                artifacts = [open_artifact(path) for path in paths]
                measured, status = _measured(
                    lambda: measure(
                        artifacts, batch=batch or [1], duration_s=duration_s or DURATION_S,
                        processes=processes or PROCESSES, threads=threads, device=device or "auto", trust=trust,
                        command=command,
                    )
                )  # fmt: skip
            else:
                measured, status = _measured(
                    lambda: _measure_services(
                        [str(base), str(new)], payload=payload, batch=batch, concurrency=concurrency,
                        duration_s=duration_s, command=command,
                    )
                )  # fmt: skip
            try:
                measured = calibrated(measured, may_measure=status is None)
            except KeyboardInterrupt:
                status = _INTERRUPTED
                say("interrupted: the report goes without a calibration")
            with signals.shielded():
                comparison = compare_turns(measured, base=str(base), new=str(new), margin=fraction, gate=limits)
                try:
                    report = save_or_rescue(measured, out_dir)
                except MachineError:
                    if unprinted := _shown(comparison, markdown=markdown, json=json):
                        say(unprinted.message)
                    raise
                _give_out(comparison, markdown=markdown, json=json, report=report)
        if status is None and measured.partial:
            say("incomplete: a target failed, and what it should have been measured on is not compared")
            return exit_status(comparison, failed=True)
        return exit_status(comparison) if status is None else status
    _give_out(comparison, markdown=markdown, json=json)
    return exit_status(comparison)


def exit_status(comparison: Comparison, *, failed: bool = False) -> int:
    """1 where anything regressed, else 4 where a target failed, else 3 where anything is inconclusive or a report is
    partial, else 0."""
    found = {"REGRESSED": _REGRESSED, "INCONCLUSIVE": _NO_VERDICT}.get(comparison.verdict, _SAME)
    if failed and found != _REGRESSED:
        return MachineError.exit_status
    return _NO_VERDICT if found == _SAME and comparison.partial else found


def read_margin(text: str) -> float:
    """`5%` as 0.05. Raises UsageError."""
    found = _PERCENT.fullmatch(text.strip())
    if not found or found["sign"] or not 0 < float(found["number"]) < 100:
        raise UsageError(f"--margin {text!r}: a percentage between 0 and 100 is wanted", hint=_MARGIN_EXAMPLE)
    return float(found["number"]) / 100


def read_gate(text: str) -> dict[Quantity, float]:
    """`p99=+5%,throughput=-3%` as {"p99": 1.05, "throughput": 0.97}. Raises UsageError that names all that is wrong."""
    gate: dict[Quantity, float] = {}
    wrong = []
    known = {str(name): name for name in get_args(Quantity)}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        found = _PERCENT.fullmatch(value)
        quantity = known.get(name)
        if quantity is None:
            wrong.append(f"{name!r} is none of {', '.join(known)}")
        elif quantity in gate:
            wrong.append(f"{name} is there twice")
        if not found:
            wrong.append(f"{part.strip()!r} has no percentage such as +5%")
        elif quantity is not None:
            worse = "-" if quantity == "throughput" else "+"
            if found["sign"] != worse:
                wrong.append(f"{part.strip()!r}: it is worse when it {_worsens(worse)}, so the limit is {worse}…%")
            elif float(found["number"]) >= 100 and worse == "-":
                wrong.append(f"{part.strip()!r}: all of it")
            else:
                gate[quantity] = 1 + float(found["sign"] + found["number"]) / 100
    if wrong:
        raise UsageError(f"--gate {text!r}: " + "; ".join(wrong), hint=_GATE_EXAMPLE)
    return gate


def _worsens(sign: str) -> str:
    return "falls" if sign == "-" else "grows"


def _check_floor(margin: float | None, gate: Mapping[Quantity, float] | None) -> None:
    """Raise UsageError for a margin that one run of two processes cannot judge."""
    asked = [margin] if margin is not None else [abs(limit - 1) for limit in (gate or {}).values()]
    if any(one < _FLOOR for one in asked):
        raise UsageError(
            f"a margin of {min(asked):.2%}: two processes of one artifact often differ by {_FLOOR:.0%} and more, by "
            "how they lie in memory",
            hint=f"{_FLOOR:.0%} or more, or more than one process of each: leave --processes out",
        )


def _check_options(kind: Kind, given: Sequence[str]) -> None:
    """Raise UsageError for options that are for another kind."""
    if kind == "report" and given:
        raise UsageError(f"{', '.join(given)}: for what is measured", hint="reports were measured before")
    others = _OF_SERVICES if kind == "artifact" else _OF_ARTIFACTS if kind == "service" else frozenset()
    if wrong := [name for name in given if name in others]:
        which = "URLs" if kind == "artifact" else "artifacts, which run on this machine"
        raise UsageError(f"{', '.join(wrong)}: for {which}", hint="leave it out")


def _one_kind(base: str, new: str) -> Kind:
    kinds = [_kind(target, side) for target, side in ((base, "BASE"), (new, "NEW"))]
    if kinds[0] != kinds[1]:
        (one, other) = (f"an {kind}" if kind == "artifact" else f"a {kind}" for kind in kinds)
        raise UsageError(
            f"BASE ({base}) is {one} and NEW ({new}) {other}",
            hint="two artifacts, two services or two reports are wanted; dlops bench makes a report of anything",
        )
    return kinds[0]


def _kind(target: str, side: str) -> Kind:
    if "://" in target:
        return "service"
    path = Path(target)
    for kind in ("artifact", "report"):
        named = Artifact.file_name if kind == "artifact" else Report.file_name
        if (path / named).is_file() or (path.name == named and path.is_file()):
            return "artifact" if kind == "artifact" else "report"
    what = "neither an artifact nor a report" if path.exists() else "no such file or directory"
    raise UsageError(
        f"{side} {path}: {what}",
        hint="two artifact folders, two URLs or two reports are wanted; dlops list shows the folders",
    )


def _read(path: Path) -> Measured:
    report = read_report(path)
    return Measured(report=report, samples=report.raw_samples())


def _measured(run: Callable[[], Measured]) -> tuple[Measured, int | None]:
    """What was measured, and the exit status where Ctrl-C decides it."""
    try:
        return run(), None
    except MeasureInterrupted as interruption:
        say("interrupted: comparing what was measured so far, marked partial")
        return interruption.measured, _INTERRUPTED


def _measure_services(
    urls: Sequence[str], *, payload: Artifact | None, batch: Sequence[int] | None, concurrency: Sequence[int] | None,
    duration_s: float | None, command: Sequence[str],
) -> Measured:  # fmt: skip
    # Imported here: what sends requests takes packages that artifacts in process do not.
    from dlops.bench.service_turns import measure_in_turns

    return measure_in_turns(
        urls, payload=payload, batch=batch or [1], concurrency=concurrency or [1],
        duration_s=duration_s or SERVICE_S, command=command,
    )  # fmt: skip


def _give_out(comparison: Comparison, *, markdown: str | None, json: str | None, report: Report | None = None) -> None:
    """Print it, say where the report lies, and write the copies.

    Raises MachineError where stdout or a copy cannot be written.
    """
    unprinted = _shown(comparison, markdown=markdown, json=json)
    if report is not None:
        say(f"report: {report.directory / HTML_NAME}")
    if markdown not in (None, "-"):
        write_copy(Path(markdown), comparison_markdown(comparison))
    if json not in (None, "-"):
        write_copy(Path(json), _to_json(comparison))
    if unprinted is not None:
        raise unprinted


def _shown(comparison: Comparison, *, markdown: str | None, json: str | None) -> MachineError | None:
    """Print the table, or the copy that is for stdout."""
    if markdown == "-":
        return printed(lambda: out.write(comparison_markdown(comparison)))
    if json == "-":
        return printed(lambda: out.write(_to_json(comparison)))
    return printed(lambda: out.print(render_comparison(comparison)))


def _to_json(comparison: Comparison) -> str:
    return comparison.model_dump_json(indent=2) + "\n"
