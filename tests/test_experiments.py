"""The experiments and the tests for GPUs run apart from the suite: here only that all of them can be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_experiment_can_be_collected() -> None:
    command = [
        sys.executable, "-m", "pytest", "tests/benchmarks", "-o", "norecursedirs=.*", "--collect-only", "-q",
        "-p", "no:cacheprovider",
    ]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr
    for one in ("test_gpu_report", "test_compare_processes", "test_resnets", "test_coverage"):
        assert f"{one}.py::" in found.stdout
