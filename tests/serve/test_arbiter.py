"""The arbiter under `bentoml serve`: workers that have ended, and a SIGTERM at a bad moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from dlops.serve.launch import ServerProcess

pytest.importorskip("circus", reason="bentoml brings it")
# It would look by itself once an hour. begin_s: how long it takes over each worker that it starts.
_ARBITER = """
import sys
from circus.arbiter import Arbiter
from circus.watcher import Watcher
from dlops.serve import arbiter
folder, begin_s = sys.argv[1], float(sys.argv[2])
arbiter.install()
sleep = ["-c", "import time; time.sleep(600)", folder]
watcher = Watcher("workers", sys.executable, args=sleep, numprocesses=2, warmup_delay=begin_s)
Arbiter(
    [watcher], endpoint=f"ipc://{folder}/told", pubsub_endpoint=f"ipc://{folder}/tells", check_delay=3600
).start()
"""


@contextmanager
def arbiter_of_two(folder: Path, *, begin_s: float = 0) -> Iterator[psutil.Popen]:
    process = psutil.Popen([sys.executable, "-c", _ARBITER, str(folder), str(begin_s)])
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in process.children():
                child.kill()
            process.kill()
            process.wait(10)


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def workers(process: psutil.Popen) -> set[int]:
    return {child.pid for child in process.children() if child.status() != psutil.STATUS_ZOMBIE}


def test_workers_that_end_are_replaced_at_once(tmp_path) -> None:
    with arbiter_of_two(tmp_path) as process:
        wait_until(lambda: len(workers(process)) == 2)
        first = workers(process)
        for gone in first:
            os.kill(gone, signal.SIGKILL)
        wait_until(lambda: len(workers(process) - first) == 2)
        second = workers(process)
        os.kill(min(second), signal.SIGKILL)
        wait_until(lambda: len(workers(process)) == 2 and min(second) not in workers(process))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("times", [1, 3])
def test_a_sigterm_while_workers_are_started_is_not_lost(tmp_path, times: int) -> None:
    with arbiter_of_two(tmp_path, begin_s=1.5) as process:
        wait_until(lambda: len(workers(process)) == 1)
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_worker_that_ends_with_the_server_is_not_replaced(tmp_path) -> None:
    with arbiter_of_two(tmp_path) as process:
        wait_until(lambda: len(workers(process)) == 2)
        first = workers(process)
        process.send_signal(signal.SIGTERM)
        for worker in first:
            with suppress(ProcessLookupError):  # circus was first
                os.kill(worker, signal.SIGKILL)
        assert process.wait(60) == 0
        # Another one would be named after this folder too.
        assert not [one.pid for one in psutil.process_iter() if str(tmp_path) in _command(one)]


def test_requests_to_a_killed_worker_are_answered_by_the_one_in_its_place(digits_artifact) -> None:
    with ServerProcess(digits_artifact) as server:
        for _ in range(3):
            (worker,) = psutil.Process(server.pid).children()
            worker.kill()
            worker.wait(10)
            # The arbiter holds the port open: nobody is refused, and who asks waits for the next worker.
            wait_until(lambda: httpx.get(f"{server.url}/v2/health/ready", timeout=60).status_code == 200)
