"""NVML where there is no GPU."""

from __future__ import annotations

import types


class FakeNvml(types.ModuleType):
    """The names of nvidia-ml-py that are used, with one GPU whose memory temperature sensor is not supported."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def __getattr__(self, name: str) -> object:
        answers = {
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetUUID": b"GPU-1234",
            "nvmlDeviceGetName": "NVIDIA Example",
            "nvmlDeviceGetPciInfo": types.SimpleNamespace(busId=b"00000000:3B:00.0"),
            "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=85, memory=10),
            "nvmlDeviceGetClockInfo": 1700,
            "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(used=12_000_000_000, total=80_000_000_000),
            "nvmlDeviceGetCurrentClocksEventReasons": 0x24,
            "nvmlDeviceGetTotalEnergyConsumption": 5000,
        }
        if name == "nvmlDeviceGetTemperature":
            return self._not_supported
        if name not in answers:
            raise AttributeError(name)
        return lambda *_: answers[name]

    def _not_supported(self, *_: object) -> None:
        raise self.NVMLError("Not Supported")
