"""Whether a variant is faster or smaller than what it was made of, on this machine; and where it is not, why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import nn

from dlops.artifact import Artifact, Variant, Verdict, Worth
from dlops.export.slowness import Side, operators_of, reasons
from dlops.runtimes import Session, SessionOptions, open_session
from dlops.signature import Feed
from dlops.timing import MIN_ROUNDS, interleave

# For parent and variant together; six rounds of turns at least.
BUDGET_S = 1.0
_TURN_S = 0.03
_WARMUP_S = 0.2
# Metadata make files of the same weights differ by some hundred bytes, which is no saving.
_SMALLER = 1.02
# What cannot be more than this much faster is not worth a second variant.
_FASTER = 1.05


def parent_of(variant: Variant) -> Variant | None:
    """What it is to be better than: of a pruned one the same dense, else fp32 of its format; fp32 itself has none."""
    if variant.sparsity is not None:
        return variant.model_copy(update={"sparsity": None})
    return None if variant.precision == "fp32" else variant.model_copy(update={"precision": "fp32"})


def weigh(artifact: Artifact, parent: Artifact, feed: Feed, *, widths: Sequence[int], options: SessionOptions) -> Worth:
    """Time both in turns on one sample, compare their sizes, and look for the reason where the variant is not faster.

    feed: real inputs, of which the first is taken. widths: of the layers that pruning narrowed. Raises DlopsError
    where one of the two does not run.
    """
    one = {name: array[:1] for name, array in feed.items()}
    sessions: dict[str, Session] = {}
    try:
        for side in (artifact, parent):
            sessions[side.slug] = open_session(side, options)
        timed = interleave(
            {slug: partial(session.run, one) for slug, session in sessions.items()},
            budget_s=BUDGET_S, min_samples=1, turn_s=_TURN_S, max_warmup_s=_WARMUP_S,
        )  # fmt: skip
        placements = {slug: session.placement for slug, session in sessions.items()}
    finally:
        for session in sessions.values():
            session.close()
    mine, others = timed.runs[artifact.slug], timed.runs[parent.slug]
    ratios = [float(np.median(b)) / float(np.median(a)) for a, b in zip(mine.by_turn(), others.by_turn(), strict=True)]
    speed, low, high = median_interval(ratios)
    size = parent.model_bytes / artifact.model_bytes
    why: tuple[str, ...] = ()
    if low <= 1 and speed < _FASTER:
        subject, reference = (
            Side(
                variant=one_of.variant, placement=placements[one_of.slug],
                latency_ns=float(np.median(timed.runs[one_of.slug].latencies_ns)),
                operators=operators_of(one_of, one, options),
            )
            for one_of in (artifact, parent)
        )  # fmt: skip
        why = reasons(subject, reference, widths=widths, repair=artifact.repair)
    return Worth(
        parent=parent.slug, batch=1, speed=speed, speed_low=low, speed_high=high, size=size,
        verdict=verdict_on(low, high, size=size), reason="; ".join(why) or None,
    )  # fmt: skip


def verdict_on(low: float, high: float, *, size: float) -> Verdict:
    """By the interval of the speed, and the size, each the parent's over the variant's."""
    if low > 1:
        return "both" if size >= _SMALLER else "faster"
    if size >= _SMALLER:
        return "smaller"
    return "neither" if high < _FASTER else "unsure"


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval by order statistics, which asks nothing of the distribution; six at least.

    The widest interval that there is, smallest to largest, covers less than 95 % of fewer. Raises ValueError then.
    """
    n = len(values)
    if n < MIN_ROUNDS:
        raise ValueError(f"{n} values: {MIN_ROUNDS} are the fewest with a 95 % interval of their median")
    ordered = sorted(values)
    below, chance = 0, 0.5**n
    # As many values may lie outside on each side as keep 97.5 % of the distribution's halves within.
    while chance + math.comb(n, below + 1) * 0.5**n <= 0.025:
        below += 1
        chance += math.comb(n, below) * 0.5**n
    return float(np.median(ordered)), ordered[below], ordered[n - 1 - below]


def narrowed_widths(module: nn.Module, dense: nn.Module) -> list[int]:
    """The output widths of the layers of `module` that are not as wide as those of the same name in `dense`."""
    before = {name: _width(layer) for name, layer in dense.named_modules()}
    widths = ((_width(layer), before.get(name)) for name, layer in module.named_modules())
    return [now for now, then in widths if now is not None and now != then]


def _width(layer: nn.Module) -> int | None:
    width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    return width if isinstance(width, int) else None


def worth_text(worth: Worth) -> str:
    """The finding in one line, for a person."""
    ratio = f"{worth.speed:.2f} × as fast as {worth.parent} ({worth.speed_low:.2f} to {worth.speed_high:.2f})"
    size = f"{worth.size:.2f} × smaller" if worth.size >= _SMALLER else "no smaller"
    mark = "NOT WORTH IT here: " if worth.verdict == "neither" else ""
    if worth.speed_low <= 1 and worth.speed_high >= _FASTER:
        ratio += ": too unsteady to say whether it is faster,"
    return f"{mark}{ratio} at batch {worth.batch}, {size}{f'; {worth.reason}' if worth.reason else ''}"
