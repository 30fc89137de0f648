"""One run of a target of known length, by our generator or by LoadGen, in this process.

The order comes as JSON in the only argument, under the server scenario with the due times on standard input; latencies,
starts and lateness leave as int64 nanoseconds on standard output.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable

import numpy as np

from dlops.bench.fifo import PipeTicker, keep_schedule
from dlops.bench.kernel import wake_on_time
from dlops.bench.loadgen import Settings, drive_session
from dlops.timing import Local, collector_off


def waiting(length_ns: int, *, asleep: bool) -> Callable[[], None]:
    """Lasts so long, looking at the clock or asleep; nothing at all where that is 0."""

    def busy() -> None:
        end = time.perf_counter_ns() + length_ns
        while time.perf_counter_ns() < end:
            pass

    if length_ns == 0:
        return lambda: None
    return (lambda: time.sleep(length_ns / 1e9)) if asleep else busy


class Sleeper:
    """A clock that sleeps until a request is due, as LoadGen does, and is late and cold when it wakes up."""

    def __init__(self) -> None:
        wake_on_time()
        self._start_ns = time.perf_counter_ns()

    def now_ns(self) -> int:
        return time.perf_counter_ns() - self._start_ns

    def wait_until(self, due_ns: int) -> bool:
        if (left_ns := due_ns - self.now_ns()) > 0:
            time.sleep(left_ns / 1e9)
        return True


def by_dlops(order: dict, call: Callable[[], None], due_ns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latencies, starts, and how late calls were made."""
    if order["scenario"] == "single_stream":
        turn = Local("target", call).take_turn(order["duration_s"])
        return turn.latencies_ns, turn.starts_ns, np.zeros(len(turn.starts_ns), np.int64)
    if order["generator"] == "dlops asleep":
        kept = keep_schedule(call, due_ns, give_up_ns=2**62, ticker=Sleeper())
        return kept.ended_ns - due_ns, due_ns, kept.lag_ns(due_ns)
    # Nothing ever comes on this pipe.
    reader, _ = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        assert not select.select([pipe], [], [], 0)[0]
        kept = keep_schedule(call, due_ns, give_up_ns=2**62, ticker=PipeTicker(pipe))
    return kept.ended_ns - due_ns, due_ns, kept.lag_ns(due_ns)


def by_loadgen(order: dict, call: Callable[[], None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    settings = Settings(
        scenario=order["scenario"], duration_s=order["duration_s"], rate=order["rate"],
        expected_ns=max(order["length_ns"], 20_000),
    )  # fmt: skip
    driven = drive_session(call, settings)
    return driven.latencies_ns, driven.starts_ns, driven.lag_ns


def main() -> None:
    order = json.loads(sys.argv[1])
    due_ns = np.frombuffer(sys.stdin.buffer.read(), np.int64)
    # Before whatever else runs. Raises PermissionError where that is not allowed.
    if order["scenario"] == "server":
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    call = waiting(order["length_ns"], asleep=order["asleep"])
    for _ in range(50):
        call()
    with collector_off():
        found = by_loadgen(order, call) if order["generator"] == "loadgen" else by_dlops(order, call, due_ns)
    answer.write(np.stack(found).tobytes())
    answer.close()


if __name__ == "__main__":
    main()
