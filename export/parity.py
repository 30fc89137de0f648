"""Parity of one variant: real evaluation samples, the production runtime, every batch size that could go wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dlops.artifact import OwnError, Parity
from dlops.errors import GateError, first_line
from dlops.export.face import Face
from dlops.export.module import float64_outputs
from dlops.export.structures import Structure
from dlops.parity import check_parity, compare, tolerance_for, tolerance_on
from dlops.runtimes.session import Session
from dlops.signature import Feed, Signature
from dlops.tasks import Task

# Batch 1 over thousands of samples shows no more than over these.
_SMALL_BATCH_SAMPLES = 64
_LARGE_BATCH_SAMPLES = 512
_ODD = 7


def parity_batches(largest: int) -> tuple[int, ...]:
    """1, 2, an odd one and the largest: exporters bake in sizes, and kernels differ by what divides a batch."""
    odd = next((size for size in (_ODD, 3) if size < largest), 1)
    return tuple(sorted({1, min(2, largest), odd, largest}))


def check_variant(
    session: Session, feed: Feed, reference: Feed, *, task: Task, precision: str, title: str,
    own: OwnError | None = None,
) -> Parity:  # fmt: skip
    """The worst errors of the session against the eager reference over `parity_batches`.

    feed, reference: all evaluation samples and the eager fp32 outputs of the same structure. Fewer samples than the
    largest batch are repeated to fill it. own: the module's own error, which the tolerance makes room for. Raises
    LossError where the tolerance is not kept, GateError where nothing can be compared.
    """
    *small, largest = parity_batches(session.signature.max_batch)
    demanded = tolerance_for(task.name, precision, own=own)
    tolerance = tolerance_on(session.placement, precision, demanded, task=task.name)
    count = len(next(iter(feed.values())))
    few, many = _rows(count, largest)
    found = [
        check_parity(
            session, {n: a[chosen] for n, a in feed.items()}, {n: a[chosen] for n, a in reference.items()},
            task=task, tolerance=tolerance, batches=batches, title=title,
        )
        for chosen, batches in ((few, small), (many, [largest]))
        if batches
    ]  # fmt: skip
    sqnrs = [parity.sqnr_db for parity in found if parity.sqnr_db is not None]
    return found[-1].model_copy(
        update={
            "batches": (*small, largest),
            "samples": min(count, max(parity.samples for parity in found)),
            "max_abs": max(parity.max_abs for parity in found),
            "max_rel": max(parity.max_rel for parity in found),
            "sqnr_db": min(sqnrs, default=None),
            "agreement": min(parity.agreement for parity in found),
            "own_error": own,
        }
    )


def measure_own_error(structure: Structure, plain: Feed, face: Face, signature: Signature, *, task: Task) -> OwnError:
    """How far eager fp32 is from the same module in float64, on the samples of `check_variant`, as it measures.

    plain, signature: the evaluation samples and the tensors of the module itself. Raises GateError, with the reason,
    where it does not compute in float64 or gives what cannot be compared.
    """
    count = len(next(iter(plain.values())))
    rows = np.unique(np.concatenate(_rows(count, signature.max_batch)))
    eager = {name: array[rows] for name, array in structure.reference.items()}
    try:
        wide = float64_outputs(structure.module, {name: array[rows] for name, array in plain.items()}, signature)
    except Exception as error:  # modules raise what they like
        raise GateError(f"it does not run in float64: {first_line(error)}") from error
    # To the dtypes that are compared: that rounds once, by less than any bound would tell.
    exact = {name: array.astype(eager[name].dtype) for name, array in wide.items()}
    errors = compare(face.reference(exact), face.reference(eager), task=task, where="in float64")
    return OwnError(samples=errors.samples, max_abs=errors.max_abs, max_rel=errors.max_rel)


def _rows(count: int, largest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of `count` samples go through the small batches, and which through the largest."""
    few = np.unique(np.linspace(0, count - 1, min(count, _SMALL_BATCH_SAMPLES)).round().astype(np.int64))
    return few, np.arange(max(min(count, _LARGE_BATCH_SAMPLES), largest)) % count
