"""`dlops bench`: measure, write the report, print the table, and say with the exit status what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dlops import signals
from dlops.artifact import Artifact
from dlops.bench.arrivals import Arrivals, Offered, read_trace
from dlops.bench.pilot import LONGEST_S
from dlops.bench.profile import add_profiles
from dlops.bench.run import MeasureInterrupted, measure
from dlops.bench.slo import parse_objective
from dlops.checkpoint import Checkpoint
from dlops.console import say
from dlops.errors import MachineError, UsageError
from dlops.report import Boundary, Engine, Scenario
from dlops.runtimes.session import Device, SessionOptions
from dlops.workflows.calibration import calibrate_fully, calibrated
from dlops.workflows.publish import Outputs, exit_status, publish

_INTERRUPTED = 130


def benchmark(
    targets: Sequence[Artifact | str],
    *,
    checkpoint: Checkpoint | None,
    compiled: bool,
    batch: Sequence[int] | None,
    boundary: Sequence[Boundary],
    device: Sequence[Device],
    threads: Sequence[int] | None,
    concurrency: Sequence[int] | None,
    offered: Offered | None,
    duration_s: float | None,
    payload: Artifact | None,
    model: str | None,
    profile: bool,
    outputs: Outputs,
    command: Sequence[str],
    calibrate: bool = False,
    max_duration_s: float | None = None,
    processes: int = 1,
    cuda_graph: bool = False,
    trust: bool = False,
    scenarios: Sequence[Scenario] = (),
    samples_per_query: int | None = None,
    engine: Engine = "dlops",
) -> int:
    """Write and print a report.

    calibrate: measure the harness in full too, and keep that. profile: run every target that is no URL once more
    under its runtime's profiler, after the timing.

    Returns 0, 1 where no rate kept an objective, 3 where no row is steady enough to quote, 4 where a target failed
    after others were measured, or 130 after Ctrl-C, with what was measured until then written and marked partial.
    """
    artifacts = [target for target in targets if isinstance(target, Artifact)]
    outputs.check(inputs=[one.directory for one in artifacts])
    if profile and not artifacts and checkpoint is None:
        raise UsageError(
            "--profile is for artifacts: a service runs in a process of its own", hint="name the artifact's folder too"
        )
    status = None
    with signals.heard_once():
        try:
            measured = measure(
                targets,
                checkpoint=checkpoint,
                compiled=compiled,
                batch=batch,
                boundary=boundary,
                device=device,
                cuda_graph=cuda_graph,
                trust=trust,
                threads=threads,
                concurrency=concurrency,
                processes=processes,
                offered=offered,
                scenarios=scenarios,
                samples_per_query=samples_per_query,
                engine=engine,
                duration_s=duration_s,
                max_duration_s=LONGEST_S if max_duration_s is None else max_duration_s,
                payload=payload,
                model=model,
                command=command,
            )
            if profile:
                counts: Sequence[int | None] = threads or [None]
                options = [
                    SessionOptions(device=place, threads=count, trust=trust) for place in device for count in counts
                ]
                measured = add_profiles(
                    measured, artifacts, checkpoint=checkpoint, options=options, model=model, compiled=compiled
                )
        except MeasureInterrupted as interruption:
            measured, status = interruption.measured, _INTERRUPTED
            say("interrupted: writing what was measured so far, marked partial")
        senders = offered.senders if offered else None
        try:
            # Not before: what is wrong with a target should be known first.
            calibration = calibrate_fully() if calibrate and status is None else None
            measured = calibrated(measured, calibration, senders=senders, may_measure=status is None)
        except KeyboardInterrupt:
            status = _INTERRUPTED
            say("interrupted: the report goes without a calibration")
        report = publish(measured, outputs)
    if status is None and report.partial:
        say("incomplete: a target failed after others were measured; the report's notes say which")
        return MachineError.exit_status
    return exit_status(report) if status is None else status


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
