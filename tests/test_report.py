"""report.json: its schema against a golden file, and what is refused."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from dlops.directory import DirectoryWriter
from dlops.environment import Environment
from dlops.errors import CorruptError, UsageError
from dlops.report import (
    Calibration,
    CpuPeak,
    GpuPeak,
    Interval,
    Latency,
    Load,
    Machine,
    Measurement,
    Peaks,
    Profile,
    ProfiledOperator,
    ProviderUse,
    Report,
    SendingCost,
    Telemetry,
    TimingCost,
    Verdict,
    read_report,
)

GOLDEN = Path(__file__).parent / "golden" / "report.json"


def interval(value: float) -> Interval:
    return Interval(value=value, low=value * 0.9, high=value * 1.1)


CALIBRATION = Calibration(
    created=datetime(2026, 11, 20, tzinfo=UTC),
    machine=Machine(cpu="Example", cores=2, system="Linux", python="3.11.7", dlops_version="0.1.0"),
    quick=False,
    timing=TimingCost(
        added_ns=interval(100.0), share_of_1_ms=interval(0.0005), clock_step_ns=50, clock_read_ns=75.5
    ),
    network=SendingCost(
        floor_ns=interval(1e5), closed_concurrency=8, closed_rate=interval(1e4), capacity=4000.0, missed=4400.0,
        lag_rate=500.0, lag_p50_ns=interval(6e4), lag_p99_ns=None, oversleep_p50_ns=interval(7e4),
        oversleep_p99_ns=interval(1.5e5),
    ),
    peaks=Peaks(
        cpu=(
            CpuPeak(
                threads=1, matrix=1024, flops=5e10, flops_median=4.9e10, copy_bytes=134217728, bytes_per_s=1e10,
                bytes_per_s_median=9e9,
            ),
        ),
        gpus=(GpuPeak(name="Example GPU", flops={"fp32": 5e13}, bytes_per_s=2e12),),
        absent={"2 threads": "a reason"},
    ),
    reasons=("a reason",),
)  # fmt: skip


def _profile() -> Profile:
    conv = ProfiledOperator(
        name="conv", op_type="QLinearConv", provider="CPUExecutionProvider", calls=100, total_ns=6_000_000, share=0.6
    )
    return Profile(
        target="digits/onnx-int8", artifact="onnx-int8", runtime="onnxruntime", provider="CPUExecutionProvider",
        device="cpu", threads=2, batch=1, calls=100, total_ns=10_000_000, operators=(conv,), others=3, others_share=0.1,
        outside_share=0.3, op_types={"QLinearConv": 0.6, "QGemm": 0.1},
        providers={"CPUExecutionProvider": ProviderUse(operators=4, share=0.7)}, trace="trace00", traced_calls=100,
    )  # fmt: skip


TELEMETRY = Telemetry(
    key="telemetry00", interval_s=0.25, samples=3, cost=0.004, cpus=2, gpus=("Example GPU",),
    series=("cpu_ours_ppm", "gpu0_power_mw"), spans={"row00": (100, 400)}, absent={"CPU energy": "a reason"},
)  # fmt: skip
_POINTS = {f"telemetry00.{name}": np.array([1, 2], np.int64) for name in ("times_ns", *TELEMETRY.series)}


def write(directory: Path, samples: dict[str, np.ndarray] | None = None) -> Report:
    arrays = samples if samples is not None else {"row00": np.array([1_000_000, 1_100_000], np.int64)} | _POINTS
    row = Measurement(
        target="digits/onnx-int8",
        artifact="onnx-int8",
        runtime="onnxruntime",
        provider="CPUExecutionProvider",
        device="cpu",
        precision="int8",
        threads=2,
        boundary="host",
        load=Load(scenario="single_stream", batch=1, concurrency=1),
        samples="row00",
        latency=Latency(
            samples=2, effective_samples=2, p50_ns=interval(1e6), p90_ns=None, p99_ns=None, mean_ns=1.05e6, min_ns=1e6,
            max_ns=1.1e6,
        ),
        throughput=Interval(value=950.0, low=None, high=None),
        speedup=interval(3.0),
        errors={"HTTP 503": 2},
        warmup_calls=10,
        model_bytes=52_000,
        peak_memory_bytes=81_000_000,
        nodes={"CPUExecutionProvider": {"Conv": 3, "Gemm": 1}},
        moved_bytes=310_000,
        bandwidth_share=0.08,
        accuracy=0.98,
        accuracy_samples=360,
        drop_points=0.28,
        drop_low=-0.3,
        drop_high=0.9,
        flips=1,
        other_load=0.02,
        energy_j_per_item=0.0015,
        energy_sources=("package-0",),
        macs=1664,
        peak_share=0.03,
        verdict=Verdict(steady=False, reasons=("p99 is not certified",)),
    )  # fmt: skip
    with DirectoryWriter(directory) as writer:
        report = Report(
            dlops_version="0.1.0",
            title="digits",
            created=datetime(2026, 11, 21, tzinfo=UTC),
            command=("dlops", "bench"),
            environment=Environment(
                system="Linux", machine="x86_64", cpu="Example", instruction_sets=("avx2",), cores=2,
                memory_bytes=1_000_000, python="3.11.7", gpus=(), packages={"numpy": "2.0"},
            ),
            measurements=(row,),
            baseline="eager",
            chosen="digits/onnx-int8",
            chosen_because="lowest median latency",
            notes=("a note",),
            calibration=CALIBRATION,
            profiles=(_profile(),),
            telemetry=(TELEMETRY,),
            files={
                "samples": writer.add("samples.safetensors", save(arrays)),
                "trace00": writer.add("trace_onnx_int8_batch1.json.gz", b"a trace"),
            },
        )  # fmt: skip
        return writer.commit(report)


def test_the_schema_is_the_golden_files(tmp_path) -> None:
    write(tmp_path / "r")
    written = (tmp_path / "r" / "report.json").read_text()
    assert written == GOLDEN.read_text(), "a changed schema needs a new number and a reader for the old one"


def test_what_is_written_is_read_back(tmp_path) -> None:
    report = write(tmp_path / "r")
    assert read_report(tmp_path / "r" / "report.json") == report
    assert report.raw_samples()["row00"].tolist() == [1_000_000, 1_100_000]
    assert report.measurements[0].error_count == 2


def test_a_report_from_before_calibrations_is_read(tmp_path) -> None:
    report = write(tmp_path / "r")
    path = tmp_path / "r" / "report.json"
    document = json.loads(path.read_text())
    del document["calibration"], document["sha256"]
    content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps(document | {"sha256": hashlib.sha256(content).hexdigest()}))
    read = read_report(path)
    assert read.calibration is None
    assert read.measurements == report.measurements


def test_a_report_whose_telemetry_lacks_a_series_is_refused(tmp_path) -> None:
    arrays = {"row00": np.array([1, 2], np.int64)} | {name: _POINTS[name] for name in _POINTS if "gpu0" not in name}
    with pytest.raises(CorruptError, match=r"no samples for telemetry00\.gpu0_power_mw"):
        write(tmp_path / "r", arrays).raw_samples()


def test_a_report_without_profiles_is_read(tmp_path) -> None:
    report = write(tmp_path / "r")
    document = json.loads(report.to_json())
    del document["profiles"]
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    document["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "r" / "report.json").write_text(json.dumps(document))
    assert read_report(tmp_path / "r").profiles == ()


def test_a_newer_schema_is_refused_with_the_version_that_reads_it(tmp_path) -> None:
    document = json.loads(GOLDEN.read_text()) | {"schema": 99, "dlops_version": "9.1"}
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(CorruptError, match=r"schema 99.*dlops 9\.1"):
        read_report(tmp_path)


def test_altered_samples_are_refused(tmp_path) -> None:
    report = write(tmp_path / "r")
    path = report.path("samples")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptError, match="SHA-256"):
        read_report(tmp_path / "r")


def test_a_row_without_samples_is_refused(tmp_path) -> None:
    report = write(tmp_path / "r", {"other": np.zeros(2, np.int64)})
    with pytest.raises(CorruptError, match="no samples for row00"):
        report.raw_samples()


def test_a_folder_without_a_report_is_a_users_mistake(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no report\.json there"):
        read_report(tmp_path)
