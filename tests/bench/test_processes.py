"""Targets in processes of their own: what they report, how they fail, and that none outlives its run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dlops.artifact import Artifact
from dlops.bench import inprocess
from dlops.bench.channel import Channel
from dlops.bench.payload import artifact_feeds
from dlops.bench.processes import Process
from dlops.bench.run import measure
from dlops.bench.worker import Job, Ready, caller
from dlops.checkpoint import Checkpoint
from dlops.errors import CorruptError, MachineError, UsageError


def job(artifact: Artifact, *, batch: int = 1) -> Job:
    directory = str(artifact.directory)
    return Job(target="it", kind="artifact", directory=directory, samples=directory, batch=batch, threads=1)


def ready(artifact: Artifact) -> Ready:
    with Process(job(artifact)) as process:
        return process.ready()


@pytest.fixture
def process(make_artifact) -> Iterator[Process]:
    """One that is ready for its turns."""
    with Process(job(make_artifact())) as started:
        started.ready()
        yield started


@pytest.fixture
def no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New processes find no torch."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Of a module of the toy artifacts' shape, without a builder: sixteen numbers in, ten out."""
    torch = pytest.importorskip("torch", reason="a checkpoint's module needs torch")
    from dlops.saving import save_checkpoint

    inputs = torch.randn(8, 16).numpy()
    return save_checkpoint(
        torch.nn.Linear(16, 10), tmp_path / "run", evaluation=(inputs, np.zeros(8, np.int64)), max_batch=64
    )


def cpu_ns(pid: int) -> int:
    """Of all the process's threads, in ns."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:
            continue  # a thread that has ended meanwhile
    return total


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_turn_holds_calls_in_order_on_the_clock_of_the_run(process: Process) -> None:
    warmth = process.warm_up(0.2)
    assert warmth.calls > 0
    before = time.perf_counter_ns()
    turn = process.take_turn(0.02)
    after = time.perf_counter_ns()
    assert len(turn.starts_ns) == len(turn.latencies_ns) > 0
    assert np.all(turn.latencies_ns > 0)
    assert before <= turn.starts_ns[0]
    assert turn.starts_ns[-1] + turn.latencies_ns[-1] <= after
    assert np.all(turn.starts_ns[1:] >= (turn.starts_ns + turn.latencies_ns)[:-1]), "one call at a time"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_a_process_rests_when_its_turn_is_over(make_artifact) -> None:
    # Large enough for the pool of threads, which then spins for tens of milliseconds.
    artifact = make_artifact(hidden=20_000)
    with Process(job(artifact, batch=32).model_copy(update={"threads": 2})) as process:
        process.ready()
        process.warm_up(0.3)
        busy = []
        for _ in range(8):
            process.take_turn(0.02)
            before = cpu_ns(process.pid)
            time.sleep(0.03)
            busy.append(cpu_ns(process.pid) - before)
    # A tick more may be counted of what was used before; and where others use the cores, threads that would have ended
    # their spinning in the turn do so after it. One that always spins does so in every round.
    assert np.quantile(busy, 0.25) <= 10e6, busy


def test_what_this_process_holds_is_not_charged_to_the_model(make_artifact) -> None:
    artifact = make_artifact()
    before = ready(artifact).peak_memory_bytes
    ballast = np.ones(400_000_000, np.uint8)
    after = ready(artifact).peak_memory_bytes
    assert ballast.all()
    assert abs(after - before) < 30_000_000


def test_a_larger_model_peaks_higher(make_artifact) -> None:
    small, large = make_artifact(hidden=8), make_artifact("onnx-fp16", hidden=500_000)
    assert large.model_bytes > 50_000_000
    assert ready(large).peak_memory_bytes - ready(small).peak_memory_bytes > 50_000_000


def test_the_parts_of_a_cold_start_lie_within_it(make_artifact) -> None:
    start = ready(make_artifact()).cold_start
    assert 0 < start.load_ns + start.first_call_ns < start.total_ns


def test_an_error_of_the_process_comes_out_as_what_it_is(make_artifact) -> None:
    artifact = make_artifact()
    artifact.path("model").write_bytes(b"x" * artifact.model_bytes)
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        ready(artifact)


def test_a_process_that_is_killed_is_named_with_its_signal(process: Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(MachineError, match="it: the process that ran it ended with SIGKILL") as caught:
        process.take_turn(0.02)
    assert caught.value.hint is not None
    assert "memory" in caught.value.hint


def test_ctrl_c_is_not_for_the_processes(process: Process) -> None:
    os.kill(process.pid, signal.SIGINT)
    assert len(process.take_turn(0.02).latencies_ns) > 0


def test_ctrl_c_ends_a_schedule_and_the_process_still_answers(process: Process) -> None:
    due = np.arange(100_000) * 10_000_000
    timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    kept = process.keep_schedule(due, give_up_ns=2**62)
    timer.join()
    assert kept.interrupted
    ran = kept.begun_ns >= 0
    assert not ran[-1]
    assert np.all(kept.ended_ns[ran] >= kept.begun_ns[ran])
    assert np.all(kept.begun_ns[ran] >= due[ran])
    assert len(process.take_turn(0.01).latencies_ns) >= 1


def test_none_is_left_when_the_run_is_killed(make_artifact) -> None:
    script = f"""
import os, signal
from dlops.bench.processes import Process
from dlops.bench.worker import Job
process = Process(Job.model_validate_json({job(make_artifact()).model_dump_json()!r}))
process.ready()
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 60
    while is_running(int(done.stdout)):
        assert time.monotonic() < deadline, "the process goes on without its run"
        time.sleep(0.05)


def test_what_a_library_prints_is_no_message() -> None:
    script = """
import os
from dlops.bench.channel import Channel
channel = Channel.of_child()
print("a library's banner", flush=True)
os.system("echo from C")
channel.send({"said": "all"}, b"\\x00\\n\\xff")
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stderr is not None
        channel = Channel(child.stdout, child.stdin)
        assert channel.receive() == ({"said": "all", "bytes": 3}, b"\x00\n\xff")
        assert channel.receive() is None
        assert b"from C" in child.stderr.read()


@pytest.mark.usefixtures("no_torch")
def test_an_onnx_artifact_is_measured_without_torch(make_artifact) -> None:
    (row,) = measure([make_artifact()], duration_s=0.1, threads=1).measurements
    assert row.runtime == "onnxruntime"


@pytest.mark.usefixtures("no_torch")
def test_eager_without_torch_is_one_line_that_names_the_extra(checkpoint: Checkpoint) -> None:
    with pytest.raises(MachineError, match="the eager baseline needs torch, which is not installed") as caught:
        measure([], checkpoint=checkpoint, model="python:nowhere:make", duration_s=0.1)
    assert "dlops[export]" in str(caught.value)


def test_threads_are_an_axis_and_speed_ups_are_within_one_count(make_artifact) -> None:
    first, second = make_artifact(), make_artifact("onnx-int8")
    rows = measure([first, second], threads=(2, 1), duration_s=0.1).measurements
    assert [(row.artifact, row.threads) for row in rows] == [
        ("onnx-fp32", 1), ("onnx-int8", 1), ("onnx-fp32", 2), ("onnx-int8", 2),
    ]  # fmt: skip
    assert [row.speedup.value for row in rows[::2] if row.speedup is not None] == [1.0, 1.0]


def test_preprocessing_is_a_boundary(digits_artifact: Artifact) -> None:
    rows = measure([digits_artifact], boundary=("host", "preprocessing"), duration_s=0.1, threads=1).measurements
    assert [row.boundary for row in rows] == ["host", "preprocessing"]
    assert all(row.cold_start is not None for row in rows)


def test_what_is_preprocessed_in_a_call_is_what_is_fed_without(digits_artifact: Artifact) -> None:
    class Recorder:
        signature = digits_artifact.signature

        def __init__(self) -> None:
            self.fed: list[np.ndarray] = []

        def run(self, feed):
            self.fed.append(feed["image"])

    session = Recorder()
    call = caller(session, samples=digits_artifact, batch=3, boundary="preprocessing")
    feeds = artifact_feeds(digits_artifact, 3)
    for _ in feeds:
        call()
    for fed, feed in zip(session.fed, feeds, strict=True):
        assert np.array_equal(fed, feed["image"])


def test_a_boundary_that_an_artifact_does_not_have_is_refused(make_artifact) -> None:
    with pytest.raises(UsageError, match="preprocessing: toy/onnx-fp32 takes tensors as they are"):
        measure([make_artifact()], boundary=("preprocessing",))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_checkpoints_module_is_measured_compiled(make_artifact, checkpoint: Checkpoint) -> None:
    torch = pytest.importorskip("torch", reason="torch.compile needs torch")
    measured = measure(
        [], checkpoint=checkpoint, model=torch.nn.Linear(16, 10), compiled=True, duration_s=0.1, threads=1
    )
    assert [row.runtime for row in measured.measurements] == ["eager", "torch.compile"]
    assert "which alone has the module that was passed in" in " ".join(measured.report.notes)


def test_compiling_what_is_no_checkpoint_is_refused(make_artifact) -> None:
    with pytest.raises(UsageError, match=r"torch\.compile is for a checkpoint's module"):
        measure([make_artifact()], compiled=True)


def test_a_target_that_fails_later_leaves_the_rows_before_it(make_artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    start = inprocess.started

    def second_fails(chosen, conditions):
        if conditions.batch == 32:
            raise MachineError("it: the process that ran it ended with SIGKILL")
        return start(chosen, conditions)

    monkeypatch.setattr(inprocess, "started", second_fails)
    measured = measure([make_artifact()], batch=(1, 32), duration_s=0.1, threads=1)
    assert measured.partial
    assert [row.load.batch for row in measured.measurements] == [1]
    assert "ended with SIGKILL" in measured.report.notes[-1]
