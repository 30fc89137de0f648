"""NVIDIA GPUs through NVML (package nvidia-ml-py), as sensors; written against NVML's documentation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from dlops.bench.sensors import Reading, Sensors

# Clock event reasons that slow a GPU under load; idle and set clocks are no throttling.
THROTTLING = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}


def find_gpus(sensors: Sensors) -> list[str]:
    """Add every GPU's sensors; the GPUs' names in order. What is not there is in `sensors.absent` with the reason."""
    try:
        import pynvml as nvml
    except ModuleNotFoundError:
        sensors.absent["GPU"] = "nvidia-ml-py is not installed"
        return []
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        sensors.absent["GPU"] = f"NVML: {error}"
        return []
    if not handles:
        sensors.absent["GPU"] = "NVML finds no GPU"
    for index, handle in enumerate(handles):
        for name, read in _queries(nvml, handle).items():
            _add(sensors, nvml, f"gpu{index}", name, read)
    return [_text(nvml.nvmlDeviceGetName(handle)) for handle in handles]


def memory_growth(visible: str | None = None) -> Callable[[], int] | None:
    """A function for how many bytes more of the first GPU's memory are in use than now; None where NVML tells nothing.

    visible: CUDA_VISIBLE_DEVICES, which says what is first; by default this process's.
    """
    try:
        import pynvml as nvml
    except ModuleNotFoundError:
        return None
    first = (os.environ.get("CUDA_VISIBLE_DEVICES", "") if visible is None else visible).split(",")[0].strip() or "0"
    try:
        nvml.nvmlInit()
        by_index = nvml.nvmlDeviceGetHandleByIndex
        handle = by_index(int(first)) if first.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(first)
        before = nvml.nvmlDeviceGetMemoryInfo(handle).used
    except nvml.NVMLError:
        return None
    return lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used - before)


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


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
