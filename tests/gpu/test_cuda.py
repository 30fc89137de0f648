"""The stages on CUDA: what was asked for is what runs, and it computes what the CPU computes."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dlops
from dlops.bench.nvml import find_gpus, same_gpu
from dlops.bench.peaks_gpu import gpu_peaks
from dlops.bench.profile import add_profiles
from dlops.bench.sensors import Sensors
from dlops.checkpoint import Checkpoint
from dlops.cudart import pci_address
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.train.launch import configure, train_recipe

CUDA = SessionOptions(device="cuda")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("gpu")
    config = configure("cnn", overrides=["epochs=12", "accelerator=cuda"])
    return train_recipe("cnn", config, run_dir=folder / "run")


def test_training_on_cuda_learns_the_digits(trained: Checkpoint) -> None:
    assert trained.metrics["accuracy"] > 0.95  # type: ignore[operator]


def test_training_in_bf16_on_cuda_learns_the_digits(tmp_path: Path) -> None:
    config = configure("cnn", overrides=["epochs=12", "accelerator=cuda", "precision=bf16"])
    assert train_recipe("cnn", config, run_dir=tmp_path).metrics["accuracy"] > 0.95  # type: ignore[operator]


@pytest.mark.parametrize("slug", ["onnx-fp32", "onnx-fp16", "onnx-int8", "torchscript-fp32"])
def test_an_artifact_runs_on_cuda_and_agrees_with_its_samples(slug: str, trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=[slug], out=tmp_path, device="cuda")
    session = open_session(artifact, CUDA)
    assert session.placement.device == "cuda:0"
    self_test(artifact, session)
    session.close()


def test_cpu_and_cuda_decide_alike(trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=["onnx-fp32"], out=tmp_path)
    feed = artifact.samples().inputs
    sessions = [open_session(artifact, SessionOptions(device=device)) for device in ("cpu", "cuda")]
    assert [session.placement.device for session in sessions] == ["cpu", "cuda:0"]
    answers = [session.run(feed) for session in sessions]
    np.testing.assert_array_equal(*(answer["logits"].argmax(axis=1) for answer in answers))


def test_bench_says_that_cuda_ran(trained: Checkpoint, tmp_path: Path) -> None:
    artifacts = dlops.export_variants(trained, variants=["onnx-fp32"], out=tmp_path)
    measured = dlops.measure(artifacts, checkpoint=trained, duration_s=0.5, device="cuda")
    assert {row.device for row in measured.measurements} == {"cuda:0"}


@pytest.mark.parametrize("slug", ["onnx-fp32", "torchscript-fp32"])
def test_a_profile_on_cuda_names_the_gpu_and_what_did_not_run_there(
    slug: str, trained: Checkpoint, tmp_path: Path
) -> None:
    artifacts = dlops.export_variants(trained, variants=[slug], out=tmp_path, device="cuda")
    measured = dlops.measure(artifacts, duration_s=0.5, device="cuda")
    (profile,) = add_profiles(measured, artifacts, checkpoint=None, options=CUDA).report.profiles
    onnx = slug.startswith("onnx")
    assert profile.provider == ("CUDAExecutionProvider" if onnx else "cuda")
    assert profile.provider in profile.providers
    assert profile.copies > 0
    assert onnx or profile.times == "device"
    elsewhere = {name for provider, use in profile.providers.items() for name in use.names}
    assert len(elsewhere) == sum(use.operators for name, use in profile.providers.items() if name != profile.provider)
    shares = sum(one.share for one in profile.operators) + profile.others_share + profile.outside_share
    assert shares == pytest.approx(1.0)


def test_doctor_finds_that_cuda_works() -> None:
    from dlops.doctor import examine

    status = {probe.name: probe.status for probe in examine().probes}
    assert status["torch cuda"] == "ok"
    assert status["onnxruntime cuda"] == "ok"


def test_nvml_reads_every_sensor_and_energy_grows_as_power_says() -> None:
    sensors = Sensors()
    gpus = find_gpus(sensors)
    assert len(gpus) >= torch.cuda.device_count()
    # CUDA's first is one of NVML's, by its place on the bus.
    assert [same_gpu(gpu.pci, pci_address(0)) for gpu in gpus].count(True) == 1
    assert sensors.absent == {}
    work = torch.randn(4096, 4096, device="cuda")
    before, began = sensors.read(), time.perf_counter()
    powers = []
    while time.perf_counter() - began < 3.0:
        for _ in range(20):
            work = torch.mm(work, work).clamp(-1, 1)
        torch.cuda.synchronize()
        powers.append(sensors.read()["gpu0_power_mw"] / 1e3)
    after, seconds = sensors.read(), time.perf_counter() - began
    joules = (after["gpu0_energy_uj"] - before["gpu0_energy_uj"]) / 1e6
    # Power is an average over some hundred milliseconds, which lags behind.
    assert joules / seconds == pytest.approx(sum(powers) / len(powers), rel=0.5)
    assert after["gpu0_memory_bytes"] >= work.nbytes


def test_power_clocks_and_temperature_are_those_that_nvidia_smi_tells() -> None:
    sensors = Sensors()
    (place,) = [number for number, gpu in enumerate(find_gpus(sensors)) if same_gpu(gpu.pci, pci_address(0))]
    asked = "power.draw,clocks.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--id={pci_address(0)}", f"--query-gpu={asked}", "--format=csv,noheader,nounits"]
    work, told, read = torch.randn(4096, 4096, device="cuda"), [], []
    for number in range(6):
        # Under load, where the clocks have settled.
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            work = torch.mm(work, work).clamp(-1, 1)
            torch.cuda.synchronize()
        if number:
            told.append([float(value) for value in subprocess.check_output(command, text=True).split(",")])
            now = sensors.read()
            names = ("power_mw", "sm_clock_khz", "memory_clock_khz", "temperature_mc")
            read.append([now[f"gpu{place}_{name}"] / 1000 for name in names])
    vendors, ours = np.median(told, axis=0), np.median(read, axis=0)
    # Nothing runs while nvidia-smi starts, so power has begun to fall for both.
    np.testing.assert_allclose(ours, vendors, rtol=[0.25, 0.1, 0.05, 0.1])


def test_a_run_on_cuda_keeps_what_the_gpu_did(trained: Checkpoint, tmp_path: Path) -> None:
    [artifact] = dlops.export_variants(trained, variants=["onnx-fp32"], out=tmp_path, device="cuda")
    measured = dlops.measure([artifact], duration_s=3.0, device="cuda", batch=(256,))
    (telemetry,) = measured.report.telemetry
    assert "gpu0_power_mw" in telemetry.series
    (row,) = measured.measurements
    assert "gpu0" in row.energy_sources
    assert row.energy_j_per_item is not None
    assert row.energy_j_per_item > 0


def test_tf32_is_no_slower_than_fp32_and_fp16_faster() -> None:
    for peak in gpu_peaks(matrix=4096, copy_bytes=1 << 28):
        assert peak.flops["fp16"] > peak.flops["fp32"] > 1e12
        assert peak.flops["tf32"] > 0.9 * peak.flops["fp32"]
        assert peak.bytes_per_s > 1e10
