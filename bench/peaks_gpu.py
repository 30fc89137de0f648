"""The most that an NVIDIA GPU does, by torch: FLOP/s of matrix products, and bytes a second of a copy.

Written against torch's documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dlops.report import GpuPeak

_MATRIX, _COPY_BYTES = 8192, 1 << 30
_CALLS, _ROUNDS = 10, 10


def gpu_peaks(*, matrix: int = _MATRIX, copy_bytes: int = _COPY_BYTES) -> list[GpuPeak]:
    """Of every GPU that torch sees. Raises ImportError without torch, RuntimeError where it cannot use a GPU.

    matrix: rows of the square matrices. copy_bytes: copied within a GPU's memory.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch cannot use CUDA here")
    return [_of(number, matrix, copy_bytes) for number in range(torch.cuda.device_count())]


def _of(number: int, matrix: int, copy_bytes: int) -> GpuPeak:
    import torch

    kinds = (
        ("fp32", torch.float32, "highest"), ("tf32", torch.float32, "high"), ("fp16", torch.float16, "highest"),
    )  # fmt: skip
    flops = {}
    with torch.cuda.device(number):
        for name, kind, precision in kinds:
            # "high" lets products of float32 run in TF32, "highest" does not.
            torch.set_float32_matmul_precision(precision)
            one, two = (torch.randn(matrix, matrix, device="cuda", dtype=kind) for _ in range(2))
            flops[name] = 2.0 * matrix**3 / _best_s(_product(one, two, torch.empty_like(one)))
        source = torch.zeros(copy_bytes, dtype=torch.uint8, device="cuda")
        copied = 2 * copy_bytes / _best_s(_copy(source, torch.empty_like(source)))
        return GpuPeak(name=torch.cuda.get_device_name(number), flops=flops, bytes_per_s=copied)


def _product(one: Any, two: Any, out: Any) -> Callable[[], object]:
    import torch

    return lambda: torch.mm(one, two, out=out)


def _copy(source: Any, target: Any) -> Callable[[], object]:
    return lambda: target.copy_(source)


def _best_s(call: Callable[[], object]) -> float:
    """Seconds of one call, by the GPU's own clock, in the best of several rounds; a first one warms up."""
    import torch

    taken = []
    for _ in range(_ROUNDS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _call in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        taken.append(float(start.elapsed_time(end)) / 1e3 / _CALLS)
    return min(taken[1:])
