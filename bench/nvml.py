"""NVIDIA GPUs through NVML (package nvidia-ml-py), as sensors; written against NVML's documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dlops.bench.sensors import Reading, Sensors
from dlops.nvml import NvmlError, open_nvml, text

# Clock event reasons that slow a GPU under load; idle and set clocks are no throttling.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. pci: its address on the bus, as `same_gpu` compares it."""

    name: str
    pci: str


def same_gpu(one: str, other: str) -> bool:
    """Whether two PCI addresses are one: NVML writes the domain with eight digits, CUDA with four."""
    return _place(one) == _place(other)


def find_gpus(sensors: Sensors) -> list[Gpu]:
    """Add every GPU's sensors; the GPUs in order. What is not there is in `sensors.absent` with the reason."""
    try:
        nvml, handles = open_nvml()
    except NvmlError as error:
        sensors.absent["GPU"] = str(error)
        return []
    if not handles:
        sensors.absent["GPU"] = "NVML finds no GPU"
    for index, handle in enumerate(handles):
        for name, read in _queries(nvml, handle).items():
            _add(sensors, nvml, f"gpu{index}", name, read)
    return [
        Gpu(name=text(nvml.nvmlDeviceGetName(handle)), pci=text(nvml.nvmlDeviceGetPciInfo(handle).busId))
        for handle in handles
    ]


def memory_growth() -> Callable[[str], int | None] | None:
    """A function for how many bytes more of a GPU's memory are in use than now, by its PCI address, None for one that
    is not there; None where NVML tells nothing."""
    try:
        nvml, handles = open_nvml()
    except NvmlError:
        return None
    try:
        before = {
            text(nvml.nvmlDeviceGetPciInfo(handle).busId): (handle, nvml.nvmlDeviceGetMemoryInfo(handle).used)
            for handle in handles
        }
    except nvml.NVMLError:
        return None

    def grown(pci: str) -> int | None:
        for place, (handle, used) in before.items():
            if same_gpu(place, pci):
                return int(nvml.nvmlDeviceGetMemoryInfo(handle).used - used)
        return None

    return grown


def _queries(nvml: Any, handle: Any) -> dict[str, Callable[[], int]]:
    """By name: utilisation in ppm, clocks in kHz, power in mW, temperature in m°C, memory in bytes, energy in µJ."""
    # NVML before 535 calls the events throttle reasons.
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    return {
        "utilization_ppm": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu * 10_000,
        "sm_clock_khz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1000,
        "memory_clock_khz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1000,
        "power_mw": lambda: nvml.nvmlDeviceGetPowerUsage(handle),
        "temperature_mc": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU) * 1000,
        "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "clock_events_bits": lambda: reasons(handle),
        # Millijoules since the driver was loaded; Volta and newer.
        "energy_uj": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) * 1000,
    }


def _add(sensors: Sensors, nvml: Any, gpu: str, name: str, read: Callable[[], int]) -> None:
    def reader() -> Reading:
        try:
            return {f"{gpu}_{name}": int(read())}
        except nvml.NVMLError as error:
            raise OSError(str(error)) from None

    try:
        reader()
    except OSError as error:
        sensors.absent[f"{gpu.upper()} {name.rpartition('_')[0].replace('_', ' ')}"] = f"NVML: {error}"
        return
    sensors.add(reader)


def _place(pci: str) -> tuple[int, int, int]:
    """Domain, bus and device of "00000000:3B:00.0"."""
    domain, bus, device = pci.partition(".")[0].split(":")
    return int(domain, 16), int(bus, 16), int(device, 16)
