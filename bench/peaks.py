"""The most that this machine does, measured: FLOP/s of a matrix product, and bytes a second of a large copy.

A library of numerical routines reads its number of threads when it is loaded, so every number has a process of its own:
`python -m dlops.bench.peaks cpu THREADS` or `gpu`, which prints the record as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlops.environment import describe_environment
from dlops.report import CpuPeak, GpuPeak, Peaks

# Each part for so long, and so often at least.
_PART_S = 1.0
_FEWEST = 5
_LIMIT_S = 120.0
# A product has to last this long for its start and end not to count.
_CALL_S = 0.03
_LARGEST = 8192
# So many times the last cache, and no less, so that the copy goes to memory.
_CACHES, _LEAST_BYTES = 4, 64 << 20
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def measure_peaks(*, part_s: float = _PART_S) -> Peaks:
    """Of the processor with 1, 2, 4, ... and all threads, and of every NVIDIA GPU that torch can use.

    part_s: for each product and each copy. What could not be measured is in `absent` with the reason.
    """
    where = describe_environment()
    absent: dict[str, str] = {}
    cpu = []
    for threads in thread_counts(where.cores):
        environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(threads))
        said, failed = _ask(["cpu", str(threads), str(part_s)], environment)
        if failed:
            absent[f"{threads} threads"] = failed
        else:
            cpu.append(CpuPeak.model_validate_json(said))
    gpus: tuple[GpuPeak, ...] = ()
    if not where.gpus:
        absent["GPU"] = "there is no NVIDIA GPU"
    else:
        said, failed = _ask(["gpu"], dict(os.environ))
        if failed:
            absent["GPU"] = failed
        else:
            gpus = tuple(GpuPeak.model_validate(one) for one in json.loads(said))
    return Peaks(cpu=tuple(cpu), gpus=gpus, absent=absent)


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and the cores."""
    return sorted({cores, *(2**power for power in range(cores.bit_length()) if 2**power <= cores)})


def cpu_peak(threads: int, *, part_s: float) -> CpuPeak:
    """With a library that was loaded with as many threads."""
    size = 512
    while size < _LARGEST and min(_times(_product(size), part_s=0.0)) < _CALL_S:
        size *= 2
    products = _times(_product(size), part_s=part_s)
    rates = [2.0 * size**3 / taken for taken in products]
    copied, copies = _copies(threads, part_s)
    return CpuPeak(
        threads=threads, matrix=size, flops=max(rates), flops_median=float(np.median(rates)),
        copy_bytes=copied, bytes_per_s=2 * copied / min(copies),
        bytes_per_s_median=2 * copied / float(np.median(copies)),
    )  # fmt: skip


def _product(size: int) -> Callable[[], object]:
    draw = np.random.default_rng(0)
    one, two = (draw.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    result = np.empty_like(one)
    return lambda: np.matmul(one, two, out=result)


def copy_size(cache_bytes: int, memory_bytes: int) -> int:
    """Bytes to copy: far more than the caches hold, and two such arrays at most a quarter of the memory."""
    return max(1 << 20, min(max(_LEAST_BYTES, _CACHES * cache_bytes), memory_bytes // 8))


def _copies(threads: int, part_s: float) -> tuple[int, list[float]]:
    """How many bytes were copied at once, shared out to the threads, and how long that took each time, in seconds."""
    size = copy_size(_last_cache_bytes(), describe_environment().memory_bytes) // threads
    arrays = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(threads)]
    barrier = threading.Barrier(threads + 1)
    running = True

    def copy(source: np.ndarray, target: np.ndarray) -> None:
        while True:
            barrier.wait()
            if not running:
                return
            # numpy releases the interpreter's lock meanwhile.
            np.copyto(target, source)
            barrier.wait()

    workers = [threading.Thread(target=copy, args=pair, daemon=True) for pair in arrays]
    for worker in workers:
        worker.start()

    def one_round() -> None:
        barrier.wait()
        barrier.wait()

    taken = _times(one_round, part_s=part_s)
    running = False
    barrier.wait()
    for worker in workers:
        worker.join()
    return size * threads, taken


def _times(call: Callable[[], object], *, part_s: float) -> list[float]:
    """Seconds of each call, the first of which is not kept: it starts threads and touches memory."""
    call()
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < _FEWEST or time.perf_counter() - began < part_s:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _last_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """0 where the machine does not tell."""
    sizes = [0]
    for path in folder.glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes)


def _ask(order: list[str], environment: dict[str, str]) -> tuple[str, str | None]:
    """What a process of its own printed, and why not where it failed."""
    command = [sys.executable, "-P", "-m", "dlops.bench.peaks", *order]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        return "", f"it took over {_LIMIT_S:.0f} s"
    if done.returncode:
        return "", (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:300]
    return done.stdout, None


def main(order: list[str]) -> None:
    if order[0] == "cpu":
        print(cpu_peak(int(order[1]), part_s=float(order[2])).model_dump_json())
        return
    from dlops.bench.peaks_gpu import gpu_peaks

    try:
        print(json.dumps([one.model_dump() for one in gpu_peaks()]))
    except (ImportError, RuntimeError) as error:
        sys.exit(str(error).splitlines()[0])


if __name__ == "__main__":
    main(sys.argv[1:])
