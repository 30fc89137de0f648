"""The GPUs in the metrics, without one: NVML's answers are made up."""

from __future__ import annotations

import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics
from tests.nvml_stand_in import FakeNvml


def shown(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in families
        if family.name.startswith("nv_")
    }


def test_they_have_tritons_names_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    metrics = Metrics(Cells())
    assert shown(metrics) == {}
    for _ in range(2):  # a model more
        metrics.show_gpus()
    gpu = {"gpu_uuid": "GPU-1234"}
    assert shown(metrics) == {
        "nv_gpu_utilization": [(gpu, 0.85)],
        "nv_gpu_memory_total_bytes": [(gpu, 80e9)],
        "nv_gpu_memory_used_bytes": [(gpu, 12e9)],
        "nv_gpu_power_usage": [(gpu, 250.0)],
        "nv_gpu_power_limit": [(gpu, 700.0)],
        "nv_energy_consumption": [(gpu, 5.0)],
    }


def test_a_sensor_that_a_gpu_lacks_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml("pynvml")
    monkeypatch.setattr(fake, "nvmlDeviceGetPowerUsage", fake.nvmlDeviceGetTemperature, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    metrics = Metrics(Cells())
    metrics.show_gpus()
    assert shown(metrics)["nv_gpu_power_usage"] == []
    assert shown(metrics)["nv_gpu_utilization"]


def test_without_nvml_a_line_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    metrics = Metrics(Cells())
    for _ in range(2):
        metrics.show_gpus()
    assert capsys.readouterr().err == "no metrics of the GPU: nvidia-ml-py is not installed\n"
    assert shown(metrics) == {}


def test_a_gpu_that_tells_no_name_does_not_keep_a_model_from_being_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeNvml("pynvml")
    monkeypatch.setattr(fake, "nvmlDeviceGetUUID", fake.nvmlDeviceGetTemperature, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    metrics = Metrics(Cells())
    metrics.show_gpus()
    assert capsys.readouterr().err == "no metrics of the GPU: NVML: Not Supported\n"
    assert shown(metrics) == {}
