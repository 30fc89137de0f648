"""Parity of one variant: real evaluation samples, the production runtime, every batch size that could go wrong."""

from __future__ import annotations

import numpy as np

from dlops.artifact import Parity
from dlops.parity import check_parity, tolerance_for, tolerance_on
from dlops.runtimes.session import Session
from dlops.signature import Feed
from dlops.tasks import Task

# Batch 1 over thousands of samples shows no more than over these.
_SMALL_BATCH_SAMPLES = 64
_LARGE_BATCH_SAMPLES = 512
_ODD = 7


def parity_batches(largest: int) -> tuple[int, ...]:
    """1, 2, an odd one and the largest: exporters bake in sizes, and kernels differ by what divides a batch."""
    odd = next((size for size in (_ODD, 3) if size < largest), 1)
    return tuple(sorted({1, min(2, largest), odd, largest}))


def check_variant(session: Session, feed: Feed, reference: Feed, *, task: Task, precision: str, title: str) -> Parity:
    """The worst errors of the session against the eager reference over `parity_batches`.

    feed, reference: all evaluation samples and the eager fp32 outputs of the same structure. Fewer samples than the
    largest batch are repeated to fill it. Raises GateError where the tolerance of the precision is not kept.
    """
    *small, largest = parity_batches(session.signature.max_batch)
    tolerance = tolerance_on(session.placement, precision, tolerance_for(task.name, precision), task=task.name)
    count = len(next(iter(feed.values())))
    few = np.unique(np.linspace(0, count - 1, min(count, _SMALL_BATCH_SAMPLES)).round().astype(np.int64))
    many = np.arange(max(min(count, _LARGE_BATCH_SAMPLES), largest)) % count
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
        }
    )
