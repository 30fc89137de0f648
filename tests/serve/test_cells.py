"""Counts of several workers, and what they are as metrics."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dlops.errors import MachineError
from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics
from dlops.serve.outcome import BatchDone
from dlops.serve.statistics import Statistics

WORKER = """
import sys
from dlops.serve.cells import Cells
from dlops.serve.metrics import Metrics

metrics = Metrics(Cells(sys.argv[1]))
metrics.requests.add("digits", "/predict", "POST", "200", by=5)
metrics.ready.set(to=1)
print("counted", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_worker(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "counted\n"
        yield process
        process.kill()


def lines(metrics: Metrics, name: str) -> list[str]:
    return [line for line in metrics.render().decode().splitlines() if line.startswith(name)]


def test_all_workers_are_summed_and_a_killed_ones_counts_stay(other_worker, tmp_path: Path) -> None:
    metrics = Metrics(Cells(tmp_path))
    metrics.requests.add("digits", "/predict", "POST", "200")
    metrics.requests.add("digits", "/predict", "POST", "400")
    metrics.ready.set(to=1)
    counted = [
        'dlops_requests_total{method="POST",model="digits",route="/predict",status="200"} 6.0',
        'dlops_requests_total{method="POST",model="digits",route="/predict",status="400"} 1.0',
    ]
    assert lines(metrics, "dlops_requests_total") == counted
    assert lines(metrics, "dlops_ready") == ["dlops_ready 2.0"]
    os.kill(other_worker.pid, signal.SIGKILL)
    other_worker.wait(10)
    assert lines(metrics, "dlops_requests_total") == counted
    # Only the living are ready.
    assert lines(metrics, "dlops_ready") == ["dlops_ready 1.0"]


def test_the_next_worker_counts_on_in_the_file_of_one_that_has_ended(other_worker, tmp_path: Path) -> None:
    metrics = Metrics(Cells(tmp_path))
    metrics.requests.add("digits", "/predict", "POST", "200")
    files = sorted(tmp_path.iterdir())
    os.kill(other_worker.pid, signal.SIGKILL)
    other_worker.wait(10)
    next_one = Metrics(Cells(tmp_path))
    assert sorted(tmp_path.iterdir()) == files
    assert lines(metrics, "dlops_requests_total") == [
        'dlops_requests_total{method="POST",model="digits",route="/predict",status="200"} 6.0'
    ]
    # The killed one was ready, and the one in its place is not yet.
    assert lines(metrics, "dlops_ready") == ["dlops_ready 0.0"]
    next_one.requests.add("digits", "/predict", "POST", "200")
    next_one.requests.add("digits", "/v2/models/{model}/infer", "POST", "429")
    next_one.ready.set(to=1)
    assert (
        lines(metrics, "dlops_requests_total")
        == lines(next_one, "dlops_requests_total")
        == [
            'dlops_requests_total{method="POST",model="digits",route="/predict",status="200"} 7.0',
            'dlops_requests_total{method="POST",model="digits",route="/v2/models/{model}/infer",status="429"} 1.0',
        ]
    )
    assert lines(metrics, "dlops_ready") == ["dlops_ready 1.0"]
    assert metrics.cells.living() == [os.getpid()] * 2


def test_a_file_that_somebody_looks_at_is_taken_over_all_the_same(other_worker, tmp_path: Path) -> None:
    os.kill(other_worker.pid, signal.SIGKILL)
    other_worker.wait(10)
    files = sorted(tmp_path.iterdir())
    (path,) = tmp_path.glob("*.cells")
    with path.open("rb") as looking:
        fcntl.flock(looking.fileno(), fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (looking.fileno(), fcntl.LOCK_UN)).start()
        cells = Cells(tmp_path)
    assert sorted(tmp_path.iterdir()) == files
    assert cells.living() == [os.getpid()]


def test_a_line_that_a_killed_worker_had_begun_is_written_over(tmp_path: Path) -> None:
    killed = subprocess.run(
        [
            sys.executable, "-c",
            "import sys; from dlops.serve.cells import Cells; cells = Cells(sys.argv[1])\n"
            "cells.values[cells.index('n')] = 3\n"
            "rest = b'[\"a name that is longer than the next one\", [\"'\n"
            "cells._keys[cells._keys_end : cells._keys_end + len(rest)] = rest",
            str(tmp_path),
        ],
        check=True,
    )  # fmt: skip
    assert killed.returncode == 0
    cells = Cells(tmp_path)
    cells.values[cells.index("m")] = 4
    cells.values[cells.index("n")] += 1
    for reader in (cells, Cells(tmp_path)):
        values = [worker.values for worker in reader.workers() if worker.values]
        assert values == [{("n", ()): [4], ("m", ()): [4]}]


def test_a_histogram_is_cumulative_and_in_seconds() -> None:
    metrics = Metrics(Cells())
    for ms in (0.05, 0.1, 3, 100_000):
        metrics.compute_seconds.observe("digits", value=round(ms * 1e6))
    found = lines(metrics, "dlops_batch_compute_seconds")
    assert found[0] == 'dlops_batch_compute_seconds_bucket{le="0.0001",model="digits"} 2.0'
    assert 'dlops_batch_compute_seconds_bucket{le="0.0025",model="digits"} 2.0' in found
    assert 'dlops_batch_compute_seconds_bucket{le="0.005",model="digits"} 3.0' in found
    assert 'dlops_batch_compute_seconds_bucket{le="60",model="digits"} 3.0' in found
    assert found[-3:-1] == [
        'dlops_batch_compute_seconds_bucket{le="+Inf",model="digits"} 4.0',
        'dlops_batch_compute_seconds_count{model="digits"} 4.0',
    ]  # fmt: skip
    assert float(found[-1].split()[1]) == pytest.approx(100.00315)


def test_statistics_are_summed_over_workers_and_kept_apart_by_version(tmp_path: Path) -> None:
    one, other = (Statistics(Cells(tmp_path), name="m", version="1") for _ in range(2))
    second_version = Statistics(Cells(tmp_path), name="m", version="2")
    for statistics in (one, other, second_version):
        statistics.add_success(rows=3, total_ns=100, queue_ns=50, compute_ns=30, input_ns=5)
        done = BatchDone(rows=3, padded_rows=1, copy_ns=2, compute_ns=30, reason="full", instance=0)
        statistics.add_batch(done)
    one.add_failure(7)
    model = one.as_json()
    assert (model["inference_count"], model["execution_count"]) == (6, 2)
    assert model["inference_stats"]["success"] == {"count": 2, "ns": 200}
    assert model["inference_stats"]["fail"] == {"count": 1, "ns": 7}
    assert model["batch_stats"][0]["compute_infer"] == {"count": 2, "ns": 60}
    assert second_version.as_json()["inference_count"] == 3


def test_labels_that_do_not_fit_are_a_bug() -> None:
    with pytest.raises(ValueError, match="has the labels"):
        Metrics(Cells()).requests.add("/predict")


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    cells.values[cells.index("n")] = 3
    (keys,) = tmp_path.glob("*.keys")
    written = keys.read_bytes().index(b"\0")
    with keys.open("r+b") as file:
        file.seek(written)
        file.write(b'["half", [], 1')
    (worker,) = cells.workers()
    assert worker.values == {("n", ()): [3]}


def test_a_file_that_is_being_made_is_not_read_yet(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    (tmp_path / "1-new.cells").touch()
    assert len(list(cells.workers())) == 1


def test_a_gauge_is_that_of_the_living(other_worker, tmp_path: Path) -> None:
    metrics = Metrics(Cells(tmp_path))
    metrics.ready.set(to=1)
    assert metrics.ready.summed(metrics.cells.workers()) == {(): [2]}
    other_worker.kill()
    other_worker.wait(10)
    assert metrics.ready.summed(metrics.cells.workers()) == {(): [1]}


def test_room_is_taken_at_once_so_that_a_full_disk_ends_nothing_later(tmp_path: Path, monkeypatch) -> None:
    cells = Cells(tmp_path)
    cells.values[cells.index("a", ("b",))] += 1
    for path in tmp_path.iterdir():
        assert path.stat().st_blocks * 512 >= path.stat().st_size > 1_000_000

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match=r"room for the server's counts.*: the disk is full"):
        Cells(tmp_path)
    # What a full disk says later changes nothing any more: nothing is written to a file.
    monkeypatch.setattr(os, "write", full)
    cells.values[cells.index("c")] += 1
    assert next(iter(Cells.workers(cells))).values == {("a", ("b",)): [1], ("c", ()): [1]}
