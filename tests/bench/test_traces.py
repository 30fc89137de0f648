"""Operator tables from what profilers record: ONNX Runtime's events as short texts, torch's averages as records."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace
from typing import Any

import pytest

from dlops.bench.traces import CALL, Recording, compress_trace, profile_fields, read_onnxruntime, read_torch
from dlops.errors import MachineError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def node(name: str, op: str, ts: int, dur: int, provider: str = CPU, tid: int = 1) -> dict[str, Any]:
    arguments = {"op_name": op, "provider": provider, "node_index": "0"}
    return {
        "cat": "Node", "pid": 1, "tid": tid, "dur": dur, "ts": ts, "ph": "X", "name": f"{name}_kernel_time",
        "args": arguments,
    }  # fmt: skip


def run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "pid": 1, "tid": 1, "dur": dur, "ts": ts, "ph": "X", "name": "model_run", "args": {}}


def kernel(name: str, dur: int) -> dict[str, Any]:
    return {"cat": "Kernel", "pid": 1, "tid": 7, "dur": dur, "ts": 0, "ph": "X", "name": name, "args": {"stream": "7"}}


def totals(recording: Recording) -> dict[str, tuple[int, int]]:
    return {one.name: (one.calls, one.total_ns) for one in recording.operators}


# As ONNX Runtime 1.31 writes it, a node of the CPU and the run around it, twice.
_REAL = """[
{"cat":"Session","pid":9,"tid":9,"dur":3882,"ts":15,"ph":"X","name":"model_loading_uri","args":{}},
{"cat":"Session","pid":9,"tid":9,"dur":16985,"ts":3956,"ph":"X","name":"session_initialization","args":{}},
{"cat":"Node","pid":9,"tid":9,"dur":59,"ts":77621,"ph":"X","name":"fused_relu_nchwc_kernel_time","args":{
 "input_type_shape":[{"float":[1,1,8,8]}],"node_index":"2","op_name":"Conv","provider":"CPUExecutionProvider",
 "thread_scheduling_stats":{"main_thread":{"thread_pool_name":"session-1-intra-op","core":-1},"sub_threads":{}}}},
{"cat":"Session","pid":9,"tid":9,"dur":70,"ts":77615,"ph":"X","name":"SequentialExecutor::Execute","args":{}},
{"cat":"Session","pid":9,"tid":9,"dur":80,"ts":77610,"ph":"X","name":"model_run","args":{}},
{"cat":"Node","pid":9,"tid":9,"dur":20,"ts":77721,"ph":"X","name":"fused_relu_nchwc_kernel_time","args":{
 "op_name":"Conv","provider":"CPUExecutionProvider","node_index":"2"}},
{"cat":"Session","pid":9,"tid":9,"dur":40,"ts":77710,"ph":"X","name":"model_run","args":{}}
]"""


def test_the_warm_up_is_not_counted_and_a_fused_node_has_its_operators_type() -> None:
    recording = read_onnxruntime(json.loads(_REAL), warmup=1)
    assert (recording.calls, recording.total_ns, recording.times) == (1, 40_000, "host")
    (conv,) = recording.operators
    assert (conv.name, conv.op_type, conv.provider, conv.total_ns) == ("fused_relu_nchwc", "Conv", CPU, 20_000)
    fields = profile_fields(recording, provider=CPU)
    assert fields["operators"][0].share == fields["outside_share"] == 0.5


def test_a_loops_time_is_not_counted_again_in_its_body() -> None:
    events = [
        node("inside", "Add", 11, 3), node("inside", "Add", 15, 4), node("loop", "Loop", 10, 12),
        node("after", "Mul", 22, 5), run(9, 20),
    ]  # fmt: skip
    assert totals(read_onnxruntime(events, warmup=0)) == {
        "inside": (2, 7_000), "loop": (1, 5_000), "after": (1, 5_000),
    }  # fmt: skip


def test_nodes_faster_than_the_clock_are_listed_with_no_time() -> None:
    recording = read_onnxruntime([node("a", "Shape", 10, 0), node("b", "Reshape", 10, 0), run(10, 0)], warmup=0)
    fields = profile_fields(recording, provider=CPU)
    assert [(one.name, one.total_ns, one.share) for one in fields["operators"]] == [("a", 0, 0.0), ("b", 0, 0.0)]
    assert fields["providers"][CPU].operators == 2
    assert 0 <= fields["outside_share"] <= 1


def test_what_fell_back_to_the_cpu_under_cuda_is_named_and_copies_are_counted() -> None:
    events = [
        node("Memcpy_token_1", "MemcpyFromHost", 10, 2, CUDA), node("conv", "Conv", 12, 10, CUDA),
        node("shape", "Shape", 22, 1), node("topk", "TopK", 23, 3), node("Memcpy", "MemcpyToHost", 26, 4, CUDA),
        run(10, 20),
    ]  # fmt: skip
    fields = profile_fields(read_onnxruntime(events, warmup=0), provider=CUDA)
    assert fields["times"] == "host"
    assert fields["copies"] == 2
    assert fields["providers"][CPU].names == ("topk", "shape")
    assert fields["providers"][CUDA].names == ()
    assert (fields["providers"][CUDA].operators, fields["providers"][CPU].operators) == (3, 2)
    assert fields["providers"][CPU].share == pytest.approx(4 / 20)


def test_kernels_give_a_node_its_time_on_the_gpu() -> None:
    events = [
        node("conv", "Conv", 10, 900, CUDA), kernel("cudnn_a", 30), kernel("cudnn_b", 3),
        node("relu", "Relu", 910, 20, CUDA), kernel("relu", 7), run(10, 1000),
    ]  # fmt: skip
    recording = read_onnxruntime(events, warmup=0)
    assert recording.times == "device"
    assert totals(recording) == {"conv": (1, 33_000), "relu": (1, 7_000)}


def test_a_profile_without_a_call_is_refused() -> None:
    with pytest.raises(MachineError, match="names none of the calls"):
        read_onnxruntime([node("a", "Add", 1, 1)], warmup=0)


def average(key: str, count: int, *, device: str = "CPU", whole: float = 0, own: float = 0, gpu: float = 0, mark=False):
    return SimpleNamespace(
        key=key, count=count, device_type=SimpleNamespace(name=device), is_user_annotation=mark, cpu_time_total=whole,
        self_cpu_time_total=own, self_device_time_total=gpu,
    )  # fmt: skip


def test_on_a_gpu_torchs_rows_are_kernels_and_annotations_are_none() -> None:
    kernel_name = "void at::native::vectorized_elementwise_kernel<4, at::native::Relu>(int, float*)"
    averages = [
        average(CALL, 2, whole=100.0, own=40.0, mark=True), average(CALL, 2, device="CUDA", gpu=90.0, mark=True),
        average("aten::relu", 2, whole=20.0, own=20.0, gpu=30.0), average(kernel_name, 2, device="CUDA", gpu=30.0),
        average("Memcpy HtoD (Pageable -> Device)", 2, device="CUDA", gpu=10.0),
    ]  # fmt: skip
    trace = {
        "traceEvents": [
            {"name": CALL, "cat": kind, "ph": "X", "ts": ts, "dur": 50}
            for kind, ts in (("user_annotation", 0), ("gpu_user_annotation", 3), ("user_annotation", 60))
        ]
    }
    recording = read_torch(averages, trace, device="cuda:0")
    assert (recording.calls, recording.total_ns, recording.ends_us) == (2, 100_000, (50, 110))
    fields = profile_fields(recording, provider="cuda")
    assert fields["op_types"] == {"at::native::vectorized_elementwise_kernel": 0.3, "Memcpy HtoD": 0.1}
    assert fields["copies"] == 1
    assert fields["outside_share"] == pytest.approx(0.6)
    assert fields["providers"]["cuda"].operators == 2


def test_streams_side_by_side_do_not_make_shares_above_one() -> None:
    averages = [average(CALL, 1, whole=10.0), average("a", 1, device="CUDA", gpu=9.0),
                average("b", 1, device="CUDA", gpu=6.0)]  # fmt: skip
    fields = profile_fields(read_torch(averages, {"traceEvents": []}, device="cuda:0"), provider="cuda")
    assert fields["total_ns"] == 15_000
    assert fields["outside_share"] == 0.0
    assert sum(one.share for one in fields["operators"]) == pytest.approx(1.0)


def test_the_ten_costliest_are_kept_and_the_rest_is_summed() -> None:
    events = [*(node(f"n{index:02d}", "Add", 100 * index, index + 1) for index in range(13)), run(0, 2000)]
    fields = profile_fields(read_onnxruntime(events, warmup=0), provider=CPU)
    assert [one.name for one in fields["operators"]] == [f"n{index:02d}" for index in range(12, 2, -1)]
    assert fields["others"] == 3
    assert fields["others_share"] == pytest.approx(6 / 2000)
    assert fields["op_types"] == {"Add": pytest.approx(91 / 2000)}


def test_a_long_trace_is_cut_after_a_whole_call() -> None:
    events = [event for call in range(50) for event in (node("a", "Add", 100 * call, 5), run(100 * call, 10))]
    recording = read_onnxruntime(events, warmup=10)
    content, kept = compress_trace(recording, limit=41)
    cut = json.loads(gzip.decompress(content))
    assert kept == 10
    assert len(cut) == 40  # the warm-up's twenty events, and those of ten calls
    assert compress_trace(recording, limit=41)[0] == content
    assert compress_trace(recording, limit=1)[1] == 1
    assert compress_trace(recording)[1] == 40


def test_a_cut_torch_trace_keeps_what_has_no_time() -> None:
    marks = [{"name": CALL, "cat": "user_annotation", "ph": "X", "ts": ts, "dur": 5} for ts in (0, 10)]
    trace = {"schemaVersion": 1, "traceEvents": [{"name": "process_name", "ph": "M"}, *marks]}
    recording = read_torch([average(CALL, 2, whole=10.0)], trace, device="cpu")
    content, kept = compress_trace(recording, limit=1)
    document = json.loads(gzip.decompress(content))
    assert (kept, document["schemaVersion"], document["traceEvents"]) == (1, 1, trace["traceEvents"][:2])
