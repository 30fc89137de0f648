"""What Linux tells of a machine beside its CPU time: frequency, temperature, throttling, load, memory pressure, energy.

Every sensor is found once; one that is not there, or not readable, is `absent` with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SYS = Path("/sys")
PROC = Path("/proc")
Reading = dict[str, int]
# Sensors of processors by the names that their drivers give them: Intel, AMD, Arm boards.
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "x86_pkg_temp", "cpu-thermal")


@dataclass(slots=True)
class Sensors:
    """`read` gives every value by its name, in the unit that the name ends with; `absent` why others are not there."""

    absent: dict[str, str] = field(default_factory=dict)
    _readers: list[Callable[[], Reading]] = field(default_factory=list)

    def add(self, reader: Callable[[], Reading]) -> None:
        self._readers.append(reader)

    def read(self) -> Reading:
        """Without those that cannot be read at the moment."""
        values: Reading = {}
        for reader in self._readers:
            try:
                values |= reader()
            except (OSError, ValueError):
                continue  # a sensor may go away with the driver; the sample then lacks it
        return values


def find_sensors(cpus: frozenset[int], *, sys: Path = SYS, proc: Path = PROC) -> Sensors:
    """Those of this machine, for the processors that the run may use."""
    found = Sensors()
    _find_frequency(found, cpus, sys, proc)
    _find_temperature(found, sys)
    _find_throttling(found, cpus, sys)
    _find_quota(found, sys, proc)
    found.add(lambda: {"load_milli": round(float((proc / "loadavg").read_text().split()[0]) * 1000)})
    _find_pressure(found, proc)
    rapl = Rapl(sys)
    found.absent |= rapl.absent
    if rapl.domains:
        found.add(rapl.read)
    return found


class Rapl:
    """The energy counters of the processors' packages, and of memory where it has its own, in microjoules.

    domains: their names ("package-0", "dram-0"); none with a reason in `absent`. A counter that wraps goes on.
    """

    def __init__(self, sys: Path = SYS) -> None:
        self.absent: dict[str, str] = {}
        self._counters: dict[str, Path] = {}
        self._ranges: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._past: dict[str, int] = {}
        root = sys / "class" / "powercap"
        # "psys" counts the packages once more, and "core" and "uncore" are parts of a package.
        zones = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
        for zone in zones:
            name = (zone / "name").read_text().strip()
            if name.startswith("package"):
                self._try(name, zone)
            elif name == "dram":
                self._try(f"dram-{zone.name.split(':')[1]}", zone)
        if not zones:
            self.absent["CPU energy"] = f"no RAPL counter under {root}"
        elif not self._counters and not self.absent:
            self.absent["CPU energy"] = f"no package among the counters under {root}"

    @property
    def domains(self) -> list[str]:
        return list(self._counters)

    def read(self) -> Reading:
        values = {}
        for name, path in self._counters.items():
            now = int(path.read_text())
            if now < self._last[name]:
                self._past[name] += self._ranges[name]
            self._last[name] = now
            values[f"{name}_energy_uj"] = self._past[name] + now
        return values

    def _try(self, name: str, zone: Path) -> None:
        counter = zone / "energy_uj"
        try:
            self._last[name] = int(counter.read_text())
            self._ranges[name] = int((zone / "max_energy_range_uj").read_text())
        except PermissionError:
            self.absent["CPU energy"] = f"{counter} is for root alone: chmod a+r lets others read it"
            return
        except (OSError, ValueError) as error:
            self.absent["CPU energy"] = f"{counter}: {error}"
            return
        self._counters[name], self._past[name] = counter, 0


def _find_frequency(found: Sensors, cpus: frozenset[int], sys: Path, proc: Path) -> None:
    """The highest of all processors: idle ones clock down."""
    paths = [sys / f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq" for cpu in sorted(cpus)]
    paths = [path for path in paths if os.access(path, os.R_OK)]
    if paths:
        found.add(lambda: {"cpu_frequency_khz": max(int(path.read_text()) for path in paths)})
        return
    info = proc / "cpuinfo"

    def from_cpuinfo() -> Reading:
        lines = [line.partition(":") for line in info.read_text().splitlines() if line.startswith("cpu MHz")]
        return {"cpu_frequency_khz": round(max(float(value) for _, _, value in lines) * 1000)}

    try:
        from_cpuinfo()
    except (OSError, ValueError):
        found.absent["CPU frequency"] = "neither cpufreq under /sys nor a frequency in /proc/cpuinfo"
        return
    found.add(from_cpuinfo)


def _find_temperature(found: Sensors, sys: Path) -> None:
    """The highest of what the drivers of processors report."""
    paths: list[Path] = []
    for folder, name, pattern in (("class/hwmon", "name", "temp*_input"), ("class/thermal", "type", "temp")):
        for sensor in sorted((sys / folder).glob("*")):
            kind = sensor / name
            if not paths and kind.is_file() and kind.read_text().strip() in _CPU_SENSORS:
                paths = [path for path in sensor.glob(pattern) if os.access(path, os.R_OK)]
    if not paths:
        found.absent["CPU temperature"] = "no sensor of the processor under /sys/class/hwmon or /sys/class/thermal"
        return
    found.add(lambda: {"cpu_temperature_mc": max(int(path.read_text()) for path in paths)})


def _find_throttling(found: Sensors, cpus: frozenset[int], sys: Path) -> None:
    names = ("core_throttle_count", "package_throttle_count")
    paths = [sys / f"devices/system/cpu/cpu{cpu}/thermal_throttle/{name}" for cpu in sorted(cpus) for name in names]
    paths = [path for path in paths if os.access(path, os.R_OK)]
    if not paths:
        found.absent["CPU throttle counters"] = "no thermal_throttle under /sys/devices/system/cpu/cpu*"
        return
    found.add(lambda: {"cpu_throttle_count": sum(int(path.read_text()) for path in paths)})


def _find_quota(found: Sensors, sys: Path, proc: Path) -> None:
    """How long the CPU quotas of the control groups around this process have stopped it (version 2 of cgroups)."""
    group = next((line[3:] for line in _lines(proc / "self" / "cgroup") if line.startswith("0::")), "/")
    folder = sys / "fs" / "cgroup" / group.strip("/")
    levels = [folder, *folder.parents[: len(Path(group.strip("/")).parts)]]
    paths = [level / "cpu.stat" for level in levels]
    paths = [path for path in paths if any(line.startswith("throttled_usec") for line in _lines(path))]
    if not paths:
        found.absent["CPU quota"] = f"no control group of version 2 with a cpu.stat under {sys / 'fs' / 'cgroup'}"
        return

    def read() -> Reading:
        lines = [line.split() for path in paths for line in path.read_text().splitlines()]
        return {"quota_stall_us": sum(int(value) for name, value in lines if name == "throttled_usec")}

    found.add(read)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _find_pressure(found: Sensors, proc: Path) -> None:
    """How long any task waited for memory."""
    path = proc / "pressure" / "memory"

    def read() -> Reading:
        some = next(line for line in path.read_text().splitlines() if line.startswith("some"))
        return {"memory_stall_us": int(some.rpartition("total=")[2])}

    try:
        read()
    except (OSError, ValueError, StopIteration):
        found.absent["memory pressure"] = f"{path} is not there: the kernel does not account it"
        return
    found.add(read)
