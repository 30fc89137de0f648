"""What other ways to widen the interval of a run for slow spells hold, and what they cost where there are none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlops.bench import stats
from dlops.bench.ratios import student_t
from tests.benchmarks.test_coverage import ERROR, RUNS, SPELLS, follows

TURNS = (12, 40, 100, 300)
HalfWidth = Callable[[np.ndarray], float]


def as_it_is(deviations: np.ndarray) -> float:
    """From turns of one second each: half the interval of throughput, as `dlops bench` has it."""
    interval = stats.rate_interval(100 + deviations, np.ones(len(deviations)))
    return float(interval.high - interval.value) * len(deviations)


def of_few(blocks: int) -> HalfWidth:
    """Of so many blocks of equal length, as if each stood alone: Ibragimov and Müller 2010."""

    def half_width(deviations: np.ndarray) -> float:
        sums = np.add.reduceat(deviations, np.arange(blocks) * len(deviations) // blocks)
        return student_t(0.95, blocks - 1) * math.sqrt(blocks / (blocks - 1) * float(np.sum(sums**2)))

    return half_width


WAYS: dict[str, HalfWidth] = {
    "as it is": as_it_is,
    "8 blocks": of_few(8),
    "5 blocks": of_few(5),
    "the wider of 5 blocks and as it is": lambda deviations: max(of_few(5)(deviations), as_it_is(deviations)),
}


def test_no_other_choice_of_blocks_holds_in_runs_of_few_spells(write_page: Callable[..., Path]) -> None:
    rows, holds = [], {}
    for turns in TURNS:
        for said, correlation in SPELLS.items():
            draw = np.random.default_rng(turns)
            # Half of the variance of a turn is a spell's.
            runs = follows(draw, RUNS, turns, correlation) + draw.standard_normal((RUNS, turns))
            widths = {way: np.array([found(run - run.mean()) for run in runs]) for way, found in WAYS.items()}
            sums = np.abs(runs.sum(axis=1))
            cells = []
            for way, width in widths.items():
                holds[way, said, turns] = float(np.mean(sums <= width))
                wider = np.quantile(width / widths["as it is"], [0.5, 0.9])
                cells.append(f"{holds[way, said, turns]:.1%}, {wider[0]:.2f}×, {wider[1]:.2f}×")
            rows.append([said, str(turns), *cells])
    write_page(
        "coverage-blocks",
        title="Other ways to widen an interval for slow spells",
        says=SAYS,
        header=["spells that turns share", "turns", *WAYS],
        rows=rows,
    )
    for turns in TURNS:
        assert holds["as it is", "none", turns] >= 0.95 - ERROR
    for way in WAYS:
        # What `docs/decisions/012` rests on: none of them holds where 40 turns are four spells.
        assert holds[way, "ρ = 0.8", 40] < 0.95 - ERROR, way


SAYS = (
    f"{RUNS:,} simulated runs a line of which half the variance of a turn is that of a spell, as in "
    "[how often the intervals hold](coverage.md). In each cell: how often the 95 % interval of the mean holds, and how "
    "many times as wide it is as the one that `dlops bench` gives, at the median and at the 90th percentile of runs. "
    "What follows from it is in [a decision](../decisions/012-intervals-and-slow-spells.md)."
)
