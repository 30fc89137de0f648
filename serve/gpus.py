"""A GPU for each worker process: they take turns over those that there are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from dlops.console import say
from dlops.environment import describe_environment
from dlops.serve.settings import Settings

_VARIABLE = "CUDA_VISIBLE_DEVICES"


def take_own_gpu(worker: int, settings: Settings) -> None:
    """Let this process see no GPU but its own, before anything starts CUDA in it. worker: counted from 1.

    Nothing changes with one worker, or one GPU: several workers on one GPU share it.
    """
    if settings.device == "cpu" or settings.workers < 2:
        return
    chosen = gpu_of(worker, workers=settings.workers, visible=visible_gpus(os.environ))
    if chosen is not None:
        os.environ[_VARIABLE] = chosen
        say(f"worker {worker}: GPU {chosen}")


def gpu_of(worker: int, *, workers: int, visible: Sequence[str]) -> str | None:
    """Which of them is the worker's; None where there is nothing to share out."""
    if workers < 2 or len(visible) < 2:
        return None
    return visible[(worker - 1) % len(visible)]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: numbers, or UUIDs of GPUs and MIG slices; else all by their numbers."""
    named = environment.get(_VARIABLE)
    if named is None:
        return [str(number) for number in range(len(describe_environment().gpus))]
    return [name.strip() for name in named.split(",") if name.strip()]
