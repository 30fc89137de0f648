"""The machine's measured peaks, the work of an ONNX graph, and the share of the peak that a row reaches."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlops.bench.calibrate import _against_peaks
from dlops.bench.calibrated import attach
from dlops.bench.calibration_text import facts
from dlops.bench.macs import UncountedError, count_onnx_macs
from dlops.bench.peaks import copy_size, measure_peaks, thread_counts
from dlops.bench.run import measure
from dlops.report import CpuPeak, GpuPeak, Load, Peaks


def cpu(threads: int, flops: float = 1e9, **changes: float) -> CpuPeak:
    values = {"flops_median": flops, "bytes_per_s": 1e10, "bytes_per_s_median": 1e10} | changes
    return CpuPeak(threads=threads, matrix=1024, flops=flops, copy_bytes=1 << 27, **values)


def test_threads_double_up_to_the_cores() -> None:
    assert [thread_counts(cores) for cores in (1, 2, 6, 64)] == [
        [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16, 32, 64]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cache", "memory", "expected"),
    [(32 << 20, 64 << 30, 128 << 20), (1 << 20, 64 << 30, 64 << 20), (256 << 20, 2 << 30, 256 << 20)],
    ids=["four caches", "a small cache", "a small memory"],
)
def test_a_copy_goes_beyond_the_caches_and_fits_the_memory(cache, memory, expected) -> None:
    assert copy_size(cache, memory) == expected


def test_the_peaks_of_this_machine_are_measured_in_processes_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr("dlops.bench.peaks.thread_counts", lambda cores: [1])
    peaks = measure_peaks(part_s=0.1)
    (one,) = peaks.cpu
    assert one.threads == 1
    # A processor that computes does more than a Python loop does, and less than a rack.
    assert 1e8 < one.flops_median <= one.flops < 1e13
    assert 1e7 < one.bytes_per_s_median <= one.bytes_per_s < 1e13
    assert "GPU" in peaks.absent or peaks.gpus


def test_a_peak_that_cannot_be_measured_is_absent_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr("dlops.bench.peaks.thread_counts", lambda cores: ["no"])
    peaks = measure_peaks(part_s=0.1)
    assert peaks.cpu == ()
    assert "ValueError" in peaks.absent["no threads"]


def model(tmp_path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[object]) -> Path:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return path


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("nodes", "weights", "shape", "expected"),
    [
        pytest.param(
            [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1])],
            {"w": zeros(16, 3, 3, 3)}, ["n", 3, 8, 8], 4 * 16 * 4 * 4 * 3 * 3 * 3, id="a convolution",
        ),
        pytest.param(
            [helper.make_node("Conv", ["x", "w"], ["y"], group=8)],
            {"w": zeros(8, 1, 3, 3)}, ["n", 8, 5, 5], 4 * 8 * 3 * 3 * 9, id="a depthwise convolution",
        ),
        pytest.param(
            [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])],
            {"w": zeros(3, 5, 2, 2)}, ["n", 3, 4, 4], 4 * 3 * 4 * 4 * 5 * 2 * 2, id="a transposed convolution",
        ),
        pytest.param(
            [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
            {"w": zeros(10, 16)}, ["n", 16], 4 * 10 * 16, id="a layer of an MLP",
        ),
        pytest.param(
            [
                helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
                helper.make_node("MatMul", ["x", "t"], ["y"]),
            ],
            {}, ["n", 6, 7], 4 * 6 * 6 * 7, id="a product of two activations",
        ),
        pytest.param(
            [
                helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Relu", ["f"], ["r"]),
                helper.make_node("MatMul", ["r", "w"], ["y"]),
            ],
            {"w": zeros(12, 5)}, ["n", 3, 2, 2], 4 * 12 * 5, id="a reshape before a product",
        ),
    ],
)  # fmt: skip
def test_macs_follow_from_the_shapes(tmp_path, nodes, weights, shape, expected) -> None:
    assert count_onnx_macs(model(tmp_path, nodes, weights, shape), batch=4) == expected


def test_macs_that_are_not_all_known_are_not_given(tmp_path) -> None:
    lstm = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4)
    path = model(tmp_path, [lstm], {"w": zeros(1, 16, 3), "r": zeros(1, 16, 4)}, ["n", 2, 3])
    with pytest.raises(UncountedError, match="LSTM"):
        count_onnx_macs(path, batch=1)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    open_shape = model(tmp_path, [product], {"w": zeros(3, 4)}, ["n", "m", 3])
    with pytest.raises(UncountedError, match="stays open"):
        count_onnx_macs(open_shape, batch=1)


def test_without_onnx_macs_are_not_known(tmp_path, monkeypatch) -> None:
    whole = builtins.__import__

    def refuse(name: str, *args: object) -> object:
        if name == "onnx":
            raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
        return whole(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UncountedError, match="not installed"):
        count_onnx_macs(tmp_path / "model.onnx", batch=1)


def test_a_row_says_its_share_of_the_peak(make_artifact, calibration) -> None:
    measured = measure([make_artifact()], batch=(8,), duration_s=0.1, threads=1)
    (before,) = measured.measurements
    assert before.macs == 8 * (16 * 8 + 8 * 10)
    peaks = Peaks(cpu=(cpu(1, 1e12), cpu(2, 2e12)))
    (row,) = attach(measured, calibration.model_copy(update={"peaks": peaks})).measurements
    assert row.peak_share == pytest.approx(2 * 208 * before.throughput.value / 1e12)
    (said,) = [reason for reason in row.verdict.remarks if reason.startswith("achieves")]
    assert said.endswith("% of the measured peak FLOP/s (calibration)")
    assert row.verdict.steady == before.verdict.steady
    weights, inputs, outputs = before.model_bytes, 8 * 16 * 4, 8 * 10 * 4
    assert row.moved_bytes == weights + inputs + outputs
    calls = before.throughput.value / 8
    assert row.bandwidth_share == pytest.approx(row.moved_bytes * calls / peaks.cpu[0].bytes_per_s)
    assert any(reason.startswith("weights, inputs and outputs") for reason in row.verdict.remarks)


def of_peaks(example, calibration, peaks: Peaks, **changes: object):
    measured = example()
    row = measured.measurements[1].model_copy(update={"macs": 1_000_000} | changes)
    report = measured.report.model_copy(update={"measurements": (row,), "notes": ()})
    judged = attach(type(measured)(report=report, samples={}), calibration.model_copy(update={"peaks": peaks}))
    return judged.measurements[0], judged.report.notes


def at_once(calls: int) -> Load:
    return Load(scenario="multi_stream", batch=1, concurrency=calls)


def test_calls_that_run_at_once_are_held_against_the_peak_with_all_their_threads(example, calibration) -> None:
    rate = example().measurements[1].throughput.value
    peaks = Peaks(cpu=(cpu(1, 1e10), cpu(2, 1e11)))
    row, _ = of_peaks(example, calibration, peaks, threads=1, load=at_once(2))
    assert row.peak_share == pytest.approx(2e6 * rate / 1e11)


def test_a_share_is_of_the_peak_with_as_many_threads_or_of_the_gpu(example, calibration) -> None:
    rate = example().measurements[1].throughput.value
    peaks = Peaks(
        cpu=(cpu(2, 1e11),),
        gpus=(GpuPeak(name="a", flops={"fp32": 1e12, "tf32": 1e13, "fp16": 1e14}, bytes_per_s=1e12),),
    )
    cases = (({}, 1e11), ({"device": "cuda:0"}, 1e13), ({"device": "cuda:0", "precision": "fp16"}, 1e14))
    for changes, peak in cases:
        row, notes = of_peaks(example, calibration, peaks, **changes)
        assert row.peak_share == pytest.approx(2e6 * rate / peak)
        assert notes == ()
    for changes, why in (
        ({"precision": "int8"}, "the peak is of fp32, not of int8"),
        ({"threads": 3}, "no peak with 3 threads was measured"),
        ({"device": "cuda:1"}, "no peak of fp32 on cuda:1 was measured"),
        # Two calls at once of two threads each.
        ({"load": at_once(2)}, "no peak with 4 threads was measured"),
        ({"macs": None, "uncounted": "its LSTM is not counted"}, "its MACs are not known: its LSTM is not counted"),
    ):
        row, notes = of_peaks(example, calibration, peaks, **changes)
        assert row.peak_share is None
        assert notes == (f"no share of the peak FLOP/s for onnx-fp32: {why}",)


def test_a_share_of_the_bandwidth_needs_no_macs_and_may_come_from_caches(example, calibration) -> None:
    rate = example().measurements[1].throughput.value
    gpu = GpuPeak(name="a", flops={"fp32": 1e12, "tf32": 1e13, "fp16": 1e14}, bytes_per_s=2e12)
    peaks = Peaks(cpu=(cpu(2, 1e11),), gpus=(gpu,))
    for changes, peak in (({"precision": "int8"}, peaks.cpu[0].bytes_per_s), ({"device": "cuda:0"}, 2e12)):
        row, _ = of_peaks(example, calibration, peaks, macs=None, moved_bytes=1_000, **changes)
        assert row.bandwidth_share == pytest.approx(1000 * rate / peak)
    row, _ = of_peaks(example, calibration, peaks, moved_bytes=10**15)
    assert row.bandwidth_share > 1
    assert row.verdict.remarks[-1].endswith("caches keep some of it")
    for changes in ({"moved_bytes": None}, {"moved_bytes": 1, "threads": 3}, {"moved_bytes": 1, "device": "cuda:1"}):
        row, _ = of_peaks(example, calibration, peaks, **changes)
        assert row.bandwidth_share is None


def test_more_than_the_peak_asks_for_a_new_calibration(example, calibration) -> None:
    row, _ = of_peaks(example, calibration, Peaks(cpu=(cpu(2, 1e8),)))
    assert row.verdict.remarks[-1].endswith("dlops bench --calibrate anew")


def test_peaks_are_told_in_words_and_a_doubtful_one_is_said(calibration) -> None:
    peaks = Peaks(
        cpu=(cpu(1, 1.5e10),),
        gpus=(GpuPeak(name="Example GPU", flops={"fp32": 5e13, "fp16": 7.5e14}, bytes_per_s=2.5e12),),
        absent={"2 threads": "a reason"},
    )
    told = dict(facts(calibration.model_copy(update={"peaks": peaks})))
    assert told["Peak of 1 thread"] == "15.0 GFLOP/s in a float32 matrix product, 10.0 GB/s in a copy"
    assert told["Peak of GPU 0"] == "50.0 TFLOP/s (fp32), 750 TFLOP/s (fp16), 2.50 TB/s in a copy (Example GPU)"
    assert told["No peak: 2 threads"] == "a reason"
    assert _against_peaks(peaks) == _against_peaks(None) == []
    (doubt,) = _against_peaks(Peaks(cpu=(cpu(1, 1e10, flops_median=7e9),)))
    assert "a peak may be higher" in doubt
