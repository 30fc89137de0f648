"""The rows of targets on this machine: in turns within one run, or one after the other with a queue or LoadGen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from dlops.artifact import Artifact
from dlops.bench import inprocess
from dlops.bench.arrivals import STRETCH
from dlops.bench.attended import Attended
from dlops.bench.disturbed import Seen, seen_in_turns
from dlops.bench.inprocess import Conditions, Started, Subject
from dlops.bench.launches import Launches
from dlops.bench.results import row_key
from dlops.bench.rows import Rows, Samples
from dlops.bench.scenarios import Step
from dlops.console import Bar, progress_bar, say, to_fraction
from dlops.errors import MachineError
from dlops.report import PROCESSES, STARTS, TURNS, Engine, Measurement
from dlops.timing import Interleaved, TimingFailedError, TimingInterrupted, WarmUp

_PROGRESS_STEPS = 100


def time_in_turns(rows: Rows, chosen: Sequence[Subject], conditions: Conditions) -> None:
    """Add the rows of all targets under one condition. Where one fails after others are measured, those are kept.

    Raises what opening or calling one of them raised where nothing is measured yet, KeyboardInterrupt on Ctrl-C.
    """
    for subject in chosen:
        if subject.note:
            rows.note(subject.note)
    with rows.keeping_what_there_is():
        _time(rows, chosen, conditions)


def time_alone(rows: Rows, chosen: Sequence[Subject], conditions: Conditions, step: Step, *, engine: Engine) -> None:
    """Add the rows of all targets at each rate, each with a queue in front of its session or under LoadGen, and in a
    fresh process. Where one fails after others are measured, those are kept."""
    artifacts = [one.artifact for one in chosen if one.artifact is not None]
    for subject in chosen:
        for rate in step.rates:
            with (
                rows.keeping_what_there_is(),
                inprocess.started([subject], conditions, samples=inprocess.first_artifact(chosen)) as (one,),
            ):
                _time_one(rows, one, conditions, step, rate, engine, artifacts)


def keep_turns(rows: Rows, found: Launches, conditions: Conditions, *, cut_short: str | None = None) -> None:
    """Add the rows of targets that took turns. cut_short: why they ended early."""
    ready, timed, of_round = found.ready, found.timed, found.of_round
    keys = [row_key(len(rows.rows) + index) for index in range(len(ready))]
    made = inprocess.measurements(
        ready, timed, conditions=conditions, baseline=rows.baseline, keys=keys, processes=of_round, cut_short=cut_short
    )
    for number, (key, row, one) in enumerate(zip(keys, made, ready, strict=True)):
        run = timed.runs[one.target]
        samples = {key: run.latencies_ns, key + STARTS: run.starts_ns, key + TURNS: run.turns}
        if of_round is not None:
            samples[key + PROCESSES] = of_round[run.turns]
        samples |= {key + suffix: part for suffix, part in run.parts_ns.items()}
        rows.add(row, samples, seen_in_turns(found.attended, number, batch=conditions.batch, gpu=one.gpu))


def _time(rows: Rows, chosen: Sequence[Subject], conditions: Conditions) -> None:
    title, count = f"batch {conditions.batch}", f"{len(chosen)} target{'' if len(chosen) == 1 else 's'}"
    each = f", in {conditions.processes} processes each" if conditions.processes > 1 else ""
    say(f"timing {count} in turns at {title}{each}: {rows.lasting} a row, waits between turns included, warm-up not")
    found = Launches()
    try:
        if conditions.processes == 1:
            with inprocess.started(chosen, conditions) as ready, progress_bar(title, total=_PROGRESS_STEPS) as bar:
                _launch(rows, found, ready, bar, parts=1)
        else:
            with progress_bar(title, total=_PROGRESS_STEPS * conditions.processes) as bar:
                for number in range(conditions.processes):
                    bar.advance(0, note=f"process {number + 1} of {conditions.processes}")
                    # Who starts first may find the machine otherwise than who starts last.
                    order = chosen if number % 2 == 0 else chosen[::-1]
                    samples = inprocess.first_artifact(chosen)
                    with inprocess.started(order, conditions, samples=samples, quiet=True) as ready:
                        _launch(rows, found, ready[:: 1 if number % 2 == 0 else -1], bar, parts=conditions.processes)
    except KeyboardInterrupt:
        if found:
            keep_turns(rows, found, conditions, cut_short="interrupted")
        raise
    except MachineError as error:
        if found:
            keep_turns(rows, found, conditions, cut_short=f"cut short: {error.message}")
        raise
    keep_turns(rows, found, conditions)


def _launch(rows: Rows, found: Launches, ready: Sequence[Started], bar: Bar, *, parts: int) -> None:
    """Time what was started, and add that to what was found, however it ends."""
    read_energy = rows.energy.read if rows.energy.domains else None
    arms = [Attended(one.arm, read_energy) for one in ready]
    ready = [replace(one, arm=arm) for one, arm in zip(ready, arms, strict=True)]

    def add(timed: Interleaved) -> None:
        found.add(timed, ready, [arm.turns for arm in arms])

    advance = to_fraction(bar, _PROGRESS_STEPS)
    try:
        add(inprocess.time_targets(ready, lasting=rows.lasting, parts=parts, seed=len(found), on_progress=advance))
    except TimingInterrupted as interruption:
        add(interruption.partial)
        raise
    except TimingFailedError as failure:
        add(failure.partial)
        if failure.__cause__ is None:
            raise
        raise failure.__cause__ from None


def _time_one(
    rows: Rows, one: Started, conditions: Conditions, step: Step, rate: float | None, engine: Engine,
    artifacts: Sequence[Artifact],
) -> None:  # fmt: skip
    from dlops.bench.inprocess_rates import measure_queue, process_of

    warmth = process_of(one).warm_up(max(inprocess.WARMUP_S, rows.lasting.first_s))
    if engine == "loadgen":
        _drive(rows, one, conditions, rate, artifacts, warmth)
        return
    offered = step.offered
    assert offered is not None
    assert rate is not None

    def make(seconds: float, again: int) -> bool:
        stretch = 1.0 if again else rows.lasting.stretch(STRETCH)
        schedule = offered.at(rate, seconds, stretch=stretch, again=again)
        say(f"offering {one.target}: {rate:,.5g} requests/s for {schedule.duration_s:.3g} s")
        began_ns = time.perf_counter_ns()
        row, samples, interrupted = measure_queue(
            one, schedule, warmth=warmth, conditions=conditions, artifacts=artifacts, key=rows.next_key
        )
        _add(rows, row, samples, one, conditions, began_ns=began_ns)
        if interrupted:
            raise KeyboardInterrupt
        return True

    rows.add_piloted(make)


def _drive(
    rows: Rows, one: Started, conditions: Conditions, rate: float | None, artifacts: Sequence[Artifact], warmth: WarmUp
) -> None:
    from dlops.bench.loadgen_rows import measure_session, note

    say(f"LoadGen on {one.target}: {conditions.scenario}, {rows.lasting.first_s:g} s or more")
    began_ns = time.perf_counter_ns()
    (row, samples), said, interrupted = measure_session(
        one, conditions, rate=rate, duration_s=rows.lasting.first_s, warmth=warmth, artifacts=artifacts,
        key=rows.next_key,
    )  # fmt: skip
    rows.note(note(said.version))
    _add(rows, row, samples, one, conditions, began_ns=began_ns)
    if interrupted:
        raise KeyboardInterrupt


def _add(
    rows: Rows, row: Measurement, samples: Samples, one: Started, conditions: Conditions, *, began_ns: int
) -> None:
    # Those that were never run took no energy.
    items = (row.latency.samples - row.error_count) * conditions.batch
    rows.add(row, samples, Seen(begin_ns=began_ns, end_ns=time.perf_counter_ns(), items=items, gpu=one.gpu))
