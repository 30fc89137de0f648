"""How long `dlops --help` takes: it is what a person types first."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

RUNS = 30
LIMIT_S = 0.3


def test_help_answers_in_less_than_a_third_of_a_second(write_page: Callable[..., Path], tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("dlops")), "--help"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)  # bytecode is written on the first run
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    median = statistics.median(seconds)
    write_page(
        "startup",
        title="How long `dlops --help` takes",
        says=f"{RUNS} runs one after another, after one that is not counted. The limit is {LIMIT_S} s.",
        header=["fastest", "median", "slowest"],
        rows=[[f"{seconds[0]:.3f} s", f"{median:.3f} s", f"{seconds[-1]:.3f} s"]],
    )
    assert median < LIMIT_S
