"""Several calls at once on one target of this machine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import dlops
from dlops.bench import cells
from dlops.bench.arrivals import Offered
from dlops.bench.run import measure, save_report
from dlops.bench.together import Together
from dlops.bench.worker import Job, open_job
from dlops.errors import UsageError
from dlops.report import read_report
from dlops.runtimes import SessionOptions
from dlops.runtimes.eager import ThreadStreams
from dlops.timing import Local


def test_calls_of_all_callers_overlap_and_come_by_when_they_began() -> None:
    most, now, lock = 0, 0, threading.Lock()

    def call() -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    arm = Together([Local("it", call) for _ in range(3)])
    warmth = arm.warm_up(0.5)
    turn = arm.take_turn(0.05)
    assert most == 3
    assert warmth.calls >= 3
    assert np.all(np.diff(turn.starts_ns) >= 0)
    assert turn.latencies_ns.min() >= 2_000_000
    overlapping = turn.starts_ns[1:] < turn.starts_ns[:-1] + turn.latencies_ns[:-1]
    assert overlapping.mean() > 0.5


def test_no_call_that_counts_has_fewer_beside_it() -> None:
    ended: dict[int, int] = {}

    def lasting(seconds: float):
        def call() -> None:
            time.sleep(seconds)
            ended[threading.get_ident()] = time.perf_counter_ns()

        return call

    arm = Together([Local("short", lasting(0.001)), Local("long", lasting(0.03)), Local("longer", lasting(0.6))])
    arm.warm_up(0.2)
    turn = arm.take_turn(0.01)
    assert len(ended) == 3
    # The others would be half a second ahead; a busy machine may delay a caller by some milliseconds.
    assert min(ended.values()) >= int((turn.starts_ns + turn.latencies_ns).max()) - 300_000_000


def test_what_one_call_raises_goes_through() -> None:
    def broken() -> None:
        raise ValueError("no more")

    arm = Together([Local("fine", lambda: None), Local("broken", broken)])
    with pytest.raises(ValueError, match="no more") as caught:
        arm.take_turn(0.01)
    assert caught.value.__notes__ == ["while timing broken"]


def test_concurrency_is_an_axis_in_process(make_artifact, tmp_path: Path) -> None:
    slow, fast = make_artifact("onnx-fp32", hidden=20_000), make_artifact("onnx-int8")
    measured = measure([slow, fast], concurrency=(1, 3), threads=1, duration_s=0.1)
    rows = measured.measurements
    assert [(row.artifact, row.load.concurrency) for row in rows] == [
        ("onnx-fp32", 1), ("onnx-int8", 1), ("onnx-fp32", 3), ("onnx-int8", 3)
    ]  # fmt: skip
    for row in rows:
        # Little's law, which the throughput is made by.
        assert row.throughput.value * row.latency.mean_ns / 1e9 == pytest.approx(row.load.concurrency, rel=1e-6)
    assert [cells.name(row) for row in rows[::2]] == ["onnx-fp32", "onnx-fp32 with 3 in flight"]
    # Each number in flight has a baseline of its own.
    assert [row.paired_with for row in rows] == ["row00", "row00", "row02", "row02"]
    save_report(measured, tmp_path / "report")
    report = read_report(tmp_path / "report")
    assert dlops.reanalyse(report).measurements == report.measurements


@pytest.mark.parametrize(
    ("options", "said"),
    [({"boundary": ("device",)}, "--boundary device has one call at a time"), ({"device": "cpu"}, None)],
)
def test_bound_buffers_are_one_callers(make_artifact, options, said) -> None:
    if said is None:
        (row,) = measure([make_artifact()], concurrency=(2,), duration_s=0.1, **options).measurements
        assert row.load.concurrency == 2
        return
    with pytest.raises(UsageError, match=said):
        measure([make_artifact()], concurrency=(2,), duration_s=0.1, **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scenarios": ("server",), "offered": Offered(rates=(50.0,))}, "the server scenario gives each call arrays"),
        ({"engine": "loadgen", "scenarios": ("single_stream",)}, "LoadGen gives each call arrays of its own"),
    ],
)
def test_calls_that_are_not_on_bound_buffers_have_no_boundary_at_the_device(make_artifact, changes, said) -> None:
    with pytest.raises(UsageError, match=f"--boundary device times calls on bound buffers, and {said}"):
        measure([make_artifact()], boundary=("device",), duration_s=0.1, **changes)


@pytest.mark.parametrize("callers", [1, 3])
def test_callers_on_cuda_have_a_stream_each_and_one_alone_has_the_sessions(callers: int, make_artifact, monkeypatch):
    asked = []

    def opener(artifact, options):
        asked.append(options)
        return "a session"

    monkeypatch.setattr("dlops.catalog.resolve", lambda *_: opener)
    directory = str(make_artifact().directory)
    open_job(Job(target="it", kind="artifact", directory=directory, batch=1, concurrency=callers))
    assert asked == [SessionOptions(own_stream=callers == 1, stream_per_thread=callers > 1)]


def test_a_session_has_one_stream_for_all_threads_or_one_for_each() -> None:
    with pytest.raises(ValueError, match="one stream for all threads, or one for each"):
        SessionOptions(own_stream=True, stream_per_thread=True)


def test_a_thread_keeps_its_stream_and_shares_it_with_no_other() -> None:
    streams = ThreadStreams(object)  # type: ignore[arg-type]
    barrier = threading.Barrier(3)

    def mine() -> list[object]:
        barrier.wait(10)  # all three are alive at once, so that none takes over the name of another that has ended
        return [streams.mine() for _ in range(2)]

    with ThreadPoolExecutor(3) as pool:
        pairs = [one.result() for one in [pool.submit(mine) for _ in range(3)]]
    assert all(first is second for first, second in pairs)
    assert len({id(first) for first, _ in pairs}) == 3
