"""The machine's GPUs in the metrics, by the names that Triton gives them: dashboards and perf_analyzer know those.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html#gpu-metrics
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dlops.nvml import NvmlError, open_nvml, text

Read = Callable[[Any, Any], float]
_LABELS = ("gpu_uuid",)
# By name: what it is, and how NVML tells it in the unit of the name.
_GAUGES: dict[str, tuple[str, Read]] = {
    "nv_gpu_utilization": (
        "Share of the last sampling period in which a kernel ran.",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    "nv_gpu_memory_total_bytes": ("Memory of the GPU.", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
    "nv_gpu_memory_used_bytes": (
        "Memory that is in use, by anybody.", lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used
    ),
    "nv_gpu_power_usage": ("Power, in watts.", lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
    "nv_gpu_power_limit": ("Most power, in watts.", lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000),
    # It only grows; but Triton's name lacks the ending that every counter gets in the exposition text.
    "nv_energy_consumption": (
        "Joules since the driver was loaded.", lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000
    ),
}  # fmt: skip


class GpuMetrics(Collector):
    """Read when they are asked for; all GPUs of the machine, whoever uses them. Raises NvmlError where there is none
    to be asked."""

    def __init__(self) -> None:
        self._nvml, handles = open_nvml()
        try:
            self._gpus = {text(self._nvml.nvmlDeviceGetUUID(gpu)): gpu for gpu in handles}
        except self._nvml.NVMLError as error:
            raise NvmlError(f"NVML: {error}") from None

    def collect(self) -> Iterator[Metric]:
        for name, (said, read) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, said, labels=_LABELS)
            for uuid, gpu in self._gpus.items():
                try:
                    gauge.add_metric((uuid,), float(read(self._nvml, gpu)))
                except self._nvml.NVMLError:
                    # A GPU that has no such sensor, as some have none for power: then its line is not there.
                    continue
            yield gauge
