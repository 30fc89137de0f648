"""Where a recipe runs: Lightning Fabric for devices, mixed precision and several processes."""

from __future__ import annotations

import math
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import util
from multiprocessing.queues import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from dlops.errors import DlopsError, MachineError, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Accelerator = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]
# Fabric's words. bf16 is mixed: weights and updates stay fp32.
_PRECISIONS: dict[Precision, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def make_fabric(*, accelerator: Accelerator, devices: int, precision: Precision) -> Fabric:
    """Fabric on `devices` devices, one process each. Raises MachineError where the machine has not got them."""
    # Here and not on top: a mistake in a config should be told in a second.
    from lightning_fabric import Fabric

    chosen = _accelerator() if accelerator == "auto" else accelerator
    present = {"cpu": devices, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[chosen]
    if devices > present:
        raise MachineError(
            f"{devices} {chosen} devices asked for, {present} present", hint="--set accelerator=cpu trains anywhere"
        )
    return Fabric(
        accelerator=chosen,
        devices=devices,
        # Spawned, not re-run from the command line: a second process must not parse arguments or name a run again.
        strategy="auto" if devices == 1 else "ddp_spawn",
        precision=_PRECISIONS[precision],
    )


def launch(fabric: Fabric, fit: Callable[..., None], *arguments: Any) -> None:
    """`fit(fabric, *arguments)` in every process. A DlopsError in any of them is raised here as itself."""
    if fabric.world_size == 1:
        fabric.launch(fit, *arguments)
        return
    errors: SimpleQueue[DlopsError] = multiprocessing.get_context("spawn").SimpleQueue()
    # Bound here: what is passed as an argument, Fabric takes apart in search of modules, and frozen types refuse that.
    work = partial(_reporting, fit=fit, arguments=arguments, errors=errors)
    before = multiprocessing.active_children()
    try:
        with _deaf_children():
            fabric.launch(work)
    except (ProcessRaisedException, ProcessExitedException) as error:
        if not errors.empty():
            raise errors.get() from None
        if isinstance(error, ProcessExitedException):
            raise MachineError(
                f"training process {error.error_index} ended unexpectedly ({error})",
                hint="the system may have been out of memory; --resume goes on from the last whole epoch",
            ) from None
        raise
    finally:
        # After a signal to this process alone they would train on, and this one wait for them, its lock given up.
        for process in multiprocessing.active_children():
            if process in before:
                continue  # somebody else's
            process.kill()
            process.join()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are spawned within never hear of Ctrl-C, which a terminal sends to all of them at once.

    This process hears of it and ends them; interrupted themselves, they would show a traceback each, of whatever they
    were importing.
    """
    spawn = util.spawnv_passfds

    def spawn_deaf(path: Any, args: Any, passfds: Any) -> int:
        # A mask is handed on to what is started; a signal that comes meanwhile is not lost, but waits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return spawn(path, args, passfds)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    util.spawnv_passfds = spawn_deaf
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def _reporting(
    fabric: Fabric, *, fit: Callable[..., None], arguments: tuple[Any, ...], errors: SimpleQueue[DlopsError]
) -> None:
    try:
        fit(fabric, *arguments)
    except DlopsError as error:
        errors.put(error)
        raise
    # A process that exits with its group open can be aborted by gloo's threads ("terminate called without an active
    # exception"), and one that leaves early takes the group from under the others.
    fabric.barrier()
    torch.distributed.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check_finite(fabric: Fabric, loss: torch.Tensor, *, epoch: int, lr: float) -> float:
    """`loss` averaged over the processes. Raises UsageError in all of them where it is no longer a number."""
    mean = fabric.all_reduce(loss.detach().clone(), reduce_op="mean")
    assert isinstance(mean, torch.Tensor)
    value = float(mean)
    if not math.isfinite(value):
        raise UsageError(
            f"training diverged: the loss is {value} in epoch {epoch}, with the learning rate at {lr:g}",
            hint="lower lr, raise warmup_epochs, or set max_grad_norm",
        )
    return value


def _accelerator() -> Literal["cpu", "cuda", "mps"]:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
