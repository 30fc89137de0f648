"""The bench stage's door: measure artifacts in process and services over HTTP or gRPC, as one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dlops.artifact import Artifact, open_artifact
from dlops.bench import cells, inprocess, stats
from dlops.bench.analysis import remarked
from dlops.bench.arrivals import STRETCH, Offered, Schedule
from dlops.bench.attended import Attended
from dlops.bench.disturbed import Seen, attach, seen_in_turns, seen_under_load
from dlops.bench.inprocess import Conditions, Started
from dlops.bench.pilot import LONGEST_S, Length, length
from dlops.bench.results import Measured, MeasureInterrupted, choose_fastest, merge, row_key, save_report
from dlops.bench.sensors import Rapl
from dlops.bench.telemetry import Recorder
from dlops.checkpoint import Checkpoint
from dlops.console import progress_bar, say
from dlops.environment import describe_environment
from dlops.errors import MachineError, UsageError
from dlops.report import STARTS, TURNS, Boundary, Measurement, Objective, Report
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
    batch: Sequence[int] = (1,),
    boundary: Sequence[Boundary] = ("host",),
    threads: int | Sequence[int] | None = None,
    device: Device | Sequence[Device] = "auto",
    cuda_graph: bool = False,
    concurrency: Sequence[int] | None = None,
    offered: Offered | None = None,
    duration_s: float | None = None,
    max_duration_s: float = LONGEST_S,
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
    a module or a function keeps the two in this process. batch, boundary, threads and device are axes: for each
    combination all targets take turns within one run. boundary "device": the inference alone, inputs in place;
    "preprocessing": from the raw input, decoding included. cuda_graph: inferences replay a CUDA graph.
    concurrency: calls kept in flight at URLs, by default 1 unless `offered` is given. offered: requests at rates or
    from a trace, whether or not earlier ones are answered. duration_s: for each row, on the clock: the waits between
    turns count, the warm-up does not; without it a row lasts as long as it takes to know p50 to 1 % and p99 to 5 %,
    from 3 s to max_duration_s. payload: whose samples are sent to URLs; without it the first artifact among the
    targets, else random numbers within the signature.

    Raises UsageError and MachineError before anything is timed where a target is not there or cannot run what is
    asked, and MeasureInterrupted, which holds the rows made so far, on Ctrl-C.
    """
    artifacts, urls = _sorted_out(targets)
    if concurrency is None:
        concurrency = (1,) if offered is None else ()
    batches, calls = _numbers("batch", batch), _numbers("concurrency", concurrency) if concurrency else []
    lasting = length(duration_s, max_duration_s)
    if not artifacts and not urls and checkpoint is None:
        raise UsageError("nothing to measure", hint="name an artifact's folder or http://HOST:PORT")
    if not urls and (calls != [1] or offered is not None):
        what = "concurrency" if offered is None else "a rate"
        raise UsageError(f"{what} is for URLs: in process, one session runs one call at a time")
    if compiled and checkpoint is None:
        raise UsageError("torch.compile is for a checkpoint's module", hint="name its run with --checkpoint")
    chosen = inprocess.subjects(artifacts, checkpoint=checkpoint, model=model, compiled=compiled)
    conditions = _conditions(batches, boundary, threads, device, cuda_graph=cuda_graph)
    if cuda_graph and (not chosen or any(one.options.device == "cpu" for one in conditions)):
        what = "a service runs its models itself" if not chosen else "there is none on the CPU"
        raise UsageError(f"a CUDA graph was asked for, and {what}", hint="leave --cuda-graph out, or --device cuda")
    inprocess.check(chosen, batches=batches, boundaries=boundary)
    endpoints = _find_endpoints(urls, payload or next(iter(artifacts), None))

    with Recorder() as recorder:
        bench = _Bench(
            title=title or _title(artifacts, urls), command=tuple(command), lasting=lasting, recorder=recorder
        )
        try:
            if chosen:
                bench.baseline = chosen[0].target if len(chosen) > 1 or checkpoint is not None else None
                for condition in conditions:
                    bench.time_in_process(chosen, condition)
            for endpoint in endpoints:
                recorder.watch(endpoint.url, endpoint.host, endpoint.port)
                for size in batches:
                    bench.load(
                        endpoint, payload or next(iter(artifacts), None), batch=size, concurrency=calls, offered=offered
                    )
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
    lasting: Length
    recorder: Recorder
    energy: Rapl = field(default_factory=Rapl)
    seen: dict[str, Seen] = field(default_factory=dict)
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
            f"timing {len(ready)} targets in turns at {title}, {self.lasting} each with the waits between turns,"
            " after the warm-up"
        )
        read_energy = self.energy.read if self.energy.domains else None
        arms = [Attended(one.arm, read_energy) for one in ready]
        ready = [replace(one, arm=arm) for one, arm in zip(ready, arms, strict=True)]
        with progress_bar(title, total=_PROGRESS_STEPS) as bar:
            done = 0

            def advance(fraction: float) -> None:
                nonlocal done
                steps = round(fraction * _PROGRESS_STEPS) - done
                done += steps
                bar.advance(steps)

            try:
                timed = inprocess.time_targets(ready, lasting=self.lasting, on_progress=advance)
            except TimingInterrupted as interruption:
                self._keep(ready, arms, interruption.partial, conditions, interrupted=True)
                raise
        self._keep(ready, arms, timed, conditions)

    def load(
        self, endpoint: Endpoint, artifact: Artifact | None, *, batch: int, concurrency: Sequence[int],
        offered: Offered | None,
    ) -> None:  # fmt: skip
        """The rows of one URL at one batch. One that fails half-way is noted, and the others are kept."""
        from dlops.bench.network import prepare

        try:
            sent = prepare(endpoint, artifact, batch=batch)
            for note in sent.notes:
                self.note(note)
            for calls in concurrency:
                self._keep_in_flight(endpoint, sent, batch=batch, concurrency=calls)
            if offered is not None:
                self._offer(endpoint, sent, offered, batch=batch)
        except (MachineError, UsageError) as error:
            # What is already measured is not thrown away for what a later server does not take.
            if isinstance(error, UsageError) and not self.rows:
                raise
            say(str(error))
            self.failures.append(error.message)

    def _keep_in_flight(self, endpoint: Endpoint, sent: Payload, *, batch: int, concurrency: int) -> None:
        from dlops.bench.network import measure_endpoint

        key, seconds = row_key(len(self.rows)), self.lasting.first_s
        made: tuple[Measurement, dict[str, NDArray[np.int64]]] | None = None
        try:
            while True:
                under = f"batch {batch}, {concurrency} in flight"
                say(f"loading {endpoint.url}: {under}, {seconds:.3g} s after the warm-up")
                row, samples, loaded = measure_endpoint(
                    endpoint, sent, batch=batch, concurrency=concurrency, duration_s=seconds, key=key
                )
                spent_s = loaded.duration_ns / 1e9
                turns = stats.stretches(loaded.starts_ns, loaded.duration_ns)
                wanted_s = self.lasting.after(loaded.latencies_ns, turns=turns, spent_s=spent_s)
                said = self.lasting.remarks(loaded.latencies_ns, turns=turns, spent_s=spent_s)
                made = remarked(row, said), samples
                self.seen[key] = seen_under_load(row, began_ns=loaded.began_ns, service=endpoint.url)
                # The pilot only says how long the row has to be: it is made anew, once.
                if loaded.interrupted or loaded.stopped or seconds > self.lasting.first_s or wanted_s <= spent_s:
                    break
                seconds = wanted_s
        finally:
            # Where nothing comes of the longer run, by Ctrl-C or a dead server, its pilot is what there is.
            if made is not None:
                self.rows.append(made[0])
                self.samples |= made[1]
        if loaded.interrupted:
            raise KeyboardInterrupt

    def _offer(self, endpoint: Endpoint, sent: Payload, offered: Offered, *, batch: int) -> None:
        from dlops.bench.rates import warm_up

        warm = warm_up(endpoint, sent)
        for rate in sorted(set(offered.rates)):
            self._offer_rate(endpoint, sent, offered, rate, warm=warm, batch=batch)
        if offered.trace is not None:
            self._offer_one(endpoint, sent, offered.replayed(), warm=warm, batch=batch, senders=offered.senders)
        if offered.objective is not None:
            self._find_highest(endpoint, sent, offered, offered.objective, warm=warm, batch=batch)

    def _offer_rate(
        self, endpoint: Endpoint, sent: Payload, offered: Offered, rate: float, *, warm: Warm, batch: int
    ) -> None:
        schedule = offered.at(rate, self.lasting.first_s, stretch=self.lasting.stretch(STRETCH))
        row = self._offer_one(endpoint, sent, schedule, warm=warm, batch=batch, senders=offered.senders)
        response_ns, due_ns = self.samples[row.samples], self.samples[row.samples + STARTS]
        assert row.duration_ns is not None
        turns, spent_s = stats.stretches(due_ns, row.duration_ns), row.duration_ns / 1e9
        wanted_s = self.lasting.after(response_ns, turns=turns, spent_s=spent_s)
        # Under a service that does not keep up, longer is only worse.
        if wanted_s > spent_s and not any(reason.startswith("saturated") for reason in row.verdict.reasons):
            pilot = remarked(self.rows.pop(), self.lasting.remarks(response_ns, turns=turns, spent_s=spent_s))
            others = len(self.rows)
            schedule = offered.at(rate, wanted_s, stretch=1.0)
            try:
                row = self._offer_one(endpoint, sent, schedule, warm=warm, batch=batch, senders=offered.senders)
            except (KeyboardInterrupt, MachineError):
                # As with calls in flight: the pilot stays where nothing comes of the longer run.
                self.rows += [pilot] if len(self.rows) == others else []
                raise
            response_ns, due_ns = self.samples[row.samples], self.samples[row.samples + STARTS]
            assert row.duration_ns is not None
            turns, spent_s = stats.stretches(due_ns, row.duration_ns), row.duration_ns / 1e9
        self.rows[-1] = remarked(row, self.lasting.remarks(response_ns, turns=turns, spent_s=spent_s))

    def _offer_one(
        self, endpoint: Endpoint, sent: Payload, schedule: Schedule, *, warm: Warm, batch: int, senders: int | None
    ) -> Measurement:
        from dlops.bench.rates import measure_rate

        title = f"{schedule.rate:,.5g} requests/s"
        say(f"offering {endpoint.url}: batch {batch}, {title} for {schedule.duration_s:.3g} s")
        row, samples, loaded = measure_rate(
            endpoint, sent, schedule, warm=warm, batch=batch, senders=senders, key=row_key(len(self.rows)), title=title
        )
        self.rows.append(row)
        self.samples |= samples
        self.seen[row.samples] = seen_under_load(row, began_ns=loaded.began_ns, service=endpoint.url)
        if loaded.interrupted:
            raise KeyboardInterrupt
        return row

    def _find_highest(
        self, endpoint: Endpoint, sent: Payload, offered: Offered, objective: Objective, *, warm: Warm, batch: int
    ) -> None:
        from dlops.bench.slo import judge, samples_for, search

        wanted = samples_for(objective)

        def probe(rate: float) -> Outcome:
            schedule = offered.at(rate, self.lasting.first_s, wanted=wanted, stretch=_SEARCH_STRETCH)
            row = self._offer_one(endpoint, sent, schedule, warm=warm, batch=batch, senders=offered.senders)
            outcome = judge(row, self.samples[row.samples], self.samples[row.samples + STARTS], objective)
            say(f"{rate:,.5g} requests/s: {outcome}")
            return outcome

        first = len(self.rows)
        # Far enough below what one caller gets that the first try is likely to be kept.
        found = search(probe, start=warm.rate / 4, least=wanted / (_SEARCH_STRETCH * self.lasting.first_s))
        tried = tuple(row.samples for row in self.rows[first:])
        self.rows[first:] = sorted(self.rows[first:], key=lambda row: row.load.rate or 0.0)
        key = cells.service(self.rows[first])
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
        return attach(Measured(report=report, samples=self.samples), self.recorder.end(), self.seen)

    def _keep(
        self, ready: Sequence[Started], arms: Sequence[Attended], timed: Interleaved, conditions: Conditions, *,
        interrupted: bool = False,
    ) -> None:  # fmt: skip
        keys = [row_key(len(self.rows) + index) for index in range(len(ready))]
        self.rows += inprocess.measurements(
            ready, timed, conditions=conditions, baseline=self.baseline, keys=keys, lasting=self.lasting,
            interrupted=interrupted,
        )  # fmt: skip
        # After Ctrl-C some have had a turn more than there are whole rounds.
        turns = [arm.turns[: timed.rounds] for arm in arms]
        for number, (key, one) in enumerate(zip(keys, ready, strict=True)):
            self.seen[key] = seen_in_turns(turns, number, batch=conditions.batch)
            run = timed.runs[one.target]
            self.samples |= {key: run.latencies_ns, key + STARTS: run.starts_ns, key + TURNS: run.turns}
            self.samples |= {key + suffix: part for suffix, part in run.parts_ns.items()}


def _sorted_out(targets: Sequence[Artifact | Path | str]) -> tuple[list[Artifact], list[str]]:
    artifacts, urls = [], []
    for target in targets:
        if isinstance(target, str) and "://" in target:
            urls.append(target)
        else:
            artifacts.append(target if isinstance(target, Artifact) else open_artifact(target))
    return artifacts, urls


def _numbers(what: str, given: Sequence[int]) -> list[int]:
    if not given or any(number < 1 for number in given):
        raise UsageError(f"{what} {', '.join(map(str, given)) or 'empty'}: whole numbers from 1 up are wanted")
    return sorted(set(given))


def _conditions(
    batches: Sequence[int],
    boundaries: Sequence[Boundary],
    threads: int | Sequence[int] | None,
    devices: Device | Sequence[Device],
    *,
    cuda_graph: bool,
) -> list[Conditions]:
    """Every combination, the batches of one set of options next to one another."""
    counts = [None] if threads is None else _numbers("threads", [threads] if isinstance(threads, int) else threads)
    places: Sequence[Device] = [devices] if isinstance(devices, str) else list(dict.fromkeys(devices))
    return [
        Conditions(
            batch=batch,
            boundary=boundary,
            options=SessionOptions(device=place, threads=count, own_stream=True, cuda_graph=cuda_graph),
        )
        for place in places
        for count in counts
        for boundary in dict.fromkeys(boundaries)
        for batch in batches
    ]


def _find_endpoints(urls: Sequence[str], artifact: Artifact | None) -> list[Endpoint]:
    if not urls:
        return []
    from dlops.bench.oip import find_endpoint

    return [find_endpoint(url, model=artifact.name if artifact else None) for url in urls]


def _title(artifacts: Sequence[Artifact], urls: Sequence[str]) -> str:
    names = list(dict.fromkeys([artifact.name for artifact in artifacts] + list(urls)))
    return ", ".join(names) or "eager"
