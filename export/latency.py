"""The mildest pruning that keeps a latency: by bisection over pruned05 to pruned95, each timed in its own runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dlops.artifact import Variant
from dlops.console import say
from dlops.errors import GateError
from dlops.export.plan import MAX_PRUNED, MIN_PRUNED
from dlops.runtimes.session import Session
from dlops.signature import Feed
from dlops.timing import interleave

# Of each candidate: enough calls of some milliseconds for a median that a disturbance does not move.
TIMED_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """variant: the dense one where it keeps the target, else the one with the least pruned away that does.

    p50_s: by the percentage pruned, 0 for the dense variant: every candidate that was timed.
    """

    variant: Variant
    target_s: float
    p50_s: Mapping[int, float]

    @property
    def percent(self) -> int:
        return round(100 * self.variant.pruned_fraction)


def fit_latency(variant: Variant, *, target_s: float, time_of: Callable[[Variant], float]) -> Fitted:
    """What has to be pruned from the dense `variant` for its p50, as `time_of` measures it, to be at most `target_s`.

    Latency is taken to fall with the MACs: the answer's latency was measured to keep the target, and the next milder
    candidate's that was tried not to. Raises GateError where the strongest pruning does not keep it either.
    """
    found: dict[int, float] = {}

    def keeps(percent: int) -> bool:
        candidate = _pruned(variant, percent)
        found[percent] = time_of(candidate)
        say(f"{candidate.slug}: p50 {found[percent] * 1e3:.3g} ms, the target is {target_s * 1e3:.3g} ms")
        return found[percent] <= target_s

    low, high = round(100 * MIN_PRUNED), round(100 * MAX_PRUNED)
    if keeps(0):
        high = 0
    elif not keeps(high):
        raise GateError(
            f"{variant.slug}: p50 is {found[0] * 1e3:.3g} ms dense and {found[high] * 1e3:.3g} ms with {high} % of the "
            f"MACs removed, above {target_s * 1e3:.3g} ms in either case",
            hint="a higher target, a faster precision (int8), or fewer other programs on this machine",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return Fitted(variant=_pruned(variant, high), target_s=target_s, p50_s=found)


def p50_s(session: Session, feed: Feed, *, budget_s: float) -> float:
    """The median latency of calls with the first sample of `feed`, in seconds."""
    one = {name: array[:1] for name, array in feed.items()}
    timed = interleave({"session": lambda: session.run(one)}, budget_s=budget_s)
    return float(np.median(timed.runs["session"].latencies_ns)) / 1e9


def _pruned(variant: Variant, percent: int) -> Variant:
    return variant.model_copy(update={"sparsity": f"pruned{percent:02d}" if percent else None})
