"""One row of a report: a target under one load, its numbers with their intervals, and whether they can be quoted.

The text under a field is its entry in docs/report-json.md: in brackets the unit where the name does not end with it,
then what it is, and when it is null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dlops.manifest import Record

Boundary = Literal["device", "host", "preprocessing", "network"]
Scenario = Literal["single_stream", "multi_stream", "server", "offline"]
Metric = Literal["p90", "p99", "throughput"]
# What made the requests and took their times: this package, or MLCommons' LoadGen.
Engine = Literal["dlops", "loadgen"]
Arrivals = Literal["poisson", "constant", "trace"]
# Beside the latencies under "<key>", the samples file holds when each call began (under a rate: was due), in which
# turn, in which of several processes, under a rate its service time, -1 where it failed, and when calls that began
# before the row were answered.
STARTS, TURNS, PROCESSES, SERVICE, EARLIER = ".starts", ".turns", ".processes", ".service", ".earlier"
# On a GPU, what else was timed of each call: the suffix of its samples, and the field of Clocks that it fills.
DEVICE, ENQUEUE, COPY_IN, COPY_OUT = ".device", ".enqueue", ".copy_in", ".copy_out"
CLOCKS = {DEVICE: "device", ENQUEUE: "enqueue", COPY_IN: "copy_in", COPY_OUT: "copy_out"}
SUFFIXES = ("", STARTS, TURNS, PROCESSES, SERVICE, EARLIER, *CLOCKS)


class Interval(Record):
    """A point estimate with its two-sided 95 % interval, all three in the unit of the field that holds them."""

    value: float
    """[as the field] The estimate."""
    low: float | None
    """[as the field] The interval's lower end; null where the sample is too small to give it."""
    high: float | None
    """[as the field] Its upper end; null where the sample is too small to give it."""


class Latency(Record):
    """Times of calls, in nanoseconds."""

    samples: int = Field(ge=1)
    """[calls] That the numbers are of."""
    effective_samples: int = Field(ge=1)
    """[calls] How many independent calls the median's precision is worth; calls near in time resemble one another, so
    it is at most `samples`. The median's alone: p90 and p99 are certified by counts of their own, which may be larger
    (slow calls scattered evenly over a run whose median wanders), and which a verdict's reasons give."""
    p50_ns: Interval | None
    """The median; null where the sample gives it no interval (below 6 effective samples)."""
    p90_ns: Interval | None
    """Null where the sample gives it no interval (below 36)."""
    p99_ns: Interval | None
    """Null where the sample gives it no interval (below 368; from 662 on it is certified)."""
    mean_ns: float
    """The mean."""
    min_ns: float
    """The fastest call."""
    max_ns: float
    """The slowest call."""


class Clocks(Record):
    """The parts of a call on a GPU, each with quantiles of its own, which do not add up to those of the latency."""

    device: Latency
    """On the device, between an event before the inference and one after it, pauses between kernels included."""
    enqueue: Latency | None = None
    """On the host, until the inference was enqueued; null where the runtime waits for its end."""
    copy_in: Latency | None = None
    """On the host, from numpy arrays; null at the boundary "device", which has no copies."""
    copy_out: Latency | None = None
    """On the host, to numpy arrays; null at the boundary "device", which has no copies."""


class Load(Record):
    """What was asked of the target."""

    scenario: Scenario = "single_stream"
    """In MLPerf's words. single_stream: one call of one item after the other. multi_stream: the same with several items
    a call. server: calls at a rate, whether or not earlier ones are answered. offline: as much as it takes, in batches
    or with several calls in flight."""
    metric: Metric | None = None
    """The number that is the scenario's result by MLPerf's rules; null where the scenario was not asked for by name,
    but follows from the rest of the load."""
    batch: int = Field(1, ge=1)
    """[items] In one call."""
    concurrency: int = Field(1, ge=1)
    """[calls] In flight at once."""
    rate: float | None = None
    """[calls/s] Offered; null in a closed loop. Of a trace its mean."""
    arrivals: Arrivals | None = None
    """How calls at a rate came: poisson, as from independent users; constant, with equal gaps; trace, as recorded. Null
    in a closed loop, and in reports that were written before this was kept."""
    pauses_s: tuple[float, float] | None = None
    """Busy seconds, then idle ones in which none was due, again and again; null where there were none."""
    trace: str | None = None
    """Of a trace the first 16 digits of its times' SHA-256; else null."""
    attempt: int = Field(1, ge=1)
    """[number] Which measurement of this rate it is: above 1 where a search could not judge it and tried again, with
    other arrivals, or where it was asked for besides."""


class Verdict(Record):
    """Whether a row can be quoted, and what stands against it."""

    steady: bool
    """Whether it can be quoted."""
    reasons: tuple[str, ...] = ()
    """What stands against it, or against one of its numbers, and what else must be said of it; a sentence each."""
    observed: tuple[str, ...] | None = None
    """Those of the reasons against it that its samples do not show (failed calls, a warm-up cut short, Ctrl-C); null in
    reports that were written before this was kept apart."""
    remarks: tuple[str, ...] = ()
    """Those of the reasons that its samples do not show and that do not stand against the row."""


class ColdStart(Record):
    """How a fresh process came to its first answer, once, its files in the page cache."""

    total_ns: int
    """From the start of the process to its first answer, interpreter and imports included."""
    load_ns: int
    """Of that, opening the model, its runtime imported."""
    first_call_ns: int
    """Of that, the first call, which allocates and may compile."""


class ServerTime(Record):
    """Where a request's time went, by the server's own counts: times are means over `requests`."""

    requests: int = Field(ge=1)
    """[requests] That the server answered meanwhile."""
    items: int
    """[items] Rows of the requests that the model ran."""
    executions: int
    """[runs] Of the model; several requests may be in one."""
    queue_ns: float
    """Waiting for a run."""
    compute_input_ns: float
    """Preparing the inputs."""
    compute_infer_ns: float
    """The model."""
    compute_output_ns: float
    """Preparing the outputs."""
    cache_ns: float = 0.0
    """Looking up and storing answers."""
    client_ns: float
    """What the same requests took at the client, from the send."""

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
    """One target under one load: a row of the table."""

    target: str
    """What was measured: `digits/onnx-int8`, `eager`, a URL; numbered (`#2`) where one is named twice."""
    artifact: str | None
    """The artifact's slug (`onnx-int8`); null where it is none, or not known what the service serves."""
    engine: Engine = "dlops"
    """What made the requests and took their times. LoadGen's rows are of no MLPerf workload, and no MLPerf results."""
    runtime: str
    """What truly ran it; `unknown` where a service does not say."""
    provider: str
    """The runtime's back end that truly ran it, such as `CPUExecutionProvider`; `unknown` likewise."""
    device: str
    """`cpu`, `cuda:0`; `unknown` likewise."""
    precision: str
    """What the kernels compute in, such as `fp32`, `int8`; `unknown` likewise."""
    served_by: str | None = None
    """The name and version that a server gives of itself, such as `triton 2.65.0`; null where it gives none, and in
    process."""
    threads: int | None
    """[threads] For one call; null where a service does not say."""
    boundary: Boundary
    """What the latency includes: device, the inference alone; host, from numpy arrays to numpy arrays; preprocessing,
    from the raw input; network, from the send of a prepared request to the last byte of its answer."""
    load: Load
    """What was asked of it."""
    samples: str
    """The key of its raw latencies in the samples file."""
    paired_with: str | None = None
    """The key of the row that its turns are paired with, which the speed-up is over; null where there is none."""
    processes: int = Field(1, ge=1)
    """[processes] Fresh ones that ran it, one after the other; above 1, intervals are of what differs between them,
    too. A service counts as one."""
    duration_ns: int | None = None
    """How long a row lasted that is over the network, at a rate or LoadGen's, after the warm-up; null where targets
    took turns."""
    latency: Latency
    """Of a call. Under a rate response time: from when a call was due to its answer."""
    service: Latency | None = None
    """Under a rate service time: from a call's send to its answer, of those that succeeded; what a closed loop would
    have shown. Null without a rate."""
    lag_p99_ns: float | None = None
    """How late calls left under a rate, the 99th percentile; null without a rate."""
    server: ServerTime | None = None
    """Where the time went inside a service; null where it does not say."""
    clocks: Clocks | None = None
    """The parts of a call on CUDA at the boundaries "device" and "host"; null elsewhere."""
    throughput: Interval
    """[items/s] That were answered."""
    speedup: Interval | None = None
    """[ratio] How many times faster than the report's baseline under the same load, from paired turns; null without a
    baseline, of the baseline itself, and below six rounds."""
    errors: dict[str, int] = {}
    """[calls] That failed, by kind. Each counts as the worst latency: the time-out, or the slowest answer where that
    took longer."""
    warmup_calls: int
    """[calls] Made before the row, in none of its numbers."""
    model_bytes: int | None = None
    """The model file; null where it is no artifact."""
    nodes: dict[str, dict[str, int]] = {}
    """[nodes] Of the graph that each provider was given, by operator; empty where that is not known."""
    peak_memory_bytes: int | None = None
    """Most that a fresh process (of several, any) held that loaded and ran it, interpreter and runtime included; null
    where a service or the run's own process ran it."""
    device_memory_bytes: int | None = None
    """By how much the GPU's memory in use had grown after its first calls, CUDA's context included; null off CUDA and
    where NVML does not tell."""
    cold_start: ColdStart | None = None
    """Of that fresh process, of several the one with the median total; null where a service or the run's own process
    ran it."""
    accuracy: float | None = None
    """[fraction] Of the evaluation samples, as export measured it; null where that is not recorded, and of a service
    that did not give the artifact's recorded answers."""
    accuracy_samples: int | None = None
    """[samples] That the accuracy is of; null with it."""
    drop_points: float | None = None
    """What was lost against the dense checkpoint, below 0 where it gained; null with the accuracy."""
    drop_low: float | None = None
    """[percentage points] Its 95 % interval's lower end; null where there is none, as of the checkpoint itself."""
    drop_high: float | None = None
    """[percentage points] Its upper end; null likewise."""
    flips: int | None = None
    """[samples] Whose decision is not the checkpoint's; null likewise."""
    other_load: float | None = None
    """[fraction] Of the CPU time, while the row was measured, that was neither the run's nor the service's; null for
    less than a second, off Linux, and where the service's own time cannot be told apart."""
    energy_j_per_item: float | None = None
    """By the counters in `energy_sources`, which count what else they power too; null where no counter tells."""
    energy_sources: tuple[str, ...] = ()
    """Counters of the energy: `package-0` of RAPL, `gpu0` of NVML; empty where it is null."""
    macs: int | None = None
    """[multiply-accumulates] Of one call, by the shapes of an ONNX graph; null where they are not known."""
    uncounted: str | None = None
    """Why `macs` is null; null where it is not, and of services."""
    peak_share: float | None = None
    """[fraction] Of the FLOP/s that the calibration measured, with as many threads or on that GPU; null where either is
    not known, or the peak is of another precision."""
    moved_bytes: int | None = None
    """Weights, inputs and outputs of one call, each once: the least that has to move where no cache keeps it; null
    where a shape depends on the data, for weights that are widened when they are loaded, and where it is no artifact.
    """
    bandwidth_share: float | None = None
    """[fraction] That, of the bytes a second that a copy of the calibration read and wrote; over 1 from caches; null
    where either is not known."""
    verdict: Verdict
    """Whether it can be quoted."""

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
    """What a service has to keep: a quantile of the response time within a limit."""

    quantile: Literal["p50", "p90", "p99"]
    """Of the response time."""
    limit_ns: float = Field(gt=0)
    """What it has to stay within."""
    rate: float | None = None
    """[requests/s] The highest rate tried that certainly kept it; null where none did or none was tried."""
    missed: float | None = None
    """[requests/s] The lowest rate above that which did not, or could not be judged; null where all did."""
    unsure: bool = False
    """Whether `missed` could not be judged, tried twice: by too few independent requests, or because they left late."""
    stopped: str | None = None
    """Why the search ended before it had found the highest: `interrupted` by Ctrl-C, or what the target failed with;
    null where nothing cut it short."""
    tried: tuple[str, ...] = ()
    """The keys of the rows that it was looked for with, in order."""
