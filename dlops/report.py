"""What a bench run found: measurements with their raw samples, and the machine that they were made on."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field

from dlops.environment import Environment
from dlops.errors import CorruptError
from dlops.manifest import Manifest, Record, read_manifest
from dlops.version import __version__

Boundary = Literal["device", "host", "preprocessing", "network"]
Scenario = Literal["single_stream", "multi_stream", "server", "offline"]
Metric = Literal["p90", "p99", "throughput"]
# What made the requests and took their times: this package, or MLCommons' LoadGen.
Engine = Literal["dlops", "loadgen"]
# Beside the latencies under "<key>", the samples file holds when each call began (under a rate: was due), in which
# turn, under a rate its service time, -1 where it failed, and when calls that began before the row were answered.
STARTS, TURNS, SERVICE, EARLIER = ".starts", ".turns", ".service", ".earlier"
# On a GPU, what else was timed of each call: the suffix of its samples, and the field of Clocks that it fills.
DEVICE, ENQUEUE, COPY_IN, COPY_OUT = ".device", ".enqueue", ".copy_in", ".copy_out"
CLOCKS = {DEVICE: "device", ENQUEUE: "enqueue", COPY_IN: "copy_in", COPY_OUT: "copy_out"}
SUFFIXES = ("", STARTS, TURNS, SERVICE, EARLIER, *CLOCKS)
# Beside the series of a telemetry under "<key>.<name>", when each point was taken, in ns from its first sample.
TIMES = ".times_ns"


class Interval(Record):
    """A point estimate with its two-sided 95 % interval; an end is null where the sample is too small to give it."""

    value: float
    low: float | None
    high: float | None


class Latency(Record):
    """In nanoseconds. A quantile is null where the sample is too small to certify it (p99 needs 368).

    effective_samples: how many independent calls the median's precision is worth; calls near in time resemble one
    another, so it is at most `samples`. The median's alone: p90 and p99 are certified by counts of their own, which may
    be larger (slow calls scattered evenly over a run whose median wanders), and which a verdict's reasons give.
    """

    samples: int = Field(ge=1)
    effective_samples: int = Field(ge=1)
    p50_ns: Interval | None
    p90_ns: Interval | None
    p99_ns: Interval | None
    mean_ns: float
    min_ns: float
    max_ns: float


class Clocks(Record):
    """The parts of a call on a GPU, each with quantiles of its own, which do not add up to those of the latency.

    device: on the device, between an event before the inference and one after it, pauses between kernels included.
    enqueue: on the host, until the inference was enqueued; null where the runtime waits for its end. copy_in, copy_out:
    on the host, from and to numpy arrays; null at the boundary "device", which has none.
    """

    device: Latency
    enqueue: Latency | None = None
    copy_in: Latency | None = None
    copy_out: Latency | None = None


class Load(Record):
    """What was asked of the target.

    scenario: MLPerf's words. single_stream: one call of one item after the other. multi_stream: the same with several
    items a call. server: calls at a rate, whether or not earlier ones are answered. offline: as much as it takes, in
    batches or with several calls in flight. metric: the number that is the scenario's result by MLPerf's rules; null
    where the scenario was not asked for by name, but follows from the rest of the load.
    batch: items a call. concurrency: calls in flight. rate: offered calls a second, null in a closed loop.
    """

    scenario: Scenario = "single_stream"
    metric: Metric | None = None
    batch: int = Field(1, ge=1)
    concurrency: int = Field(1, ge=1)
    rate: float | None = None


class Verdict(Record):
    """steady: the row can be quoted. reasons: what stands against it, or against one of its numbers.

    observed: those of the reasons that its samples do not show (failed calls, a warm-up cut short, Ctrl-C). remarks:
    those that they do not show and that do not stand against the row.
    """

    steady: bool
    reasons: tuple[str, ...] = ()
    observed: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()


class ColdStart(Record):
    """How a fresh process came to its first answer, once, in nanoseconds, its files in the page cache.

    total_ns: from the start of the process to its first answer, interpreter and imports included. load_ns: opening the
    model, its runtime imported. first_call_ns: the first call, which allocates and may compile.
    """

    total_ns: int
    load_ns: int
    first_call_ns: int


class ServerTime(Record):
    """Where a request's time went, by the server's own counts: means over `requests`, in nanoseconds.

    items: rows of the requests that the model ran; executions: its runs. queue_ns: waiting for a run; compute_*_ns:
    preparing the inputs, the model, preparing the outputs; cache_ns: looking up and storing answers. client_ns: what
    the same requests took at the client, from the send.
    """

    requests: int = Field(ge=1)
    items: int
    executions: int
    queue_ns: float
    compute_input_ns: float
    compute_infer_ns: float
    compute_output_ns: float
    cache_ns: float = 0.0
    client_ns: float

    @property
    def outside_ns(self) -> float:
        """Network and framework: what the client saw beyond the parts that the server counts; at least 0."""
        inside = self.queue_ns + self.compute_input_ns + self.compute_infer_ns + self.compute_output_ns + self.cache_ns
        return max(0.0, self.client_ns - inside)

    @property
    def mean_batch(self) -> float | None:
        """Items a run; None where nothing was run."""
        return self.items / self.executions if self.executions else None


class Measurement(Record):
    """One target under one load.

    target: what was measured ("digits/onnx-int8", "eager", a URL). artifact: its slug where it is one.
    engine: what made the requests. LoadGen's rows are of no MLPerf workload, and no MLPerf results.
    runtime, provider, device, precision: what truly ran; "unknown" where a server does not say.
    boundary: what the latency includes. samples: the key of the raw latencies in the report's samples file.
    paired_with: the key of the row that its turns are paired with, which the speed-up is over.
    duration_ns: how long a row lasted that is over the network, at a rate or LoadGen's, after the warm-up; null where
    targets took turns.
    throughput: items a second. errors: calls that failed, by kind; in a closed loop they are in no latency, in an open
    loop each counts as the worst latency. speedup: over the report's baseline under the same load, from paired turns.
    latency: under a rate, response time: from when a call was due to its answer. service, null without a rate: from its
    send, of the calls that succeeded; what a closed loop would have shown. lag_p99_ns: how late calls left.
    server: where the time went inside a service, null where it does not say. clocks: the parts of a call on CUDA at the
    boundaries "device" and "host", null elsewhere.
    nodes: for each provider how many nodes of the graph it was given, by operator; empty where that is not known.
    peak_memory_bytes: most that a fresh process held that loaded and ran it, interpreter and runtime included.
    device_memory_bytes: by how much the GPU's memory in use had grown after its first calls, CUDA's context included.
    cold_start: of that process; null where a service or this very process ran it.
    accuracy: a fraction, with the drop against the dense checkpoint in percentage points and its 95 % interval.
    other_load: share of the CPU time, while the row was measured, that was neither the run's nor the service's.
    macs: multiply-accumulates of one call, by the shapes of an ONNX graph; null where they are not known, and uncounted
    why not. peak_share: of the FLOP/s that the calibration measured, with as many threads or on that GPU.
    moved_bytes: weights, inputs and outputs of one call, each once: the least that has to move where no cache keeps it.
    bandwidth_share: that, of the bytes a second that a copy of the calibration read and wrote; over 1 from caches.
    energy_j_per_item: joules an item by the counters named in energy_sources, which count what else they power too.
    """

    target: str
    artifact: str | None
    engine: Engine = "dlops"
    runtime: str
    provider: str
    device: str
    precision: str
    threads: int | None
    boundary: Boundary
    load: Load
    samples: str
    paired_with: str | None = None
    duration_ns: int | None = None
    latency: Latency
    service: Latency | None = None
    lag_p99_ns: float | None = None
    server: ServerTime | None = None
    clocks: Clocks | None = None
    throughput: Interval
    speedup: Interval | None = None
    errors: dict[str, int] = {}
    warmup_calls: int
    model_bytes: int | None = None
    nodes: dict[str, dict[str, int]] = {}
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None
    cold_start: ColdStart | None = None
    accuracy: float | None = None
    accuracy_samples: int | None = None
    drop_points: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    flips: int | None = None
    other_load: float | None = None
    energy_j_per_item: float | None = None
    energy_sources: tuple[str, ...] = ()
    macs: int | None = None
    uncounted: str | None = None
    peak_share: float | None = None
    moved_bytes: int | None = None
    bandwidth_share: float | None = None
    verdict: Verdict

    @property
    def error_count(self) -> int:
        return sum(self.errors.values())

    @property
    def result(self) -> Interval | None:
        """The number that its scenario is judged by; None where none was asked for, or the sample cannot certify it."""
        match self.load.metric:
            case "p90":
                return self.latency.p90_ns
            case "p99":
                return self.latency.p99_ns
            case "throughput":
                return self.throughput
        return None

    @property
    def label(self) -> str:
        """What a table or a plot calls it: the slug, or the target where it is no artifact."""
        if self.boundary == "network":
            return f"{self.target} ({self.artifact})" if self.artifact else self.target
        return self.artifact or self.target


class Objective(Record):
    """What a service has to keep: a quantile of the response time within a limit.

    rate: the highest rate tried that certainly kept it, null where none did or none was tried; missed: the lowest above
    it that did not, null where all did. Both in requests a second. tried: the keys of the rows that it was looked for
    with, in order.
    """

    quantile: Literal["p50", "p90", "p99"]
    limit_ns: float = Field(gt=0)
    rate: float | None = None
    missed: float | None = None
    tried: tuple[str, ...] = ()


class Machine(Record):
    """What a calibration holds for: on another processor, kernel, Python or dlops it would come out otherwise."""

    cpu: str
    cores: int
    system: str
    python: str
    dlops_version: str


class TimingCost(Record):
    """What timing costs in process.

    added_ns: to each recorded latency, by the loop that records it. share_of_1_ms: how much longer than that a wait of
    1 ms is recorded, as a fraction. clock_step_ns: the smallest difference that the clock shows; clock_read_ns: one
    reading of it.
    """

    added_ns: Interval
    share_of_1_ms: Interval
    clock_step_ns: int
    clock_read_ns: float


class SendingCost(Record):
    """What the client and the loopback cost: measured against a null server, which answers at once.

    floor_ns: median round trip, one call in flight. closed_rate: requests a second with `closed_concurrency` in flight.
    capacity: the highest rate tried at which 99 % of one sender's requests certainly leave within 1 ms of when they are
    due; missed: the lowest above it that was not kept so. lag: how late requests leave at lag_rate. oversleep: how much
    longer than asked a sleep of 1 ms lasts. Null: not measured, or not certified by the sample.
    """

    floor_ns: Interval | None
    closed_concurrency: int
    closed_rate: Interval | None
    capacity: float | None
    missed: float | None
    lag_rate: float
    lag_p50_ns: Interval | None
    lag_p99_ns: Interval | None
    oversleep_p50_ns: Interval | None
    oversleep_p99_ns: Interval | None


class CpuPeak(Record):
    """What numpy's matrix product of float32 and a copy reach with `threads`: the best call's rate, and the median's.

    flops: operations a second, a multiplication and an addition counting two, of matrices of `matrix` rows.
    bytes_per_s: read and written together, `copy_bytes` being copied at once.
    """

    threads: int = Field(ge=1)
    matrix: int = Field(ge=1)
    flops: float = Field(gt=0)
    flops_median: float = Field(gt=0)
    copy_bytes: int = Field(ge=1)
    bytes_per_s: float = Field(gt=0)
    bytes_per_s_median: float = Field(gt=0)


class GpuPeak(Record):
    """The same of a GPU by torch, the best of several rounds. flops: by "fp32", "tf32" and "fp16"."""

    name: str
    flops: dict[str, float]
    bytes_per_s: float = Field(gt=0)


class Peaks(Record):
    """The most that the machine was seen to do. absent: what could not be measured, with the reason."""

    cpu: tuple[CpuPeak, ...] = ()
    gpus: tuple[GpuPeak, ...] = ()
    absent: dict[str, str] = {}


class Calibration(Record):
    """The harness measured by itself. quick: made within a run; else by `dlops bench --calibrate`.

    network: null where it was not asked for. peaks: null in a quick one. reasons: what stands against its numbers.
    """

    created: AwareDatetime
    machine: Machine
    quick: bool
    timing: TimingCost
    network: SendingCost | None
    peaks: Peaks | None = None
    reasons: tuple[str, ...] = ()


class ProfiledOperator(Record):
    """One operator over all profiled calls. calls: how often it ran in all of them. share: of `Profile.total_ns`.

    name: the node's in ONNX Runtime, the operator's in torch; op_type: such as "Conv" or "aten::addmm".
    """

    name: str
    op_type: str
    provider: str
    calls: int = Field(ge=1)
    total_ns: int = Field(ge=0)
    share: float


class ProviderUse(Record):
    """What ran on one provider (in torch: on one kind of device). operators: how many; share: of the time.

    names: which, given for every provider but the session's own.
    """

    operators: int = Field(ge=1)
    share: float
    names: tuple[str, ...] = ()


class Profile(Record):
    """Where one target's time went, in a process of its own under its runtime's profiler, which slows it down.

    Shares are fractions of total_ns, which is how long the profiled calls took in all: those of the `operators` (the
    costliest), of the others and of what is outside every operator (the runtime itself, Python, waiting) add up to 1.
    times: "host" where an operator's time is taken on the CPU, "device" where it is that of its kernels on the GPU.
    op_types: the share of every type. copies: operators that copy between host and device. trace: the role of the file
    of all events, gzipped JSON in Chrome's trace format, which holds the first traced_calls of the calls.
    """

    target: str
    artifact: str | None
    runtime: str
    provider: str
    device: str
    threads: int | None
    batch: int = Field(ge=1)
    calls: int = Field(ge=1)
    total_ns: int = Field(ge=0)
    times: Literal["host", "device"] = "host"
    operators: tuple[ProfiledOperator, ...]
    others: int = Field(ge=0)
    others_share: float
    outside_share: float
    op_types: dict[str, float]
    providers: dict[str, ProviderUse]
    copies: int = Field(0, ge=0)
    trace: str
    traced_calls: int = Field(ge=1)

    @property
    def mean_ns(self) -> float:
        """Of a profiled call."""
        return self.total_ns / self.calls


class Telemetry(Record):
    """The machine while a run went on, sampled every `interval_s`.

    key: the samples file holds each of `series` under "<key>.<name>", in the unit that the name ends with (ppm:
    millionths; mw, mc: thousandths of a watt and a degree Celsius; bits: NVML's clock event reasons), and under
    "<key>.times_ns" the middles of the stretches that its points are means of. samples: how many were taken. cost: the
    share of one processor that sampling took. cpus: processors that the run could use, which shares refer to; gpus:
    names, by number. spans: when each row began and ended, by its key, in ns from the first sample. absent: what was
    not told, with the reason.
    """

    key: str
    interval_s: float = Field(gt=0)
    samples: int = Field(ge=0)
    cost: float | None = None
    cpus: int = Field(ge=1)
    gpus: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    spans: dict[str, tuple[int, int]] = {}
    absent: dict[str, str] = {}


class Report(Manifest):
    """report.json: files hold the role samples, a safetensors file of int64 nanoseconds by measurement key.

    profiles: of targets that were run once more under a profiler; files hold the trace of each. telemetry: of each run
    that rows are from.
    objectives: by target, where a highest rate was looked for.
    baseline: the target that speed-ups are counted from. chosen: the target to deploy, chosen_because in words, of
    those that lose at most max_drop percentage points.
    notes: what a reader must know about all of it. partial: it was interrupted. calibration: what the harness itself
    costs on this machine.
    """

    file_name: ClassVar[str] = "report.json"

    kind: Literal["report"] = "report"
    schema_version: int = Field(1, alias="schema", ge=1)
    dlops_version: str = __version__
    title: str
    command: tuple[str, ...]
    environment: Environment
    measurements: tuple[Measurement, ...]
    objectives: dict[str, Objective] = {}
    baseline: str | None = None
    chosen: str | None = None
    chosen_because: str | None = None
    max_drop: float | None = None
    notes: tuple[str, ...] = ()
    partial: bool = False
    calibration: Calibration | None = None
    profiles: tuple[Profile, ...] = ()
    telemetry: tuple[Telemetry, ...] = ()

    def raw_samples(self) -> dict[str, NDArray[np.int64]]:
        """Every latency that was measured, in order, in nanoseconds, by measurement key.

        Beside "<key>" lie "<key>.starts" (when the call began or was due, from the row's start), where targets took
        turns "<key>.turns" (the round of each call), under a rate "<key>.service" (from the send; -1 where the call
        failed), and over the network "<key>.earlier" (when calls that began before the row were answered within it).
        On CUDA there are the names of CLOCKS, too: the parts of each call. The series of each telemetry are there too.
        Raises CorruptError where those or a row's latencies are missing.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            arrays = {key: array.astype(np.int64) for key, array in load_file(self.path("samples")).items()}
        except (SafetensorError, KeyError, OSError) as error:
            raise CorruptError(f"{self.directory}: no samples that dlops wrote ({error})") from None
        wanted = {row.samples for row in self.measurements}
        for one in self.telemetry:
            wanted |= {f"{one.key}.{name}" for name in one.series} | ({one.key + TIMES} if one.series else set())
        missing = wanted - arrays.keys()
        if missing:
            raise CorruptError(f"{self.path('samples')}: no samples for {', '.join(sorted(missing))}")
        return arrays


def read_report(path: Path | str) -> Report:
    """The report in a directory (or at its report.json), its digests checked."""
    path = Path(path)
    return read_manifest(path.parent if path.name == Report.file_name else path, Report)
