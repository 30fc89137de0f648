"""The machine that a report was made on: what the harness costs there, its peaks, and what it did during the run.

How fields are documented is said in `dlops.report_rows`.
"""

from __future__ import annotations

from pydantic import AwareDatetime, Field

from dlops.manifest import Record
from dlops.report_rows import Interval

# Beside the series of a telemetry under "<key>.<name>", when each point was taken, in ns from its first sample.
TIMES = ".times_ns"


class Machine(Record):
    """What a calibration holds for: on another processor, kernel, Python or dlops it would come out otherwise."""

    cpu: str
    """The processor's name."""
    cores: int
    """[processors] That the process might use."""
    system: str
    """Operating system and kernel."""
    python: str
    """Its version."""
    dlops_version: str
    """That measured it."""


class TimingCost(Record):
    """What timing costs in process."""

    added_ns: Interval
    """To each recorded latency, by the loop that records it."""
    share_of_1_ms: Interval
    """[fraction] How much longer than that a wait of 1 ms is recorded."""
    clock_step_ns: int
    """The smallest difference that the clock shows."""
    clock_read_ns: float
    """One reading of it."""


class SendingCost(Record):
    """What the client and the loopback cost: measured against a null server, which answers at once."""

    floor_ns: Interval | None
    """Median round trip, one call in flight; null where it was not measured or the sample gives no interval."""
    closed_concurrency: int
    """[calls] In flight for `closed_rate`."""
    closed_rate: Interval | None
    """[requests/s] Answered with so many in flight; null where it was not measured."""
    capacity: float | None
    """[requests/s] The highest rate tried at which 99 % of one sender's requests certainly leave within 1 ms of when
    they are due; null where none was or none was tried."""
    missed: float | None
    """[requests/s] The lowest rate above that which was not kept so; null where all were."""
    lag_rate: float
    """[requests/s] At which the lag is measured."""
    lag_p50_ns: Interval | None
    """How late requests leave at that rate, the median; null where it was not measured or the sample gives none."""
    lag_p99_ns: Interval | None
    """The 99th percentile; null likewise."""
    oversleep_p50_ns: Interval | None
    """How much longer than asked a sleep of 1 ms lasts, the median; null likewise."""
    oversleep_p99_ns: Interval | None
    """The 99th percentile; null likewise."""


class CpuPeak(Record):
    """What numpy's matrix product of float32 and a copy reach with `threads`: in the best call, and in the median."""

    threads: int = Field(ge=1)
    """[threads] That computed, and that copied."""
    matrix: int = Field(ge=1)
    """[rows] Of the square matrices."""
    flops: float = Field(gt=0)
    """[operations/s] Of the best product; a multiplication and an addition count two."""
    flops_median: float = Field(gt=0)
    """[operations/s] Of the median product."""
    copy_bytes: int = Field(ge=1)
    """Copied at once."""
    bytes_per_s: float = Field(gt=0)
    """Of the best copy, read and written together."""
    bytes_per_s_median: float = Field(gt=0)
    """[bytes/s] Of the median copy."""


class GpuPeak(Record):
    """The same of a GPU by torch, the best of several rounds."""

    name: str
    """The GPU's."""
    flops: dict[str, float]
    """[operations/s] By `fp32`, `tf32` and `fp16`."""
    bytes_per_s: float = Field(gt=0)
    """Of a copy on the device, read and written together."""


class Peaks(Record):
    """The most that the machine was seen to do."""

    cpu: tuple[CpuPeak, ...] = ()
    """For each number of threads that was tried."""
    gpus: tuple[GpuPeak, ...] = ()
    """By number."""
    absent: dict[str, str] = {}
    """What could not be measured, with the reason."""


class Calibration(Record):
    """The harness measured by itself."""

    created: AwareDatetime
    """When."""
    machine: Machine
    """What it holds for."""
    quick: bool
    """Whether it was made within a run; else by `dlops bench --calibrate`."""
    timing: TimingCost
    """In process."""
    network: SendingCost | None
    """Over the loopback; null where that was not asked for."""
    peaks: Peaks | None = None
    """Null in a quick one."""
    reasons: tuple[str, ...] = ()
    """What stands against its numbers."""


class Telemetry(Record):
    """The machine while a run went on. Its series are in the samples file.

    Each of `series` lies there under "<key>.<name>", in the unit that its name ends with (ppm: millionths; mw, mc:
    thousandths of a watt and of a degree Celsius; bits: NVML's clock event reasons), and under "<key>.times_ns" the
    middles of the stretches that its points are means of.
    """

    key: str
    """Under which the samples file holds its series."""
    interval_s: float = Field(gt=0)
    """Between two samples."""
    samples: int = Field(ge=0)
    """[samples] That were taken."""
    cost: float | None = None
    """[fraction] Of one processor that sampling took; null where it did not come to an end."""
    cpus: int = Field(ge=1)
    """[processors] That the run could use, which shares refer to."""
    gpus: tuple[str, ...] = ()
    """Names, by number."""
    series: tuple[str, ...] = ()
    """Names of the series."""
    spans: dict[str, tuple[int, int]] = {}
    """[ns] From the first sample: when each row began and ended, by its key."""
    absent: dict[str, str] = {}
    """What the machine did not tell, with the reason."""
