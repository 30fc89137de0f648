"""Twice as many requests as the service can answer, for a minute."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from dlops.bench import pacing
from dlops.bench.arrivals import poisson
from dlops.bench.load import Loaded, closed_loop
from dlops.bench.openloop import open_loop
from dlops.environment import available_cores
from dlops.serve.launch import ServerProcess
from tests.benchmarks.serving.photos import jpegs, make_resnet18, posts

DEADLINE_S = 2.0
OVERLOADED_S = 60.0
CAPACITY_S = 15.0
HOST = "127.0.0.1"


class Memory:
    """Of all processes of a server, in MB, twice a second."""

    def __init__(self, pid: int) -> None:
        self._family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        self.seen: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.seen.append(sum(one.memory_info().rss for one in self._family) / 1e6)


def rate(loaded: Loaded) -> float:
    assert not loaded.errors
    ended = np.concatenate([loaded.starts_ns + loaded.latencies_ns, loaded.earlier_ns])
    return int((ended <= loaded.duration_ns).sum()) / loaded.duration_ns * 1e9


def test_goodput_holds_at_twice_the_capacity(write_page: Callable[..., Path], tmp_path: Path) -> None:
    artifact = make_resnet18(tmp_path)
    bodies = jpegs(64, seed=1)
    timed = posts(bodies, headers=f"X-Request-Timeout-Ms: {int(DEADLINE_S * 1000)}\r\n")
    with ServerProcess(artifact, threads=available_cores()) as server:

        def capacity() -> float:
            return rate(closed_loop(HOST, server.port, posts(bodies), concurrency=16, duration_s=CAPACITY_S))

        before = capacity()
        with Memory(server.pid) as memory:
            loaded = open_loop(
                HOST, server.port, timed, poisson(2 * before, duration_s=OVERLOADED_S), senders=1, timeout_s=30.0
            )
            # From a second after its end on.
            after = rate(closed_loop(HOST, server.port, posts(bodies), concurrency=16, duration_s=6, max_warmup_s=1))
        again = capacity()
    answered = loaded.succeeded
    latency_s = loaded.service_ns / 1e9
    # The minute's own, without its begin, where the queue fills.
    steady = answered & (loaded.arrived_ns > 5e9) & (loaded.arrived_ns <= OVERLOADED_S * 1e9)
    goodput = int((steady & (loaded.arrived_ns - loaded.sent_ns <= DEADLINE_S * 1e9)).sum()) / (OVERLOADED_S - 5)
    p50, p99 = np.quantile(latency_s, (0.5, 0.99), method="higher")
    statuses = Counter(pacing.outcome_name(code) for code in loaded.outcome.tolist())
    # The capacity while it lasted: the machine is not the same for two minutes.
    reference = (before + again) / 2
    quarters = [float(np.median(part)) for part in np.array_split(memory.seen, 4)]
    write_page(
        "serving-overload",
        title="Twice the capacity for a minute",
        says=f"ResNet-18 in fp32 by ONNX Runtime on {available_cores()} threads, JPEG files of 500×375 to `/predict`, "
        f"each with a deadline of {DEADLINE_S:g} s. The capacity is what 16 connections in a closed loop reach in "
        f"{CAPACITY_S:g} s, before and after. Then Poisson arrivals at twice the first, for {OVERLOADED_S:g} s, "
        f"whether or not earlier ones are answered, from a process that shares the cores. Goodput: answered within the "
        f"deadline, without the first 5 s.",
        header=["", ""],
        rows=[
            ["capacity before, after", f"{before:.1f}, {again:.1f} images/s"],
            ["offered", f"{len(loaded.due_ns) / OVERLOADED_S:.1f} images/s"],
            ["goodput", f"{goodput:.1f} images/s, {goodput / reference:.2f} of the capacity"],
            ["answers", ", ".join(f"{count} × {name}" for name, count in sorted(statuses.items()))],
            ["of those answered: p50, p99", f"{p50:.2f}, {p99:.2f} s"],
            ["memory of all processes, by quarters", ", ".join(f"{one:.0f}" for one in quarters) + " MB"],
            ["from a second after on", f"{after:.1f} images/s, {after / reference:.2f} of the capacity"],
        ],
    )  # fmt: skip
    assert set(statuses) <= {"HTTP 200", "HTTP 429", "HTTP 503"}, statuses
    assert goodput >= 0.9 * reference
    assert p99 <= DEADLINE_S
    assert max(quarters[1:]) <= 1.1 * quarters[0] + 20
    assert after >= 0.9 * reference
