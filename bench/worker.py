"""The process that one target is timed in: it opens the target, then calls it whenever the run gives it a turn.

Run as `python -m dlops.bench.worker JOB`; its end of the conversation is `bench.channel`, the other end's is
`bench.processes`. It exits when its standard input closes, so none outlives the run that started it.
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dlops import catalog
from dlops.artifact import Artifact, open_artifact
from dlops.bench.boundcall import bound_arm
from dlops.bench.channel import Channel, telling
from dlops.bench.fifo import PipeTicker, keep_schedule
from dlops.bench.nvml import memory_growth
from dlops.bench.payload import artifact_feeds, random_feed, raw_batches
from dlops.bench.together import Together
from dlops.bench.turns import turn_message
from dlops.checkpoint import Checkpoint, import_model_source, load_checkpoint
from dlops.cudart import pci_address
from dlops.errors import MachineError, UsageError, missing_package
from dlops.manifest import Record
from dlops.report import Boundary, ColdStart
from dlops.runtimes.session import Device, Placement, Session, SessionOptions
from dlops.signature import Feed
from dlops.timing import Local, collector_off

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

Kind = Literal["artifact", "eager", "compiled"]
# Enough for a runtime to have allocated what it will hold.
_MEMORY_CALLS = 5


class Job(Record):
    """What to open and how to call it.

    directory: of an artifact, or of a checkpoint for eager and compiled. model: python:package.module:function that
    builds its module, where it names no builder. samples: the directory of the artifact whose samples are fed; None
    feeds random numbers that fit. spawned_ns: when the process was started, on the clock that all processes share.
    """

    target: str
    kind: Kind
    directory: str
    model: str | None = None
    samples: str | None = None
    batch: int
    boundary: Boundary = "host"
    device: Device = "auto"
    threads: int | None = None
    cuda_graph: bool = False
    trust: bool = False
    concurrency: int = 1
    spawned_ns: int = 0


class Ready(Record):
    """What the process says once it could be called: where the target truly runs, what it took, what it holds.

    gpu: the PCI address of the one that it runs on.
    """

    runtime: str
    device: str
    provider: str
    precision: str
    threads: int
    nodes: dict[str, dict[str, int]] = {}
    cold_start: ColdStart
    peak_memory_bytes: int
    device_memory_bytes: int | None = None
    gpu: str | None = None

    @property
    def placement(self) -> Placement:
        return Placement(
            runtime=self.runtime, device=self.device, provider=self.provider, precision=self.precision,
            threads=self.threads, nodes=self.nodes,
        )  # fmt: skip


def open_job(job: Job) -> tuple[Session, int]:
    """The session, and the nanoseconds that opening it took once its runtime was imported."""
    # TensorRT's rows are held against the module on the same GPU.
    device: Device = "cuda" if job.kind != "artifact" and job.device == "tensorrt" else job.device
    options = SessionOptions(
        device=device, threads=job.threads, own_stream=job.concurrency == 1,
        stream_per_thread=job.concurrency > 1, cuda_graph=job.cuda_graph, trust=job.trust,
    )  # fmt: skip
    if job.kind == "artifact":
        artifact = open_artifact(job.directory)
        opener = catalog.resolve(catalog.RUNTIMES, "runtime", artifact.variant.format)
        began = time.perf_counter_ns()
        session = opener(artifact, options)
    else:
        _import_torch()
        checkpoint = load_checkpoint(job.directory)
        source = None if job.model is None else import_model_source(job.model)
        began = time.perf_counter_ns()
        session = open_module(job.kind, checkpoint, source, options)
    return session, time.perf_counter_ns() - began


def open_module(kind: Kind, checkpoint: Checkpoint, model: ModuleSource | None, options: SessionOptions) -> Session:
    """A checkpoint's module, eager or compiled. Raises MachineError where torch is not installed."""
    _import_torch()
    from dlops.runtimes.eager import open_compiled, open_eager

    open_it = open_compiled if kind == "compiled" else open_eager
    return open_it(checkpoint.build_module(model), checkpoint.signature, options)


def _import_torch() -> None:
    try:
        import torch  # noqa: F401 - imported ahead of what is timed
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise missing_package("torch", extra="export", needed_for="the eager baseline") from None


def caller(session: Session, *, samples: Artifact | None, batch: int, boundary: Boundary) -> Callable[[], object]:
    """What one call is: the samples (random numbers where there are none) in turn, from where `boundary` begins."""
    feed = _feeder(session, samples=samples, batch=batch, boundary=boundary)
    return lambda: session.run(feed())


def local_arm(
    target: str, session: Session, *, samples: Artifact | None, batch: int, boundary: Boundary, concurrency: int = 1
) -> Local | Together:
    """The arm of a session in this process: what it times of a call is what `boundary` includes.

    concurrency: threads that call at once; on CUDA several have a stream each and no clocks.
    """
    if concurrency > 1:
        calls = [caller(session, samples=samples, batch=batch, boundary=boundary) for _ in range(concurrency)]
        return Together([Local(target, call) for call in calls])
    if boundary == "device" or session.placement.device.startswith("cuda"):
        feed = _feeder(session, samples=samples, batch=batch, boundary=boundary)
        return bound_arm(target, session, feed, boundary=boundary)
    return Local(target, caller(session, samples=samples, batch=batch, boundary=boundary))


def _feeder(session: Session, *, samples: Artifact | None, batch: int, boundary: Boundary) -> Callable[[], Feed]:
    """What makes the feed of each call; for the boundary "preprocessing" that is part of the call."""
    if boundary == "preprocessing":
        assert samples is not None
        assert samples.preprocess is not None
        preprocess, name = samples.preprocess, samples.signature.inputs[0].name
        raws = cycle(raw_batches(samples, batch))
        return lambda: {name: preprocess.batch(next(raws))}
    feeds = [random_feed(session.signature, batch)] if samples is None else artifact_feeds(samples, batch)
    return cycle(feeds).__next__


def _ready(
    job: Job, session: Session, load_ns: int, call: Callable[[], object], memory: Callable[[str], int | None] | None
) -> Ready:
    """memory: the bytes of a GPU's memory that more are used than before the session was opened."""
    began = time.perf_counter_ns()
    call()
    answered = time.perf_counter_ns()
    for _ in range(_MEMORY_CALLS - 1):
        call()
    placement = session.placement
    gpu = gpu_of(placement)
    return Ready(
        runtime=placement.runtime, device=placement.device, provider=placement.provider, precision=placement.precision,
        threads=placement.threads, nodes={provider: dict(counts) for provider, counts in placement.nodes.items()},
        cold_start=ColdStart(
            total_ns=answered - job.spawned_ns, load_ns=load_ns, first_call_ns=answered - began
        ),
        peak_memory_bytes=_peak_bytes(),
        device_memory_bytes=None if memory is None or gpu is None else memory(gpu), gpu=gpu,
    )  # fmt: skip


def gpu_of(placement: Placement) -> str | None:
    """The PCI address of the GPU that a session of this process runs on; None on the CPU, and where CUDA does not say,
    which the report then tells."""
    kind, _, number = placement.device.partition(":")
    if kind != "cuda":
        return None
    try:
        return pci_address(int(number or 0))
    except MachineError:
        return None


def _peak_bytes() -> int:
    # ru_maxrss survives exec on Linux: a child of a large process starts at its parent's peak. VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve(job: Job, channel: Channel) -> None:
    # Targets are started one after the other: what grows meanwhile on the GPU is this one's, its CUDA context included.
    memory = None if job.device == "cpu" else memory_growth()
    session, load_ns = open_job(job)
    # One feed for the first calls: all the samples would be counted as what the model needs.
    samples = None if job.samples is None else open_artifact(job.samples)
    if job.boundary == "preprocessing":
        first = caller(session, samples=samples, batch=job.batch, boundary=job.boundary)
    else:
        first = caller(session, samples=None, batch=job.batch, boundary="host")
    ready = _ready(job, session, load_ns, first, memory)
    arm = local_arm(
        job.target, session, samples=samples, batch=job.batch, boundary=job.boundary, concurrency=job.concurrency
    )
    call = caller(session, samples=samples, batch=job.batch, boundary=job.boundary)
    channel.send({"ready": ready.model_dump(mode="json")})
    with collector_off():
        while (message := channel.receive()) is not None:
            order, payload = message
            if "warm_up" in order:
                warmth = arm.warm_up(order["warm_up"])
                channel.send({"calls": warmth.calls, "settled": warmth.settled})
            elif "turn" in order:
                channel.send(*turn_message(arm.take_turn(order["turn"])))
            elif "schedule" in order:
                due_ns = np.frombuffer(payload, np.int64)
                ticker = PipeTicker(channel.reader)
                kept = keep_schedule(call, due_ns, give_up_ns=order["schedule"]["give_up_ns"], ticker=ticker)
                channel.send({"interrupted": kept.interrupted}, np.stack([kept.begun_ns, kept.ended_ns]).tobytes())
            elif "loadgen" in order:
                from dlops.bench.loadgen import Direct, Settings
                from dlops.bench.loadgen_child import drive_for

                settings = Settings.model_validate(order["loadgen"])
                drive_for(channel, Direct(call, settings.batch), settings)
    session.close()


def main(argument: str) -> None:
    # Ctrl-C is for the run that started this process, which then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel.of_child()
    job = Job.model_validate_json(argument)
    hint = "torch.compile needs a C++ compiler (g++) on the CPU" if job.kind == "compiled" else None
    with telling(channel, job.target, hint=hint):
        _serve(job, channel)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise UsageError("python -m dlops.bench.worker JOB")
    main(sys.argv[1])
