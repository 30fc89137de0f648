"""The learning rate at a step, as a pure function: there is nothing to save and restore."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """The factor on the learning rate at `step` of `steps`: up linearly, then down by half a cosine to `final`.

    Goyal et al. 2017 (warm-up), Loshchilov and Hutter 2017 (cosine).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
