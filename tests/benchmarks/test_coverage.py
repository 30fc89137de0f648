"""How often the intervals of p50, p90 and p99, of throughput and of speed-ups hold, on distributions that are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from dlops.bench import stats
from tests.benchmarks.coverage_plot import Dot, plot

RUNS = 2000
SIZES = (400, 1_000, 5_000, 50_000)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# Three standard errors of a share near 5 %.
ERROR = 3 * math.sqrt(0.05 * 0.95 / RUNS)
# Numbers drawn at once.
_CHUNK = 2_000_000

Array = np.ndarray
Draw = Callable[[np.random.Generator, int, int], Array]


def follows(draw: np.random.Generator, runs: int, n: int, correlation: float) -> Array:
    """Standard normals, each correlated with the one before it: (runs, n)."""
    steps = draw.standard_normal((n, runs))
    steps[1:] *= math.sqrt(1 - correlation**2)
    for i in range(1, n):
        steps[i] += correlation * steps[i - 1]
    return steps.T


def lognormal(normals: Array) -> Array:
    return np.exp(0.3 * normals)


def independent(draw: np.random.Generator, runs: int, n: int) -> Array:
    return lognormal(draw.standard_normal((runs, n)))


def bimodal(draw: np.random.Generator, runs: int, n: int) -> Array:
    """Nine calls of ten about 1, one about 3: the 90th percentile lies in the gap between."""
    slow = draw.random((runs, n)) < 0.1
    return np.exp(0.1 * draw.standard_normal((runs, n)) + slow * math.log(3))


def along_the_run(correlation: float) -> Draw:
    return lambda draw, runs, n: lognormal(follows(draw, runs, n, correlation))


def turns_of(n: int) -> int:
    """The more calls, the more turns, as in a longer run: ten calls a turn, up to 300 turns."""
    return min(300, n // 10)


def by_turn(correlation: float, turns: Callable[[int], int]) -> Draw:
    """A fifth of the variance is the turn's own, which follows that of the turn before."""

    def drawn(draw: np.random.Generator, runs: int, n: int) -> Array:
        count = turns(n)
        spells = follows(draw, runs, count, correlation)[:, np.arange(n) * count // n]
        return lognormal(math.sqrt(0.2) * spells + math.sqrt(0.8) * draw.standard_normal((runs, n)))

    return drawn


def lognormal_quantile(q: float) -> float:
    return math.exp(0.3 * NormalDist().inv_cdf(q))


def bimodal_quantile(q: float) -> float:
    low, high = 0.1, 10.0
    for _ in range(80):
        middle = math.sqrt(low * high)
        share = 0.9 * NormalDist().cdf(math.log(middle) / 0.1) + 0.1 * NormalDist().cdf(math.log(middle / 3) / 0.1)
        low, high = (middle, high) if share < q else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class Case:
    """turns: how many a run of n calls is cut into. exempt: sizes at which what is known of it cannot be had."""

    draw: Draw
    turns: Callable[[int], int]
    truth: Callable[[float], float] = lognormal_quantile
    exempt: tuple[int, ...] = ()


CASES = {
    "independent, lognormal, 40 turns": Case(independent, lambda n: 40),
    "independent, bimodal 90/10, 40 turns": Case(bimodal, lambda n: 40, bimodal_quantile),
    "turns that differ, 40 turns": Case(by_turn(0.0, lambda n: 40), lambda n: 40),
    "calls follow one another, ρ = 0.5, 30 stretches": Case(along_the_run(0.5), lambda n: 30),
    "calls follow one another, ρ = 0.9, 30 stretches": Case(along_the_run(0.9), lambda n: 30),
    "calls follow one another, ρ = 0.99, 30 stretches": Case(along_the_run(0.99), lambda n: 30),
    # A spell resembles itself over nine turns: 40 turns are four of them.
    "turns follow one another, ρ = 0.8, up to 300 turns": Case(by_turn(0.8, turns_of), turns_of, exempt=(400, 1_000)),
}


@dataclass(frozen=True, slots=True)
class Kept:
    """Of RUNS: how many gave an interval, and how many of these hold the truth."""

    given: int
    right: int

    @property
    def wrong(self) -> float:
        """The share of all runs that gave an interval without the truth in it."""
        return (self.given - self.right) / RUNS

    @property
    def coverage(self) -> float:
        return self.right / self.given if self.given else math.nan

    def __str__(self) -> str:
        if self.given < RUNS / 100:
            return f"– in {1 - self.given / RUNS:.0%}; wrong {self.wrong:.1%}"
        given = "" if self.given == RUNS else f" of the {self.given / RUNS:.0%} given; wrong {self.wrong:.1%}"
        return f"{self.coverage:.1%}{given}"


def simulated(case: Case, n: int) -> dict[str, Kept]:
    draw = np.random.default_rng(n)
    count = case.turns(n)
    turns = np.arange(n) * count // n
    given, right = dict.fromkeys(QUANTILES, 0), dict.fromkeys(QUANTILES, 0)
    for run in _runs(case.draw, draw, n):
        for name, q in QUANTILES.items():
            interval = stats.quantile_interval(run, q, turns=turns)
            if interval is not None:
                given[name] += 1
                right[name] += interval.low <= case.truth(q) <= interval.high
    return {name: Kept(given[name], right[name]) for name in QUANTILES}


def _runs(drawn: Draw, draw: np.random.Generator, n: int) -> Iterator[Array]:
    left = RUNS
    while left:
        runs = min(left, max(1, _CHUNK // n))
        left -= runs
        yield from drawn(draw, runs, n)


# Turns over which a spell of the machine resembles itself: none, three, nine.
SPELLS = {"none": 0.0, "ρ = 0.5": 0.5, "ρ = 0.8": 0.8}
TURNS = (6, 12, 40, 100, 300)


def throughput_coverage(correlation: float, turns: int) -> float:
    """Of calls counted in turns of equal length, half of their variance a spell's."""
    draw = np.random.default_rng(turns)
    counts = 100 + 5 * follows(draw, RUNS, turns, correlation) + 5 * draw.standard_normal((RUNS, turns))
    intervals = [stats.rate_interval(run, np.full(turns, 0.05)) for run in counts]
    return float(np.mean([one.low <= 2000 <= one.high for one in intervals]))


def speedup_coverage(correlation: float, turns: int) -> float:
    """Of ratios of pairs, half of whose variance is a spell's that did not cancel out."""
    draw = np.random.default_rng(turns)
    logs = 0.05 * (follows(draw, RUNS, turns, correlation) + draw.standard_normal((RUNS, turns)))
    base = [np.array([1e6])] * turns
    intervals = [stats.ratio_interval(list(run[:, None]), base) for run in 1e6 * np.exp(logs)]
    return float(np.mean([one.low <= 1 <= one.high for one in intervals]))


# How processes of one artifact differ, and how many there are: by nothing, or by a normal factor of so much.
DIFFER = {"nothing": 0.0, "2 %": 0.02, "10 %": 0.1}
PROCESSES = (6, 8, 16)
_CALLS_EACH = 500
# Of the logarithm of a call, and of a process of heavy tails.
_CALL_SPREAD, _HEAVY_SPREAD, _HEAVY_DEGREES = 0.3, 0.02, 3


def processes_coverage(spread: float, count: int) -> dict[str, Kept]:
    """Of every quantile over so many processes, each with a pace of its own."""
    draw = np.random.default_rng(count)
    whole = math.hypot(_CALL_SPREAD, spread)
    truths = {name: 1e6 * math.exp(whole * NormalDist().inv_cdf(q)) for name, q in QUANTILES.items()}
    return _over_processes(lambda: spread * draw.standard_normal(count), truths, draw)


def heavy_coverage(count: int) -> Kept:
    """Of the median over processes of which now and then one is far off: Student's t of three degrees."""
    draw = np.random.default_rng(count)
    found = _over_processes(lambda: _HEAVY_SPREAD * draw.standard_t(_HEAVY_DEGREES, count), {"p50": 1e6}, draw)
    return found["p50"]


def _over_processes(paces: Callable[[], Array], truths: dict[str, float], draw: np.random.Generator) -> dict[str, Kept]:
    given, right = dict.fromkeys(truths, 0), dict.fromkeys(truths, 0)
    for _ in range(RUNS):
        pace = paces()
        logs = pace[:, None] + _CALL_SPREAD * draw.standard_normal((len(pace), _CALLS_EACH))
        processes = np.repeat(np.arange(len(pace)), _CALLS_EACH)
        latency = stats.summarize((1e6 * np.exp(logs)).astype(np.int64).ravel(), turns=processes, apart=True)
        for name, truth in truths.items():
            interval = getattr(latency, f"{name}_ns")
            if interval is not None:
                given[name] += 1
                right[name] += interval.low <= truth <= interval.high
    return {name: Kept(given[name], right[name]) for name in truths}


@pytest.mark.timeout(1800)
def test_intervals_hold_as_often_as_they_say(write_page: Callable[..., Path]) -> None:
    found = {name: {n: simulated(case, n) for n in SIZES} for name, case in CASES.items()}
    of_turns = {
        what: {said: {turns: coverage(spell, turns) for turns in TURNS} for said, spell in SPELLS.items()}
        for what, coverage in (("throughput", throughput_coverage), ("speed-up", speedup_coverage))
    }
    over = {said: {count: processes_coverage(spread, count) for count in PROCESSES} for said, spread in DIFFER.items()}
    heavy = {count: heavy_coverage(count) for count in PROCESSES}
    write(found, of_turns, _processes_table(over, heavy), write_page)
    for name, case in CASES.items():
        for n in SIZES:
            for q, kept in found[name][n].items():
                where = f"{name}, {n} calls, {q}: {kept}"
                if n in case.exempt:
                    continue
                assert kept.wrong <= 0.05 + ERROR, where
                if kept.given >= 0.95 * RUNS:
                    assert kept.coverage >= 0.95 - ERROR, where
                if name.startswith("independent") and n == max(SIZES):
                    assert kept.coverage <= 0.98 + ERROR, where
    for what, spells in of_turns.items():
        for turns, coverage in spells["none"].items():
            assert coverage >= 0.95 - ERROR, (what, turns)
        for said, by_turns in spells.items():
            assert by_turns[300] >= 0.95 - ERROR, (what, said)
    for count in PROCESSES:
        assert heavy[count].coverage >= 0.95 - ERROR, count
        for said in DIFFER:
            assert over[said][count]["p50"].coverage >= 0.95 - ERROR, (said, count)


def write(
    found: dict[str, dict[int, dict[str, Kept]]], of_turns: dict[str, dict[str, dict[int, float]]],
    over_processes: list[str], write_page: Callable[..., Path],
) -> None:  # fmt: skip
    header = " | ".join(["of", "spells that turns share", *[f"{turns} turns" for turns in TURNS]])
    second = [f"| {header} |", "|---|---|" + "---:|" * len(TURNS)]
    second += [
        f"| {what} | {said} | " + " | ".join(f"{share:.1%}" for share in by_turns.values()) + " |"
        for what, spells in of_turns.items()
        for said, by_turns in spells.items()
    ]
    path = write_page(
        "coverage",
        title="How often the intervals hold",
        says="\n".join(
            [SAYS, "", PLOT, "", LIMITS, "", *second, "", PROCESSES_SAY, "", *over_processes, "", QUANTILES_SAY]
        ),
        header=["distribution", "calls", *QUANTILES],
        rows=[
            [name, f"{n:,}", *map(str, by_quantile.values())]
            for name, by_size in found.items()
            for n, by_quantile in by_size.items()
        ],
    )
    panels = {q: {name: _dots(found[name], q) for name in found} for q in QUANTILES}
    path.with_suffix(".svg").write_text(plot(panels))


def _processes_table(over: dict[str, dict[int, dict[str, Kept]]], heavy: dict[int, Kept]) -> list[str]:
    counts = " | ".join(f"{count} processes" for count in PROCESSES)
    lines = [f"| of | processes differ by | {counts} |", "|---|---|" + "---:|" * len(PROCESSES)]
    for name in QUANTILES:
        lines += [
            f"| {name} | {said} | " + " | ".join(str(by_count[count][name]) for count in PROCESSES) + " |"
            for said, by_count in over.items()
        ]
    said = f"{_HEAVY_SPREAD * 100:.0f} % times Student's t of {_HEAVY_DEGREES} degrees"
    return [*lines, f"| p50 | {said} | " + " | ".join(str(heavy[count]) for count in PROCESSES) + " |"]


def _dots(by_size: dict[int, dict[str, Kept]], q: str) -> list[Dot]:
    """Runs that gave no interval count as right: nothing wrong was said."""
    error = 100 * 2 * math.sqrt(0.05 * 0.95 / RUNS)
    return [Dot(calls=n, right=100 * (1 - kept[q].wrong), error=error) for n, kept in by_size.items()]


SAYS = (
    f"{RUNS:,} simulated runs a line, of distributions whose quantiles are known; the intervals are those of "
    "`dlops bench`, at 95 %. A share counts the intervals that hold the true value, where not every run gives one "
    "“of the share given”; “wrong” counts the runs, of all, that gave an interval without it. The plot has 100 % less "
    f"that, with two standard errors of the simulation ({200 * math.sqrt(0.05 * 0.95 / RUNS):.1f} %)."
)
LIMITS = (
    "**What holds.** Independent calls: 95 % and at large numbers 98 % at most, but for the simulation's error. Calls "
    "that follow one another: an interval that does not hold is given in no more than 5 % of the runs, whatever the "
    "correlation; where the run is too short for it, mostly none is given. **What cannot be had.** Where spells last "
    "so long that a run holds only a few of them (ρ = 0.8 from turn to turn resembles itself over nine turns: 40 "
    "turns hold four spells, 100 turns eleven), nothing in the run shows how far they may go: intervals of quantiles, "
    "throughput and speed-ups are then too narrow. Longer runs help, more calls a second do not. And where only few "
    "runs certify a quantile, those that do are the ones that look better than they are: of the few p99 given there, "
    "fewer than 95 % hold."
)
PLOT = "![share of runs that gave no wrong interval, against the number of calls](coverage.svg)"
PROCESSES_SAY = (
    f"Over several processes (`--processes`), {_CALLS_EACH} calls of each, whose spread is {_CALL_SPREAD:.0%}: p50 is "
    "the trimmed mean over processes, the others take them as blocks."
)
QUANTILES_SAY = "Quantiles, by the number of calls in a run:"
