"""Intervals against distributions whose quantiles are known."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from dlops.bench import stats
from dlops.bench.analysis import undersampled

Draw = Callable[[np.random.Generator, int], np.ndarray]


def lognormal(draw: np.random.Generator, n: int) -> np.ndarray:
    return np.exp(draw.normal(0, 0.5, n))


def bimodal(draw: np.random.Generator, n: int) -> np.ndarray:
    return np.where(draw.random(n) < 0.8, draw.normal(1, 0.05, n), draw.normal(5, 0.3, n))


def in_turns_that_differ(draw: np.random.Generator, n: int) -> np.ndarray:
    """Calls of one turn share a slow or fast spell: a normal with half of its variance between turns."""
    turn = np.repeat(draw.normal(0, 1, n // 40), 40)
    return (turn + draw.normal(0, 1, n)) / np.sqrt(2)


@pytest.mark.parametrize(("q", "fewest"), [(0.5, 6), (0.9, 36), (0.99, 368), (0.999, 3688)])
def test_a_quantile_is_null_below_the_fewest_samples_that_bound_it(q, fewest) -> None:
    assert stats.fewest_samples(q) == fewest
    ranks = stats.interval_ranks(fewest, q)
    assert ranks.low is not None
    assert ranks.high is not None
    assert stats.interval_ranks(fewest - 1, q).high is None
    draw = np.random.default_rng(0)
    assert stats.quantile_interval(draw.normal(0, 1, fewest - 1), q) is None
    assert stats.quantile_interval(draw.normal(0, 1, 4 * fewest), q) is not None


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_few_turns_certify_nothing_however_many_calls_they_hold(turns: int) -> None:
    samples = np.random.default_rng(0).normal(0, 1, 10_000)
    of = np.repeat(np.arange(turns), 10_000 // turns)
    assert stats.effective_samples(samples, 0.99, turns=of) == turns
    for q in (0.5, 0.9, 0.99):
        assert stats.quantile_interval(samples, q, turns=of) is None


def test_ranks_are_those_of_the_tables() -> None:
    # Conover, Practical Nonparametric Statistics: n = 20, median, 95 %: the 6th and the 15th.
    assert stats.interval_ranks(20, 0.5) == stats.Ranks(low=6, high=15)


@pytest.mark.parametrize("distribution", [lognormal, bimodal])
@pytest.mark.parametrize(("q", "n"), [(0.5, 50), (0.5, 2000), (0.9, 400), (0.99, 2000)])
def test_intervals_of_independent_samples_cover_the_truth(distribution: Draw, q: float, n: int) -> None:
    draw = np.random.default_rng(7)
    truth = float(np.quantile(distribution(draw, 2_000_000), q))
    covered, certified = 0, 0
    for _ in range(300):
        interval = stats.quantile_interval(distribution(draw, n), q)
        if interval is not None:
            certified += 1
            covered += interval.low <= truth <= interval.high
    assert certified == 300
    # 95 % less three standard errors of a simulation of 300.
    assert covered / 300 >= 0.95 - 3 * 0.0126


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_intervals_stay_honest_where_calls_of_a_turn_resemble_each_other(q: float) -> None:
    draw = np.random.default_rng(11)
    truth = {0.5: 0.0, 0.9: 1.2816}[q]
    turns = np.repeat(np.arange(40), 40)
    given = corrected = naive = 0
    for _ in range(300):
        samples = in_turns_that_differ(draw, 1600)
        right = stats.quantile_interval(samples, q, turns=turns)
        ranks, ordered = stats.interval_ranks(1600, q), np.sort(samples)
        given += right is not None
        corrected += right is not None and right.low <= truth <= right.high
        naive += ordered[ranks.low - 1] <= truth <= ordered[ranks.high - 1]
    assert naive / 300 < 0.75
    # Where turns look like one long spell by chance, none is given.
    assert given >= 290
    assert corrected / given >= 0.95 - 3 * 0.0126


def follows(draw: np.random.Generator, runs: int, n: int, correlation: float) -> np.ndarray:
    """Standard normals, each correlated with the one before it: (runs, n)."""
    steps = draw.normal(0, 1, (n, runs))
    steps[1:] *= np.sqrt(1 - correlation**2)
    for i in range(1, n):
        steps[i] += correlation * steps[i - 1]
    return steps.T


def wrong(samples: np.ndarray, turns: np.ndarray, q: float) -> float:
    """The share of runs of a standard normal, a row each, that give an interval without the true quantile in it."""
    truth = NormalDist().inv_cdf(q)
    intervals = [stats.quantile_interval(run, q, turns=turns) for run in samples]
    return sum(one is not None and not one.low <= truth <= one.high for one in intervals) / len(samples)


# 5 % and three standard errors of a simulation of 300.
STRAY = 0.05 + 3 * 0.0126


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("correlation", [0.9, 0.99, 0.999])
def test_calls_that_follow_one_another_give_right_intervals_or_none(q: float, correlation: float) -> None:
    # Neighbours resemble one another over 19, 199 and 1,999 calls, a stretch has 33: the last can certify nothing.
    samples = follows(np.random.default_rng(1), 300, 1000, correlation)
    assert wrong(samples, np.arange(1000) * 30 // 1000, q) <= STRAY


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_spells_that_last_many_turns_are_not_taken_for_many_samples(q: float) -> None:
    draw = np.random.default_rng(2)
    spells = np.repeat(follows(draw, 300, 300, 0.8), 10, axis=1)
    samples = np.sqrt(0.2) * spells + np.sqrt(0.8) * draw.normal(0, 1, (300, 3000))
    assert wrong(samples, np.arange(3000) // 10, q) <= STRAY


@pytest.mark.parametrize("turns", [6, 12, 30, 40, 300])
def test_independent_calls_are_hardly_taken_for_dependent_ones(turns: int) -> None:
    draw = np.random.default_rng(3)
    of = np.arange(6000) * turns // 6000
    worth = [stats.effective_samples(draw.normal(0, 1, 6000), 0.5, turns=of) / 6000 for _ in range(100)]
    assert np.median(worth) > 0.35 if turns < 30 else np.median(worth) > 0.7


def test_a_speed_up_whose_ratios_wander_is_not_taken_for_surer_than_it_is() -> None:
    draw = np.random.default_rng(4)
    ratios = np.exp(0.05 * (follows(draw, 300, 100, 0.8) + draw.normal(0, 1, (300, 100))))
    base = [np.array([1_000_000])] * 100
    intervals = [stats.ratio_interval([np.array([ratio * 1e6]) for ratio in run], base) for run in ratios]
    assert np.mean([one.low <= 1 <= one.high for one in intervals]) >= 1 - STRAY


def test_effective_samples_are_the_number_of_turns_where_a_turn_repeats_one_value() -> None:
    draw = np.random.default_rng(3)
    samples = np.repeat(draw.normal(0, 1, 200), 25)
    turns = np.repeat(np.arange(200), 25)
    assert 150 <= stats.effective_samples(samples, 0.5, turns=turns) <= 210
    independent = draw.normal(0, 1, 5000)
    assert stats.effective_samples(independent, 0.5, turns=turns) > 3500


def test_speed_up_cancels_a_drift_that_both_share() -> None:
    draw = np.random.default_rng(5)
    pace = np.linspace(1, 3, 40)
    base = [np.int64(2e6 * speed * draw.lognormal(0, 0.05, 30)) for speed in pace]
    new = [np.int64(1e6 * speed * draw.lognormal(0, 0.05, 30)) for speed in pace]
    interval = stats.ratio_interval(base, new)
    assert interval.low <= 2.0 <= interval.high
    assert interval.high / interval.low < 1.1


def test_a_speed_up_is_given_with_its_interval_or_not_at_all() -> None:
    turns = [np.array([5, 6, 7])] * 6
    assert stats.ratio_interval(turns[:5], turns[:5]) is None
    interval = stats.ratio_interval(turns, turns)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_throughput_intervals_cover_the_truth_in_spells_too(correlation: float) -> None:
    draw = np.random.default_rng(6)
    counts = 100 + 5 * follows(draw, 300, 300, correlation) + 5 * draw.normal(0, 1, (300, 300))
    intervals = [stats.rate_interval(run, np.full(300, 0.1)) for run in counts]
    assert np.mean([one.low <= 1000 <= one.high for one in intervals]) >= 1 - STRAY


def test_throughput_intervals_cover_the_truth() -> None:
    draw = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        durations = draw.gamma(4, 0.25, (20, 10)).sum(axis=1)
        interval = stats.rate_interval(np.full(20, 10), durations)
        covered += interval.low <= 1.0 <= interval.high
    assert covered / 400 >= 0.95 - 3 * 0.011


def test_drift_is_found_where_there_is_one_and_rarely_where_not() -> None:
    draw = np.random.default_rng(4)
    rising = np.linspace(1.0, 1.2, 30) + draw.normal(0, 0.02, 30)
    found = stats.drift(rising.tolist())
    assert found.matters
    assert found.change == pytest.approx(0.2, abs=0.05)
    alarms = sum(stats.drift(draw.normal(1, 0.1, 30).tolist()).matters for _ in range(500))
    assert alarms <= 12  # 1 % of 500, and three standard errors
    assert not stats.drift([1.0, 1.001, 1.002, 1.003, 1.004, 1.005, 1.006]).matters


def test_wilson_matches_a_published_interval() -> None:
    # Brown, Cai and DasGupta 2001: 10 of 20 gives 0.299 to 0.701.
    interval = stats.proportion_interval(0.5, 20)
    assert (interval.low, interval.high) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))


@pytest.mark.parametrize(
    ("worth", "said"),
    [
        (300, ["under-sampled: p99 is not certified: 300 effective samples of 1000, it needs 662"]),
        (
            500,
            ["under-sampled: p99 is not certified: 500 effective samples of 1000, it needs 662; 368 give an interval"],
        ),
        (662, []),
    ],
)
def test_p99_has_an_interval_before_it_is_certified(worth: int, said: list[str], monkeypatch) -> None:
    monkeypatch.setattr(stats, "effective_samples", lambda samples, q, turns: worth)
    assert undersampled(np.arange(1000) + 1, np.arange(1000) // 100) == said
