"""Triton's perf_analyzer, as NVIDIA built it, drives our service as it drives a tritonserver."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.peers.environments import environment, is_made
from tests.conformance.servers import Server

from .test_conformance import server

__all__ = ["server"]


@pytest.fixture(scope="module")
def command() -> tuple[list[str], dict[str, str]]:
    """The program, and the environment in which it finds its libraries."""
    if not is_made("perf_analyzer"):
        pytest.skip("perf_analyzer is not installed: python tests/benchmarks/peers/environments.py")
    folder = environment("perf_analyzer")
    program = folder / "bin" / "perf_analyzer"
    (cuda,) = folder.glob("lib/python3*/site-packages/nvidia/cuda_runtime/lib")
    env = os.environ | {"LD_LIBRARY_PATH": str(cuda)}
    tried = subprocess.run([str(program), "--version"], env=env, capture_output=True, text=True, check=False)
    if tried.returncode == 127 and "libb64" in tried.stderr:
        pytest.skip("perf_analyzer needs a library of the system: apt-get install libb64-0d")
    assert tried.returncode == 0, tried.stderr
    return [str(program)], env


MODES = {
    "REST": ["-i", "http", "--concurrency-range", "2:2"],
    "REST, asynchronous, batches": ["-i", "http", "-a", "-b", "4", "--concurrency-range", "1:2"],
    "REST, JSON": ["-i", "http", "--input-tensor-format", "json", "--output-tensor-format", "json"],
    "REST, a rate": ["-i", "http", "--request-rate-range", "50:50"],
    "gRPC": ["-i", "grpc", "--concurrency-range", "2:2"],
    "gRPC, streams": ["-i", "grpc", "-a", "--streaming", "--concurrency-range", "2:2"],
}
# So many requests whatever they take, and no demand that windows agree: what it finds is not the point.
LENIENT = [
    "--measurement-mode", "count_windows", "--measurement-request-count", "50", "--stability-percentage", "999",
    "--max-trials", "50",
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_it_measures_us_as_it_measures_triton(
    mode: str, server: Server, command: tuple[list[str], dict[str, str]], tmp_path: Path
) -> None:
    program, env = command
    options = MODES[mode]
    where = server.http if "http" in options else server.grpc
    done = subprocess.run(
        [*program, "-m", "digits", "-u", where, "--shape", "image:1,8,8", *options, *LENIENT,
         "-f", str(tmp_path / "found.csv")],
        env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "found.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (2 if "1:2" in options else 1)
    for row in rows:
        assert float(row["Inferences/Second"]) > 0
        # What the server says of itself: all of it, or perf_analyzer leaves the columns empty or at nothing.
        assert float(row["Server Compute Infer"]) > 0
        assert float(row["Server Queue"]) + float(row["Server Compute Infer"]) < float(row["p99 latency"])
