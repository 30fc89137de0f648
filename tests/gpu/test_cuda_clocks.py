"""Bound calls, device time and CUDA graphs on a real GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dlops.artifact import Artifact
from dlops.bench.run import measure
from dlops.cudart import Stopwatch
from dlops.report import COPY_IN, COPY_OUT, DEVICE, ENQUEUE
from dlops.runtimes import Session, SessionOptions, open_session
from dlops.runtimes.eager import open_compiled, open_eager

# Cycles of torch.cuda._sleep: some 50 ms at the clock rates of today's GPUs.
LONG = 100_000_000


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))


def onnx(artifact: Artifact, options: SessionOptions) -> Session:
    return open_session(artifact, options)


def eager(artifact: Artifact, options: SessionOptions) -> Session:
    return open_eager(linear(), artifact.signature, options)


def compiled(artifact: Artifact, options: SessionOptions) -> Session:
    return open_compiled(linear(), artifact.signature, options)


def options(*, cuda_graph: bool = False) -> SessionOptions:
    return SessionOptions(device="cuda", own_stream=True, cuda_graph=cuda_graph)


def test_events_time_a_kernel_as_the_host_sees_it() -> None:
    watch = Stopwatch(torch.cuda.current_stream().cuda_stream)
    torch.cuda._sleep(LONG)
    torch.cuda.synchronize()
    beyond = []
    for _ in range(5):
        began = time.perf_counter_ns()
        watch.start()
        torch.cuda._sleep(LONG)
        watch.stop()
        torch.cuda.synchronize()
        host_ns, device_ns = time.perf_counter_ns() - began, watch.elapsed_ns()
        # Events have steps of about half a microsecond.
        assert device_ns <= host_ns + 1000
        beyond.append((host_ns - device_ns) / device_ns)
    assert min(beyond) < 0.2


def test_events_agree_with_those_of_torch_and_grow_with_the_kernel() -> None:
    watch = Stopwatch(torch.cuda.current_stream().cuda_stream)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for cycles in (LONG // 10, LONG):
        first.record()
        watch.start()
        torch.cuda._sleep(cycles)
        watch.stop()
        last.record()
        torch.cuda.synchronize()
        taken.append(watch.elapsed_ns())
        assert taken[-1] == pytest.approx(first.elapsed_time(last) * 1e6, rel=0.05)
    assert taken[1] > 3 * taken[0]


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("opened", [onnx, eager, compiled])
def test_a_bound_call_on_cuda_gives_what_the_session_gives(
    opened: Callable, cuda_graph: bool, digits_artifact: Artifact
) -> None:
    session = opened(digits_artifact, options(cuda_graph=cuda_graph))
    assert session.placement.device == "cuda:0"
    assert session.placement.provider.endswith("CUDA graph") == cuda_graph
    images = digits_artifact.samples().inputs["image"]
    bound = session.bind({"image": images[:4]})
    answers = []
    for rows in (slice(0, 4), slice(4, 8), slice(0, 4)):
        bound.copy_in({"image": images[rows]})
        bound.run()
        bound.synchronize()
        answers.append(bound.copy_out()["logits"])
        np.testing.assert_allclose(answers[-1], session.run({"image": images[rows]})["logits"], rtol=1e-3, atol=1e-3)
    assert not np.allclose(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    session.close()


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("opened", [onnx, eager])
def test_a_run_that_enqueues_returns_before_what_is_ahead_of_it_is_done(
    opened: Callable, cuda_graph: bool, digits_artifact: Artifact
) -> None:
    session = opened(digits_artifact, options(cuda_graph=cuda_graph))
    bound = session.bind({"image": digits_artifact.samples().inputs["image"][:1]})
    stream = torch.cuda.ExternalStream(bound.stream) if bound.stream else torch.cuda.default_stream()
    ahead = torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10 * LONG)
        ahead.record()
    bound.run()
    still_busy = not ahead.query()
    bound.synchronize()
    assert ahead.query()
    # Where a run waits inside the runtime, that is not taken for the time of enqueueing.
    assert still_busy or not bound.enqueues
    session.close()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_rows_on_cuda_have_three_clocks_and_copies_apart(cuda_graph: bool, digits_artifact: Artifact) -> None:
    measured = measure(
        [digits_artifact], boundary=("device", "host"), device="cuda", cuda_graph=cuda_graph, duration_s=0.5
    )
    device, host = measured.measurements
    assert device.clocks is not None
    assert host.clocks is not None
    assert (device.clocks.copy_in, device.clocks.copy_out) == (None, None)
    assert host.clocks.copy_in is not None
    assert host.clocks.copy_out is not None
    assert device.provider.endswith("CUDA graph") == cuda_graph
    for row in (device, host):
        whole = measured.samples[row.samples]
        assert np.all(measured.samples[row.samples + DEVICE] > 0)
        assert np.all(measured.samples[row.samples + DEVICE] <= whole + 1000)
        on_host = [measured.samples.get(row.samples + part, 0) for part in (ENQUEUE, COPY_IN, COPY_OUT)]
        assert np.all(sum(on_host) <= whole)


def test_a_tiny_model_is_launch_bound(digits_artifact: Artifact) -> None:
    (row,) = measure([digits_artifact], boundary=("device",), device="cuda", duration_s=1.0).measurements
    assert any(reason.startswith("launch-bound") for reason in row.verdict.reasons)
    assert not any(reason.startswith("launch-bound") for reason in row.verdict.remarks)


@pytest.mark.parametrize("opened", [onnx, eager])
def test_callers_at_once_have_a_stream_each_and_get_what_one_alone_gets(
    opened: Callable, digits_artifact: Artifact
) -> None:
    session = opened(digits_artifact, SessionOptions(device="cuda", stream_per_thread=True))
    images = digits_artifact.samples().inputs["image"]
    feeds = [{"image": images[row : row + 1]} for row in range(4)]
    alone = [session.run(feed)["logits"] for feed in feeds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            together = list(pool.map(lambda feed: session.run(feed)["logits"], feeds))
            np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)
    session.close()
