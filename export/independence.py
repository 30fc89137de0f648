"""Whether each row is answered on its own: a service joins requests, and parity runs in other batches than tracing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dlops.blame import code_line, where
from dlops.checkpoint import example_inputs
from dlops.errors import GateError, UsageError, first_line
from dlops.export.module import eager_outputs, float64_outputs
from dlops.export.parity import parity_batches
from dlops.parity import compare, shortfalls, tolerance_for
from dlops.signature import Array, Feed, Signature
from dlops.tasks import Task

Integers = NDArray[np.int64]

# How many rows are answered in small batches, and beside how many others float64 is asked.
_ROWS, _COMPANY = 16, 64


def check_independent(
    module: nn.Module, feed: Feed, reference: Feed, signature: Signature, *, task: Task, title: str
) -> None:
    """Raise UsageError where the module's answer to a row depends on how many or which others are in its batch.

    feed, reference: evaluation samples and the module's own answers. Where fp32 alone moves, float64 decides: other
    batches are other sums, which an ill-conditioned network rounds otherwise.
    """
    count = len(next(iter(feed.values())))
    for size in parity_batches(signature.max_batch):
        # From the end, so that the largest batch has other rows in it than the reference had; several small batches,
        # as one of them may take the very branch that the reference took.
        rows = (count - 1 - np.arange(size * math.ceil(_ROWS / size))) % count
        try:
            outputs = _in_batches(eager_outputs, module, feed, rows, size, signature)
        except Exception as error:  # modules raise what they like
            raise UsageError(
                f"{title}: the module does not run at batch {size}: {type(error).__name__}: {first_line(error)}",
                hint="a service sends batches of any size up to the largest",
            ) from error
        moved = _moved(outputs, {name: array[rows] for name, array in reference.items()}, task)
        if moved and _is_real(module, feed, rows, size, signature, task):
            raise UsageError(
                f"{title}: the module's answer to a sample depends on the rest of its batch: at batch {size} "
                f"{moved[0]}{_branch(module, signature)}",
                hint="compute each row of a batch on its own (no statistics over the batch, no branch on its size); a "
                "source takes --max-batch 1, for one sample a call",
            )


def _branch(module: nn.Module, signature: Signature) -> str:
    """A clause with the line of a branch on values, which is a usual reason, where torch.export finds one."""
    example = example_inputs(signature, batch=2)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.export.export(module, example)
    except Exception as error:  # noqa: BLE001 - it raises classes of its own for what it cannot capture
        line = code_line(error)
        return f"; torch.export stops too{where(line)}" if line else ""
    return ""


def _moved(outputs: Feed, reference: Feed, task: Task) -> list[str]:
    try:
        errors = compare(reference, outputs, task=task, edge=True)
    except GateError:
        return []  # NaN, say, or nothing detected: parity says so of the file
    return shortfalls(errors, tolerance_for(task.name, "fp32"))


def _in_batches(
    run: Callable[[nn.Module, Feed, Signature], Feed], module: nn.Module, feed: Feed, rows: Integers, size: int,
    signature: Signature,
) -> dict[str, Array]:  # fmt: skip
    """What the module answers to these rows in batches of `size`."""
    parts = [
        run(module, {name: np.asarray(array)[rows[start : start + size]] for name, array in feed.items()}, signature)
        for start in range(0, len(rows), size)
    ]
    return {spec.name: np.concatenate([part[spec.name] for part in parts]) for spec in signature.outputs}


def _is_real(module: nn.Module, feed: Feed, rows: Integers, size: int, signature: Signature, task: Task) -> bool:
    """Whether the same rows move in float64 too; where the module has no such, a detector's boxes of one score change
    places, and the others move by more than rounding."""
    # In float64 a whole set of samples would take long, and these are others than in the batch at hand.
    company = np.unique([*rows, *range(min(_COMPANY, len(next(iter(feed.values())))))])
    try:
        apart = _in_batches(float64_outputs, module, feed, rows, size, signature)
        among = float64_outputs(module, {name: np.asarray(a)[company] for name, a in feed.items()}, signature)
    except Exception:  # noqa: BLE001 - modules raise what they like
        return task.name != "detection"
    narrow = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in apart.items()}
    places = np.searchsorted(company, rows)
    whole = {name: array.astype(narrow[name].dtype)[places] for name, array in among.items()}
    return bool(_moved(narrow, whole, task))
