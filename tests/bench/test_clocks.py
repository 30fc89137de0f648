"""The three clocks of a call on CUDA, with stand-ins for the GPU: what is kept, and what follows from it."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dlops
from dlops import cudart
from dlops.bench.analysis import analyse_turns, launch_bound
from dlops.bench.attended import Attended
from dlops.bench.boundcall import bound_arm
from dlops.bench.inprocess import Conditions, Started, Subject
from dlops.bench.launches import Launches
from dlops.bench.pilot import length
from dlops.bench.rows import Rows
from dlops.bench.run import Measured, measure, merge, save_report
from dlops.bench.session_rows import keep_turns
from dlops.bench.table import table_text, to_csv
from dlops.bench.telemetry import Recorder
from dlops.bench.turns import read_turn, turn_message
from dlops.bench.worker import gpu_of
from dlops.cli import run
from dlops.errors import CorruptError, MachineError, UsageError
from dlops.report import CLOCKS, COPY_IN, COPY_OUT, DEVICE, ENQUEUE, Boundary, read_report
from dlops.runtimes import Placement, SessionOptions, open_session
from dlops.runtimes.onnxruntime import cuda_works
from dlops.timing import Local, interleave

ON_CUDA = Placement(runtime="none", device="cuda:0", provider="CUDAExecutionProvider", precision="fp32", threads=1)
WAIT_S = 0.003


class Gpu:
    """A session and its bound call, whose every step takes 3 ms of the host's time."""

    placement = ON_CUDA

    def __init__(self, *, stream: int | None = 7, enqueues: bool = True) -> None:
        self.stream, self.enqueues = stream, enqueues
        self.done: list[str] = []

    def bind(self, feed):
        return self

    def _step(self, name: str) -> None:
        self.done.append(name)
        time.sleep(WAIT_S)

    def copy_in(self, feed) -> None:
        self._step("copy_in")

    def run(self) -> None:
        self._step("run")

    def synchronize(self) -> None:
        self._step("synchronize")

    def copy_out(self):
        self._step("copy_out")


class Events:
    """A device clock that counts: its n-th call took n µs."""

    def __init__(self, gpu: Gpu, stream: int) -> None:
        assert stream == gpu.stream
        self.gpu, self.calls = gpu, 0

    def start(self) -> None:
        self.gpu.done.append("start")

    def stop(self) -> None:
        self.gpu.done.append("stop")
        self.calls += 1

    def elapsed_ns(self) -> int:
        return self.calls * 1000


def arm(gpu: Gpu, boundary: Boundary) -> Local:
    return bound_arm("it", gpu, dict, boundary=boundary, device_clock=lambda stream: Events(gpu, stream))


@pytest.mark.parametrize("boundary", ["device", "host"])
def test_each_part_of_a_call_is_timed_once_and_lies_within_it(boundary) -> None:
    gpu = Gpu()
    turn = arm(gpu, boundary).take_turn(0.05)
    assert gpu.done[:6] == (
        ["copy_in", "start", "run", "stop", "synchronize", "copy_out"]
        if boundary == "host"
        else ["copy_in", "start", "run", "stop", "synchronize", "copy_in"]
    )
    names = {DEVICE, ENQUEUE} | ({COPY_IN, COPY_OUT} if boundary == "host" else set())
    assert turn.parts_ns.keys() == names
    assert np.all(np.diff(turn.parts_ns[DEVICE]) == 1000)
    on_host = [turn.parts_ns[name] for name in names - {DEVICE}]
    least = round(WAIT_S * 1e9)
    assert all(np.all(part >= least) for part in on_host)
    # The wait for the device is in none of the parts.
    assert np.all(turn.latencies_ns >= sum(on_host) + least)


def test_a_runtime_that_waits_in_its_run_has_no_time_of_enqueueing() -> None:
    assert arm(Gpu(enqueues=False), "device").take_turn(0.02).parts_ns.keys() == {DEVICE}


@pytest.mark.parametrize(("stream", "boundary"), [(None, "host"), (7, "preprocessing")])
def test_without_a_stream_or_with_preprocessing_copies_are_in_the_call_and_nothing_is_apart(stream, boundary) -> None:
    gpu = Gpu(stream=stream)
    turn = arm(gpu, boundary).take_turn(0.02)
    assert gpu.done[:4] == ["copy_in", "run", "synchronize", "copy_out"]
    assert not turn.parts_ns
    assert np.all(turn.latencies_ns >= 4 * WAIT_S * 1e9)


def test_a_turn_comes_out_of_the_channel_as_it_went_in() -> None:
    turn = arm(Gpu(), "host").take_turn(0.05)
    read = read_turn(turn_message(turn))
    assert list(read.parts_ns) == list(turn.parts_ns)
    for one, other in zip(read.parts_ns.values(), turn.parts_ns.values(), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(read.latencies_ns, turn.latencies_ns)
    np.testing.assert_array_equal(read.starts_ns, turn.starts_ns)


@pytest.mark.parametrize(
    ("enqueue", "copies", "share"),
    [(79, 0, None), (80, 0, "80%"), (40, 50, "80%"), (39, 50, None), (100, 0, "100%")],
)
def test_a_row_is_launch_bound_from_80_percent_of_the_inference_on(enqueue, copies, share) -> None:
    latencies = np.full(40, 100)
    parts = {DEVICE: np.full(40, 5), ENQUEUE: np.full(40, enqueue)}
    if copies:
        parts |= {COPY_IN: np.full(40, copies - 10), COPY_OUT: np.full(40, 10)}
    said = launch_bound(latencies, parts)
    assert len(said) == (share is not None)
    assert all(line.startswith(f"launch-bound: the host takes {share} of the inference") for line in said)


def test_no_time_of_enqueueing_no_word_of_launches() -> None:
    assert launch_bound(np.full(40, 100), {DEVICE: np.full(40, 99)}) == []


def test_launch_bound_does_not_stand_against_a_row() -> None:
    draw = np.random.default_rng(0)
    latencies, turns = draw.integers(1000, 1010, 4000), np.repeat(np.arange(40), 100)
    parts = {DEVICE: latencies // 10, ENQUEUE: latencies - 50}
    figures = analyse_turns(latencies, turns, parts, batch=1, baseline=None, observed=())
    assert figures.verdict.steady
    assert any(reason.startswith("launch-bound") for reason in figures.verdict.reasons)
    # It follows from the samples, so it is not kept as what they do not show.
    assert figures.verdict.remarks == ()
    assert figures.clocks is not None
    assert figures.clocks.copy_in is None
    assert figures.clocks.device.p50_ns is not None
    assert figures.clocks.device.p50_ns.value == np.median(latencies // 10)


@pytest.fixture
def on_cuda(make_artifact) -> Measured:
    """Rows at both boundaries as a run on CUDA makes them, from calls that take no time and parts drawn at random."""
    artifact = make_artifact()
    draw = np.random.default_rng(0)
    measured = None
    for boundary in ("device", "host"):
        names = list(CLOCKS) if boundary == "host" else [DEVICE, ENQUEUE]
        local = Local("it", lambda: None, parts=lambda names=names: dict.fromkeys(names, int(draw.integers(90, 110))))
        arm = Attended(local)
        timed = interleave({artifact.title: arm}, budget_s=0.2, turn_s=0.002, max_warmup_s=0.1)
        subject = Subject(target=artifact.title, kind="artifact", source=artifact)
        conditions = Conditions(batch=1, boundary=boundary, options=SessionOptions())
        with Recorder() as recorder:
            rows = Rows(title="gpu", command=(), lasting=length(1.0), recorder=recorder)
            found = Launches()
            found.add(timed, [Started(subject=subject, arm=arm, placement=ON_CUDA)], [arm.turns])
            keep_turns(rows, found, conditions)
            made = rows.result(partial=False)
        measured = made if measured is None else merge(measured, made)
    return measured


def test_rows_with_clocks_come_out_the_same_again(on_cuda: Measured, tmp_path: Path) -> None:
    device, host = on_cuda.measurements
    assert device.clocks.copy_in is None
    assert all(getattr(host.clocks, name) is not None for name in CLOCKS.values())
    save_report(on_cuda, tmp_path / "kept")
    report = read_report(tmp_path / "kept")
    assert set(report.raw_samples()) >= {host.samples + suffix for suffix in CLOCKS}
    again = dlops.reanalyse(report).report
    assert again.measurements == report.measurements
    assert again.notes[-1].endswith("every number as before")


def test_a_clock_whose_samples_are_gone_is_refused(on_cuda: Measured, tmp_path: Path) -> None:
    key = on_cuda.measurements[1].samples + COPY_OUT
    samples = {name: array for name, array in on_cuda.samples.items() if name != key}
    save_report(Measured(report=on_cuda.report, samples=samples), tmp_path / "kept")
    with pytest.raises(CorruptError, match=key):
        dlops.reanalyse(read_report(tmp_path / "kept"))


def test_tables_name_the_parts(on_cuda: Measured) -> None:
    text = " ".join(table_text(on_cuda.report, width=200).split())
    assert "on the device, batch 1: onnx-fp32: medians in ms: call" in text
    assert "in process, batch 1: onnx-fp32: medians in ms: call" in text
    assert "copy out 0.000" in text
    device, host = csv.DictReader(io.StringIO(to_csv(on_cuda.report)))
    assert device["copy_in_p50_ns"] == ""
    assert 90 <= float(host["copy_in_p50_ns"]) <= 110
    assert 90 <= float(device["device_p50_ns"]) <= 110


class Library:
    """A CUDA runtime whose calls all answer with one status; its events are 1.5 ms apart."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.called: list[tuple[str, tuple[object, ...]]] = []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.called.append((name, arguments))
            if name == "cudaEventElapsedTime":
                arguments[0]._obj.value = 1.5
            if name == "cudaDeviceGetPCIBusId":
                arguments[0].value = b"0000:%02x:00.0" % (0x3B + arguments[2].value)
            if name in ("cudaEventCreate", "cudaStreamCreateWithFlags"):
                arguments[0]._obj.value = len(self.called)
            return self.status

        return call

    def cudaGetErrorString(self, status: int) -> bytes:  # noqa: N802 - the library's name for it
        return b"no CUDA-capable device is detected"


def test_events_are_recorded_on_the_stream_and_their_distance_is_nanoseconds(monkeypatch) -> None:
    library = Library()
    monkeypatch.setattr(cudart, "_library", lambda: library)
    stream = cudart.Stream()
    clock = cudart.Stopwatch(stream.handle)
    clock.start()
    clock.stop()
    stream.synchronize()
    assert clock.elapsed_ns() == 1_500_000
    recorded = [tuple(one.value for one in given) for name, given in library.called if name == "cudaEventRecord"]
    first, second = recorded
    assert first[1] == second[1] == stream.handle
    assert first[0] != second[0]
    ((_, *events),) = [given for name, given in library.called if name == "cudaEventElapsedTime"]
    assert [one.value for one in events] == [first[0], second[0]]


def test_a_session_on_cuda_is_found_on_the_bus_by_cudas_own_number(monkeypatch) -> None:
    library = Library()
    monkeypatch.setattr(cudart, "_library", lambda: library)
    assert gpu_of(ON_CUDA) == "0000:3b:00.0"
    assert gpu_of(replace(ON_CUDA, device="cuda:2")) == "0000:3d:00.0"
    assert gpu_of(replace(ON_CUDA, device="cpu")) is None
    # Where CUDA does not say, the row goes without what NVML would know of its GPU.
    monkeypatch.setattr(cudart, "_library", lambda: Library(status=101))
    assert gpu_of(ON_CUDA) is None


def test_what_the_cuda_runtime_refuses_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(cudart, "_library", lambda: Library(status=100))
    with pytest.raises(MachineError, match="cudaStreamCreateWithFlags: no CUDA-capable device is detected"):
        cudart.Stream()


def test_a_machine_without_the_cuda_runtime_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(cudart, "_NAMES", ("libcudart.so.nowhere",))
    with pytest.raises(MachineError, match=r"no libcudart\.so\.nowhere on this machine") as caught:
        cudart._library.__wrapped__()
    assert caught.value.hint == "pip install nvidia-cuda-runtime"


def test_a_cuda_graph_is_refused_on_the_cpu_by_every_runtime(make_artifact) -> None:
    options = SessionOptions(device="cpu", cuda_graph=True)
    with pytest.raises(MachineError, match="a CUDA graph was asked for, and this would run on the CPU") as caught:
        open_session(make_artifact(), options)
    assert "leave --cuda-graph out" in caught.value.hint
    pytest.importorskip("torch", reason="two of the runtimes are torch's")
    from dlops.runtimes.eager import choose_device

    with pytest.raises(MachineError, match="a CUDA graph was asked for"):
        choose_device(options)


def test_the_command_refuses_a_cuda_graph_where_there_is_none(make_artifact, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(make_artifact().directory)
    assert run(["bench", folder, "--cuda-graph", "--device", "cpu"]) == 2
    assert "a CUDA graph was asked for, and there is none on the CPU" in capsys.readouterr().err
    if not cuda_works():
        assert run(["bench", folder, "--cuda-graph"]) == 4
        assert "this would run on the CPU" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


def test_a_service_runs_its_models_itself() -> None:
    with pytest.raises(UsageError, match="a CUDA graph was asked for, and a service runs its models itself"):
        measure(["http://127.0.0.1:1"], cuda_graph=True)
