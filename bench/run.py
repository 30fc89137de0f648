"""The bench stage's door: measure artifacts in process and services over HTTP or gRPC, as one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dlops.artifact import Artifact, open_artifact
from dlops.bench import inprocess
from dlops.bench.arrivals import Offered, Schedule
from dlops.bench.inprocess import Conditions, Started
from dlops.bench.loadgen import check_installed
from dlops.bench.payload import most_items
from dlops.bench.results import Measured, MeasureInterrupted, choose_fastest, merge, row_key, save_report
from dlops.bench.scenarios import Asked, Step, numbers, steps
from dlops.checkpoint import Checkpoint
from dlops.console import progress_bar, say
from dlops.environment import describe_environment
from dlops.errors import MachineError, UsageError
from dlops.report import STARTS, TURNS, Boundary, Engine, Measurement, Objective, Report, Scenario
from dlops.runtimes import SessionOptions
from dlops.runtimes.session import Device
from dlops.timing import Interleaved, TimingInterrupted

if TYPE_CHECKING:
    from dlops.bench.network import Payload
    from dlops.bench.oip import Endpoint
    from dlops.bench.rates import Warm
    from dlops.bench.slo import Outcome
    from dlops.checkpoint import ModuleSource

__all__ = ["MeasureInterrupted", "Measured", "Offered", "choose_fastest", "measure", "merge", "save_report"]

_PROGRESS_STEPS = 100
# A low rate may be offered this many times as long as asked, when the question is whether it keeps an objective.
_SEARCH_STRETCH = 10.0


def measure(
    targets: Sequence[Artifact | Path | str],
    *,
    checkpoint: Checkpoint | None = None,
    compiled: bool = False,
    batch: Sequence[int] | None = None,
    boundary: Sequence[Boundary] = ("host",),
    threads: int | Sequence[int] | None = None,
    device: Device | Sequence[Device] = "auto",
    concurrency: Sequence[int] | None = None,
    offered: Offered | None = None,
    scenarios: Sequence[Scenario] = (),
    samples_per_query: int | None = None,
    engine: Engine = "dlops",
    duration_s: float = 3.0,
    payload: Artifact | None = None,
    model: ModuleSource | str | None = None,
    title: str = "",
    command: Sequence[str] = (),
) -> Measured:
    """Measure every target at every batch, and every URL at every concurrency and rate too; `save_report` writes it.

    targets: artifacts or their folders, each run in a fresh process; `http://HOST:PORT`, `oip+http://HOST:PORT` or
    `oip+grpc://HOST:PORT`, a service of the Open Inference Protocol. checkpoint: adds its eager module as the row that
    speed-ups are counted from (without it, the first of several artifacts is), with `compiled` through torch.compile,
    too; model: what builds the module where the checkpoint names no builder, best as "python:package.module:function":
    a module or a function keeps the two in this process. batch (by default 1), boundary, threads and device are axes:
    for each combination all targets take turns within one run. boundary "preprocessing": from the raw input, decoding
    included. concurrency: calls kept in flight at URLs, by default 1 unless `offered` is given. offered: requests at
    rates or from a trace, whether or not earlier ones are answered. scenarios: MLPerf's, instead of those axes: batch
    and concurrency are then for "offline" (by default 32 items or what all targets take, and 8 in flight), `offered`
    for "server", in process too, and samples_per_query (8) for "multi_stream". engine: "loadgen" has MLCommons' LoadGen
    run them. duration_s: for each row, on the clock: the waits between turns count, the warm-up does not. payload:
    whose samples are sent to URLs; without it the first artifact among the targets, else random numbers within the
    signature.

    Raises UsageError and MachineError before anything is timed where a target is not there or cannot run what is
    asked, and MeasureInterrupted, which holds the rows made so far, on Ctrl-C.
    """
    artifacts, urls = _sorted_out(targets)
    if duration_s <= 0:
        raise UsageError(f"a duration of {duration_s:g} s")
    if not artifacts and not urls and checkpoint is None:
        raise UsageError("nothing to measure", hint="name an artifact's folder or http://HOST:PORT")
    if compiled and checkpoint is None:
        raise UsageError("torch.compile is for a checkpoint's module", hint="name its run with --checkpoint")
    chosen = inprocess.subjects(artifacts, checkpoint=checkpoint, model=model, compiled=compiled)
    sent = payload or next(iter(artifacts), None)
    asked = Asked(
        scenarios=scenarios, engine=engine, batch=batch, concurrency=concurrency, offered=offered,
        samples_per_query=samples_per_query,
    )  # fmt: skip
    signatures = [one.signature for one in chosen] + ([sent.signature] if urls and sent else [])
    planned = steps(
        asked, in_process=bool(chosen), over_network=bool(urls), most_items=min(map(most_items, signatures), default=32)
    )
    if engine == "loadgen":
        check_installed()
    conditions = _conditions(planned, boundary, threads, device)
    alone = [step for step in planned if engine == "loadgen" or step.scenario == "server"]
    inprocess.check(
        chosen, batches=sorted({step.batch for step in planned}), boundaries=boundary, own_process=bool(alone)
    )
    endpoints = _find_endpoints(urls, sent)

    bench = _Bench(title=title or _title(artifacts, urls), command=tuple(command), duration_s=duration_s)
    try:
        if chosen:
            if alone != planned and (len(chosen) > 1 or checkpoint is not None):
                bench.baseline = chosen[0].target
            for step, condition in conditions:
                if step in alone:
                    bench.time_alone(chosen, condition, step, engine=engine)
                else:
                    bench.time_in_process(chosen, condition)
        for endpoint in endpoints:
            for step in planned:
                bench.load(endpoint, sent, step, engine=engine)
    except KeyboardInterrupt:
        if not bench.rows:
            raise
        raise MeasureInterrupted(bench.result(partial=True)) from None
    if not bench.rows:
        raise MachineError(bench.failures[0], hint="the server's log says why")
    return bench.result(partial=bool(bench.failures))


@dataclass(slots=True)
class _Bench:
    """The rows and samples of a run as they come in."""

    title: str
    command: tuple[str, ...]
    duration_s: float
    baseline: str | None = None
    rows: list[Measurement] = field(default_factory=list)
    samples: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    objectives: dict[str, Objective] = field(default_factory=dict)

    def time_in_process(self, chosen: Sequence[inprocess.Subject], conditions: Conditions) -> None:
        """The rows of all targets under one condition. Where one fails after others are measured, those are kept."""
        for subject in chosen:
            if subject.note:
                self.note(subject.note)
        try:
            with inprocess.started(chosen, conditions) as ready:
                self._time(ready, conditions)
        except MachineError as error:
            if not self.rows:
                raise
            say(str(error))
            self.failures.append(error.message)

    def _time(self, ready: Sequence[Started], conditions: Conditions) -> None:
        title = f"batch {conditions.batch}"
        say(
            f"timing {len(ready)} targets in turns at {title}, {self.duration_s:g} s each with the waits between"
            " turns, after the warm-up"
        )
        with progress_bar(title, total=_PROGRESS_STEPS) as bar:
            done = 0

            def advance(fraction: float) -> None:
                nonlocal done
                steps = round(fraction * _PROGRESS_STEPS) - done
                done += steps
                bar.advance(steps)

            try:
                timed = inprocess.time_targets(ready, duration_s=self.duration_s, on_progress=advance)
            except TimingInterrupted as interruption:
                self._keep(ready, interruption.partial, conditions, interrupted=True)
                raise
        self._keep(ready, timed, conditions)

    def time_alone(
        self, chosen: Sequence[inprocess.Subject], conditions: Conditions, step: Step, *, engine: Engine
    ) -> None:
        """The rows of all targets at each rate, one after the other, each with a queue in front of its session or under
        LoadGen, and in a fresh process. Where one fails after others are measured, those are kept."""
        for subject in chosen:
            for rate in _rates(step):
                try:
                    with inprocess.started([subject], conditions, samples=inprocess.first_artifact(chosen)) as (one,):
                        self._time_one(one, conditions, step, rate, engine, _artifacts(chosen))
                except MachineError as error:
                    if not self.rows:
                        raise
                    say(str(error))
                    self.failures.append(error.message)

    def _time_one(
        self, one: Started, conditions: Conditions, step: Step, rate: float | None, engine: Engine,
        artifacts: Sequence[Artifact],
    ) -> None:  # fmt: skip
        from dlops.bench.inprocess_rates import measure_queue, process_of

        warmth = process_of(one).warm_up(max(2.0, self.duration_s))
        key = row_key(len(self.rows))
        if engine == "loadgen":
            from dlops.bench.loadgen_rows import measure_session, note

            say(f"LoadGen on {one.target}: {conditions.scenario}, {self.duration_s:g} s or more")
            (row, samples), said = measure_session(
                one, conditions, rate=rate, duration_s=self.duration_s, warmth=warmth, artifacts=artifacts, key=key
            )
            self._add(row, samples)
            self.note(note(said.version))
            return
        assert step.offered is not None
        assert rate is not None
        schedule = step.offered.at(rate, self.duration_s)
        say(f"offering {one.target}: {rate:,.5g} requests/s for {schedule.duration_s:.3g} s")
        row, samples, interrupted = measure_queue(
            one, schedule, warmth=warmth, conditions=conditions, artifacts=artifacts, key=key
        )
        self._add(row, samples)
        if interrupted:
            raise KeyboardInterrupt

    def _add(self, row: Measurement, samples: dict[str, NDArray[np.int64]]) -> None:
        self.rows.append(row)
        self.samples |= samples

    def load(self, endpoint: Endpoint, artifact: Artifact | None, step: Step, *, engine: Engine) -> None:
        """The rows of one URL at one step. One that fails half-way is noted, and the others are kept."""
        from dlops.bench.network import prepare

        try:
            sent = prepare(endpoint, artifact, batch=step.batch)
            for note in sent.notes:
                self.note(note)
            if engine == "loadgen":
                self._drive(endpoint, sent, step)
                return
            for calls in step.concurrency:
                self._load_one(endpoint, sent, step, calls)
            if step.offered is not None:
                self._offer(endpoint, sent, step.offered, step)
        except MachineError as error:
            say(str(error))
            self.failures.append(error.message)

    def _load_one(self, endpoint: Endpoint, sent: Payload, step: Step, calls: int) -> None:
        from dlops.bench.network import measure_endpoint

        said = f"batch {step.batch}, {calls} in flight, {self.duration_s:g} s after the warm-up"
        say(f"loading {endpoint.url}: {said}")
        row, samples, loaded = measure_endpoint(
            endpoint, sent, batch=step.batch, concurrency=calls, duration_s=self.duration_s,
            key=row_key(len(self.rows)), scenario=step.scenario,
        )  # fmt: skip
        self._add(row, samples)
        if loaded.interrupted:
            raise KeyboardInterrupt

    def _drive(self, endpoint: Endpoint, sent: Payload, step: Step) -> None:
        from dlops.bench.loadgen_rows import measure_url, note
        from dlops.bench.rates import warm_up

        assert step.scenario is not None
        warm = warm_up(endpoint, sent)
        for rate in _rates(step):
            for calls in step.concurrency or (1,):
                say(f"LoadGen on {endpoint.url}: {step.scenario}, {self.duration_s:g} s or more")
                (row, samples), said = measure_url(
                    endpoint, sent, step.scenario, batch=step.batch, concurrency=calls, rate=rate,
                    duration_s=self.duration_s, warm=warm, key=row_key(len(self.rows)),
                )  # fmt: skip
                self._add(row, samples)
                self.note(note(said.version))

    def _offer(self, endpoint: Endpoint, sent: Payload, offered: Offered, step: Step) -> None:
        from dlops.bench.rates import warm_up

        warm = warm_up(endpoint, sent)
        for schedule in offered.schedules(self.duration_s):
            self._offer_one(endpoint, sent, schedule, step, warm=warm, senders=offered.senders)
        if offered.objective is not None:
            self._find_highest(endpoint, sent, offered, offered.objective, step, warm=warm)

    def _offer_one(
        self, endpoint: Endpoint, sent: Payload, schedule: Schedule, step: Step, *, warm: Warm, senders: int | None
    ) -> Measurement:
        from dlops.bench.rates import measure_rate

        title = f"{schedule.rate:,.5g} requests/s"
        say(f"offering {endpoint.url}: batch {step.batch}, {title} for {schedule.duration_s:.3g} s")
        row, samples, loaded = measure_rate(
            endpoint, sent, schedule, warm=warm, batch=step.batch, senders=senders, key=row_key(len(self.rows)),
            title=title, scenario=step.scenario,
        )  # fmt: skip
        self._add(row, samples)
        if loaded.interrupted:
            raise KeyboardInterrupt
        return row

    def _find_highest(
        self, endpoint: Endpoint, sent: Payload, offered: Offered, objective: Objective, step: Step, *, warm: Warm
    ) -> None:
        from dlops.bench.slo import judge, samples_for, search

        wanted = samples_for(objective)

        def probe(rate: float) -> Outcome:
            schedule = offered.at(rate, self.duration_s, wanted=wanted, stretch=_SEARCH_STRETCH)
            row = self._offer_one(endpoint, sent, schedule, step, warm=warm, senders=offered.senders)
            outcome = judge(row, self.samples[row.samples], self.samples[row.samples + STARTS], objective)
            say(f"{rate:,.5g} requests/s: {outcome}")
            return outcome

        first = len(self.rows)
        # Far enough below what one caller gets that the first try is likely to be kept.
        found = search(probe, start=warm.rate / 4, least=wanted / (_SEARCH_STRETCH * self.duration_s))
        tried = tuple(row.samples for row in self.rows[first:])
        self.rows[first:] = sorted(self.rows[first:], key=lambda row: row.load.rate or 0.0)
        key = endpoint.url if step.batch == 1 else f"{endpoint.url} at batch {step.batch}"
        update = {"rate": found.met, "missed": found.missed, "tried": tried}
        self.objectives[key] = objective.model_copy(update=update)

    def note(self, text: str) -> None:
        if text not in self.notes:
            say(f"note: {text}")
            self.notes.append(text)

    def result(self, *, partial: bool) -> Measured:
        report = Report(
            title=self.title,
            created=datetime.now(UTC),
            command=self.command,
            environment=describe_environment(),
            measurements=tuple(self.rows),
            objectives=self.objectives,
            baseline=self.baseline,
            notes=(*self.notes, *self.failures),
            partial=partial,
        )
        return Measured(report=report, samples=self.samples)

    def _keep(
        self, ready: Sequence[Started], timed: Interleaved, conditions: Conditions, *, interrupted: bool = False
    ) -> None:
        keys = [row_key(len(self.rows) + index) for index in range(len(ready))]
        self.rows += inprocess.measurements(
            ready, timed, conditions=conditions, baseline=self.baseline, keys=keys, interrupted=interrupted
        )
        for key, one in zip(keys, ready, strict=True):
            run = timed.runs[one.target]
            self.samples |= {key: run.latencies_ns, key + STARTS: run.starts_ns, key + TURNS: run.turns}


def _sorted_out(targets: Sequence[Artifact | Path | str]) -> tuple[list[Artifact], list[str]]:
    artifacts, urls = [], []
    for target in targets:
        if isinstance(target, str) and "://" in target:
            urls.append(target)
        else:
            artifacts.append(target if isinstance(target, Artifact) else open_artifact(target))
    return artifacts, urls


def _conditions(
    planned: Sequence[Step],
    boundaries: Sequence[Boundary],
    threads: int | Sequence[int] | None,
    devices: Device | Sequence[Device],
) -> list[tuple[Step, Conditions]]:
    """Every combination, the steps under one set of options next to one another."""
    counts = [None] if threads is None else numbers("threads", [threads] if isinstance(threads, int) else threads)
    places: Sequence[Device] = [devices] if isinstance(devices, str) else list(dict.fromkeys(devices))
    return [
        (
            step,
            Conditions(
                batch=step.batch, boundary=boundary, options=SessionOptions(device=place, threads=count),
                scenario=step.scenario,
            ),
        )
        for place in places
        for count in counts
        for boundary in dict.fromkeys(boundaries)
        for step in planned
    ]  # fmt: skip


def _rates(step: Step) -> list[float | None]:
    """Each rate that is offered; None where none is."""
    return [None] if step.offered is None else [*sorted(set(step.offered.rates))]


def _artifacts(chosen: Sequence[inprocess.Subject]) -> list[Artifact]:
    return [one.artifact for one in chosen if one.artifact is not None]


def _find_endpoints(urls: Sequence[str], artifact: Artifact | None) -> list[Endpoint]:
    if not urls:
        return []
    from dlops.bench.oip import find_endpoint

    return [find_endpoint(url, model=artifact.name if artifact else None) for url in urls]


def _title(artifacts: Sequence[Artifact], urls: Sequence[str]) -> str:
    names = list(dict.fromkeys([artifact.name for artifact in artifacts] + list(urls)))
    return ", ".join(names) or "eager"
