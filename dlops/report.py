"""What a bench run found: measurements with their raw samples, and the machine that they were made on."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dlops.environment import Environment
from dlops.errors import CorruptError
from dlops.manifest import Manifest, read_manifest
from dlops.report_machine import (
    TIMES,
    Calibration,
    CpuPeak,
    GpuPeak,
    Machine,
    Peaks,
    SendingCost,
    Telemetry,
    TimingCost,
)
from dlops.report_profile import Profile, ProfiledOperator, ProviderUse
from dlops.report_rows import (
    CLOCKS,
    COPY_IN,
    COPY_OUT,
    DEVICE,
    EARLIER,
    ENQUEUE,
    PROCESSES,
    SERVICE,
    STARTS,
    SUFFIXES,
    TURNS,
    Arrivals,
    Boundary,
    Clocks,
    ColdStart,
    Engine,
    Interval,
    Latency,
    Load,
    Measurement,
    Metric,
    Objective,
    Scenario,
    ServerTime,
    Verdict,
)
from dlops.version import __version__

__all__ = [
    "CLOCKS", "COPY_IN", "COPY_OUT", "DEVICE", "EARLIER", "ENQUEUE", "PROCESSES", "SERVICE", "STARTS", "SUFFIXES",
    "TIMES", "TURNS", "Arrivals", "Boundary", "Calibration", "Clocks", "ColdStart", "CpuPeak", "Engine", "GpuPeak",
    "Interval", "Latency", "Load", "Machine", "Measurement", "Metric", "Objective", "Peaks", "Profile",
    "ProfiledOperator", "ProviderUse", "Report", "Scenario", "SendingCost", "ServerTime", "Telemetry", "TimingCost",
    "Verdict", "read_report",
]  # fmt: skip


class Report(Manifest):
    """The document. `files` holds the role samples: a safetensors file of int64 nanoseconds by measurement key."""

    file_name: ClassVar[str] = "report.json"

    kind: Literal["report"] = "report"
    """Always `report`."""
    schema_version: int = Field(1, alias="schema", ge=1)
    """[number] Of the schema that this page describes."""
    dlops_version: str = __version__
    """That wrote it."""
    title: str
    """What the page is called."""
    command: tuple[str, ...]
    """That made it; empty from Python."""
    environment: Environment
    """Where it was measured."""
    measurements: tuple[Measurement, ...]
    """The rows, in order."""
    objectives: dict[str, Objective] = {}
    """By target, where a highest rate was looked for."""
    baseline: str | None = None
    """The target that speed-ups are counted from; null where there is none."""
    chosen: str | None = None
    """The target to deploy; null where none qualified or none was to be chosen."""
    chosen_because: str | None = None
    """Why that one, or why none, in words; null where none was to be chosen."""
    max_drop: float | None = None
    """[percentage points] Of accuracy that the chosen one was allowed to lose; null where none was to be chosen."""
    notes: tuple[str, ...] = ()
    """What a reader must know about all of it."""
    partial: bool = False
    """Whether it was interrupted, or a target failed."""
    calibration: Calibration | None = None
    """What the harness itself costs on this machine; null where that was not measured."""
    profiles: tuple[Profile, ...] = ()
    """Of targets that were run once more under a profiler; files hold the trace of each."""
    telemetry: tuple[Telemetry, ...] = ()
    """The machine meanwhile, for each run that rows are from."""

    def raw_samples(self) -> dict[str, NDArray[np.int64]]:
        """Every latency that was measured, in order, in nanoseconds, by measurement key.

        Beside "<key>" lie "<key>.starts" (when the call began or was due, from the row's start), where targets took
        turns "<key>.turns" (the round of each call), where several processes ran a target one after the other
        "<key>.processes" (the number of each call's), under a rate "<key>.service" (from the send; -1 where the call
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
