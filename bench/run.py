"""The bench stage's door: measure artifacts in process and services over HTTP or gRPC, as one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dlops import signals
from dlops.artifact import Artifact, open_artifact
from dlops.bench import inprocess
from dlops.bench.arrivals import Offered
from dlops.bench.inprocess import Conditions
from dlops.bench.launches import check_processes
from dlops.bench.loadgen import check_installed
from dlops.bench.payload import most_items
from dlops.bench.pilot import LONGEST_S, length
from dlops.bench.results import Measured, MeasureInterrupted, choose_fastest, merge, save_report
from dlops.bench.rows import Rows
from dlops.bench.scenarios import Asked, Step, numbers, steps
from dlops.bench.session_rows import time_alone, time_in_turns
from dlops.bench.telemetry import Recorder
from dlops.bench.transport import canonical
from dlops.checkpoint import Checkpoint
from dlops.console import say
from dlops.errors import UsageError
from dlops.report import Boundary, Engine, Scenario
from dlops.runtimes import SessionOptions
from dlops.runtimes.session import Device

if TYPE_CHECKING:
    from dlops.bench.oip import Endpoint
    from dlops.checkpoint import ModuleSource

__all__ = ["MeasureInterrupted", "Measured", "Offered", "choose_fastest", "measure", "merge", "save_report"]


def measure(
    targets: Sequence[Artifact | Path | str],
    *,
    checkpoint: Checkpoint | None = None,
    compiled: bool = False,
    batch: Sequence[int] | None = None,
    boundary: Sequence[Boundary] = ("host",),
    threads: int | Sequence[int] | None = None,
    device: Device | Sequence[Device] = "auto",
    cuda_graph: bool = False,
    trust: bool = False,
    concurrency: Sequence[int] | None = None,
    processes: int = 1,
    offered: Offered | None = None,
    scenarios: Sequence[Scenario] = (),
    samples_per_query: int | None = None,
    engine: Engine = "dlops",
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
    a module or a function keeps the two in this process. batch (by default 1), boundary, threads and device are axes:
    for each combination all targets take turns within one run. boundary "device": the inference alone, inputs in place;
    "preprocessing": from the raw input, decoding included. cuda_graph: inferences replay a CUDA graph. trust: as in
    SessionOptions. concurrency: calls kept in flight, at URLs and in process by as many threads on one session, by
    default 1 unless `offered` is given. processes: fresh ones that run each target in process, one after the other, for
    a part of the row's time each; from 6 on intervals are of what differs between processes, too. offered: requests at
    rates or from a trace, whether or not earlier ones are answered. scenarios: MLPerf's, instead of those axes: batch
    and concurrency are then for "offline" (by default 32 items or what all targets take, and 8 in flight), `offered`
    for "server", in process too, and samples_per_query (8) for "multi_stream". engine: "loadgen" has MLCommons' LoadGen
    run them. duration_s: for each row, on the clock: the waits between turns count, the warm-up does not; without it a
    row lasts as long as it takes to know p50 to 1 % and p99 to 5 %, from 3 s to max_duration_s. payload: whose samples
    are sent to URLs; without it the first artifact among the targets, else random numbers within the signature.

    Raises UsageError and MachineError before anything is timed where a target is not there or cannot run what is
    asked, and MeasureInterrupted, which holds the rows made so far, on Ctrl-C.
    """
    artifacts, urls = _sorted_out(targets)
    urls = [canonical(url) for url in urls]
    # Plain http:// is the protocol's REST too.
    asked_of = [url.removeprefix("oip+") for url in urls]
    if twice := next((url for place, url in enumerate(urls) if asked_of[place] in asked_of[:place]), None):
        raise UsageError(f"{twice} is named twice", hint="two runs and dlops compare tell what chance alone does")
    lasting = length(duration_s, max_duration_s)
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
    on_machine = threads is not None or device not in ("auto", ["auto"], ("auto",))
    if not chosen and (on_machine or trust or list(boundary) != ["host"]):
        raise UsageError(
            "threads, device, boundary and trust are for targets on this machine, and only URLs are named",
            hint="leave them out",
        )
    conditions = _conditions(planned, boundary, threads, device, cuda_graph=cuda_graph, trust=trust)
    check_processes(processes)
    conditions = [(step, replace(one, processes=processes)) for step, one in conditions]
    if cuda_graph and (not chosen or any(one.options.device == "cpu" for _, one in conditions)):
        what = "a service runs its models itself" if not chosen else "there is none on the CPU"
        raise UsageError(f"a CUDA graph was asked for, and {what}", hint="leave --cuda-graph out, or --device cuda")
    one_at_a_time = cuda_graph or "device" in boundary
    if chosen and one_at_a_time and any(one.concurrency > 1 for _, one in conditions):
        what = "a CUDA graph" if cuda_graph else "--boundary device"
        raise UsageError(f"{what} has one call at a time: its buffers are one caller's", hint="--concurrency 1")
    alone = [step for step in planned if engine == "loadgen" or step.scenario == "server"]
    if chosen and alone and one_at_a_time:
        what = "a CUDA graph replays" if cuda_graph else "--boundary device times"
        maker = "LoadGen" if engine == "loadgen" else "the server scenario"
        raise UsageError(
            f"{what} calls on bound buffers, and {maker} gives each call arrays of its own",
            hint="leave --cuda-graph out" if cuda_graph else "--boundary host",
        )
    if processes > 1 and (urls or alone):
        what = "a service is one" if urls else "each rate of the server scenario and LoadGen take one"
        raise UsageError(f"{processes} processes a row, and {what}", hint="leave --processes out")
    own_process = "--scenario server and LoadGen" if alone else "more than one process" if processes > 1 else None
    inprocess.check(
        chosen, batches=sorted({step.batch for step in planned}), boundaries=boundary, own_process=own_process
    )
    endpoints = _find_endpoints(urls, sent)

    with signals.heard_once(), Recorder() as recorder:
        rows = Rows(title=title or _title(artifacts, urls), command=tuple(command), lasting=lasting, recorder=recorder)
        try:
            if chosen and alone != planned and (len(chosen) > 1 or checkpoint is not None):
                rows.baseline = chosen[0].target
            for step, condition in conditions if chosen else ():
                if step in alone:
                    time_alone(rows, chosen, condition, step, engine=engine)
                else:
                    time_in_turns(rows, chosen, condition)
            _load_services(rows, endpoints, sent, planned, engine=engine)
            if not rows.rows:
                first, *others = rows.failures
                for failure in others:
                    say(str(failure))
                raise first
            return rows.result(partial=bool(rows.failures))
        except KeyboardInterrupt:
            if not rows.rows:
                raise
            raise MeasureInterrupted(rows.result(partial=True)) from None


def _load_services(
    rows: Rows, endpoints: Sequence[Endpoint], sent: Artifact | None, planned: Sequence[Step], *, engine: Engine
) -> None:
    if not endpoints:
        return
    # Imported here: what sends requests takes packages that artifacts in process do not.
    from dlops.bench.service_rows import load_service

    for endpoint in endpoints:
        rows.recorder.watch(endpoint.url, endpoint.host, endpoint.port)
        for step in planned:
            load_service(rows, endpoint, sent, step, engine=engine)


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
    *,
    cuda_graph: bool,
    trust: bool,
) -> list[tuple[Step, Conditions]]:
    """Every combination, the steps under one set of options next to one another."""
    counts = [None] if threads is None else numbers("threads", [threads] if isinstance(threads, int) else threads)
    places: Sequence[Device] = [devices] if isinstance(devices, str) else list(dict.fromkeys(devices))
    return [
        (
            step,
            Conditions(
                batch=step.batch, boundary=boundary, scenario=step.scenario, concurrency=callers,
                options=SessionOptions(
                    device=place, threads=count, own_stream=callers == 1, stream_per_thread=callers > 1,
                    cuda_graph=cuda_graph, trust=trust,
                ),
            ),
        )
        for place in places
        for count in counts
        for boundary in dict.fromkeys(boundaries)
        for step in planned
        for callers in step.callers
    ]  # fmt: skip


def _find_endpoints(urls: Sequence[str], artifact: Artifact | None) -> list[Endpoint]:
    if not urls:
        return []
    from dlops.bench.oip import find_endpoint

    return [find_endpoint(url, model=artifact.name if artifact else None) for url in urls]


def _title(artifacts: Sequence[Artifact], urls: Sequence[str]) -> str:
    names = list(dict.fromkeys([artifact.name for artifact in artifacts] + list(urls)))
    return ", ".join(names) or "eager"
