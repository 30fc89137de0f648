"""What compare says of simulated runs whose truth is known: how often it cries wolf, and what it finds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dlops.bench import ratios
from dlops.bench.compare import (
    Comparison,
    RatioInterval,
    compare_reports,
    compare_turns,
    holm,
    word_for,
)
from dlops.bench.compare_table import comparison_markdown, comparison_text
from dlops.bench.matching import environment_differences
from dlops.bench.results import Measured
from dlops.bench.stats import rate_interval, summarize
from dlops.errors import UsageError
from dlops.report import SERVICE, STARTS, Interval, Load, Measurement, Verdict
from dlops.workflows.compare import exit_status

TURNS, CALLS = 50, 40
PAIRS = 200
# Three standard errors of shares of 1 in 20 and of 1 in 40 in a simulation of so many.
STRAY, HALF_STRAY = 3 * 0.0154, 3 * 0.0110
Noise = Callable[[np.random.Generator], np.ndarray]


def independent(draw: np.random.Generator) -> np.ndarray:
    return draw.normal(0, 0.1, (TURNS, CALLS))


def heavy_tailed(draw: np.random.Generator) -> np.ndarray:
    return np.abs(draw.normal(0, 0.7, (TURNS, CALLS)))


def following_the_call_before(draw: np.random.Generator) -> np.ndarray:
    # Each is 0.8 of the one before and news of its own: after a hundred calls nothing is left.
    noise = np.convolve(draw.normal(0, 0.1, TURNS * CALLS), 0.8 ** np.arange(100))
    return noise[: TURNS * CALLS].reshape(TURNS, CALLS)


def following_the_turn_before(draw: np.random.Generator) -> np.ndarray:
    """Spells that outlast turns: correlation 0.5 from one turn to the next."""
    spell = draw.normal(0, 0.03, TURNS)
    for i in range(1, TURNS):
        spell[i] += 0.5 * spell[i - 1]
    return spell[:, None] + draw.normal(0, 0.1, (TURNS, CALLS))


def drifting_together(draw: np.random.Generator) -> np.ndarray:
    return independent(draw) + np.linspace(0, 0.5, TURNS)[:, None]


def calls(noise: np.ndarray, factor: float = 1.0) -> ratios.Calls:
    latencies = (factor * 200_000 * np.exp(noise)).astype(np.int64)
    return ratios.Calls(
        latencies_ns=latencies.ravel(), turns=np.repeat(np.arange(len(noise)), noise.shape[1]),
        durations_s=latencies.sum(axis=1) / 1e9,
    )  # fmt: skip


def three_ratios(base: ratios.Calls, new: ratios.Calls, *, paired: bool) -> list[ratios.Ratio]:
    found = [
        ratios.median_ratio(base, new, paired=paired),
        ratios.rate_ratio(base, new, paired=paired),
        ratios.quantile_ratio(base, new, 0.99, paired=paired),
    ]
    assert None not in found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    "noise", [independent, heavy_tailed, drifting_together, following_the_call_before, following_the_turn_before]
)
def test_no_change_is_called_one_no_more_often_than_stated(noise: Noise, paired: bool) -> None:
    draw = np.random.default_rng(8)
    alarms = np.zeros(3)
    for _ in range(PAIRS):
        alarms += [one.p_value < 0.05 for one in three_ratios(calls(noise(draw)), calls(noise(draw)), paired=paired)]
    assert alarms.max() / PAIRS <= 0.05 + STRAY


def test_turns_taken_for_independent_would_cry_wolf() -> None:
    """The simulation can tell: without the correction for spells the same data alarms too often."""
    draw = np.random.default_rng(8)
    alarms = 0
    for _ in range(PAIRS):
        found = [np.log(np.median(following_the_turn_before(draw), axis=1) + 10) for _ in range(2)]
        difference = found[1] - found[0]
        t = difference.mean() / (difference.std(ddof=1) / np.sqrt(TURNS))
        alarms += ratios.two_sided_p(float(t), TURNS - 1) < 0.05
    assert alarms / PAIRS > 0.1


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_a_true_five_per_cent(paired: bool) -> None:
    draw = np.random.default_rng(9)
    covered = np.zeros(3)
    for _ in range(PAIRS):
        found = three_ratios(calls(independent(draw)), calls(independent(draw), 1.05), paired=paired)
        for place, (one, truth) in enumerate(zip(found, (1.05, 1 / 1.05, 1.05), strict=True)):
            low, high = one.interval(0.95)
            covered[place] += (low is None or low <= truth) and (high is None or truth <= high)
    assert covered.min() / PAIRS >= 0.95 - STRAY


def test_what_slows_both_cancels_where_turns_are_pairs() -> None:
    draw = np.random.default_rng(2)
    pace = draw.normal(0, 0.3, TURNS)[:, None]
    base, new = (calls(independent(draw) + pace, factor) for factor in (1.0, 1.05))
    paired, apart = (ratios.median_ratio(base, new, paired=how) for how in (True, False))
    assert paired.p_value < 0.001
    assert apart.p_value > 0.05
    assert paired.value == pytest.approx(1.05, abs=0.02)


@pytest.mark.parametrize("degrees", [1, 2, 5, 11, 22])
def test_students_t_matches_the_tables(degrees: int) -> None:
    table = {1: 12.706, 2: 4.3027, 5: 2.5706, 11: 2.2010, 22: 2.0739}
    assert ratios.student_t(0.95, degrees) == pytest.approx(table[degrees], rel=1e-4)
    assert ratios.two_sided_p(-table[degrees], degrees) == pytest.approx(0.05, rel=1e-3)


def test_a_tail_too_short_to_bound_has_no_end() -> None:
    draw = np.random.default_rng(1)
    small = [calls(draw.normal(0, 0.1, (12, 25))) for _ in range(2)]
    assert ratios.quantile_ratio(*small, 0.99, paired=True).interval(0.99) == (None, None)


def test_fewer_than_five_turns_say_nothing() -> None:
    few = calls(np.zeros((4, 100)))
    assert ratios.median_ratio(few, few, paired=True) is None
    assert ratios.rate_ratio(few, few, paired=False) is None
    assert ratios.quantile_ratio(few, few, 0.99, paired=True) is None


def test_holm_matches_a_worked_example() -> None:
    # Holm 1979 by hand: 0.01 × 4, 0.015 × 3, 0.03 × 2, and 0.04 × 1 is raised to what came before.
    adjusted, divisors = holm([0.03, 0.01, 0.04, 0.015])
    assert adjusted == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert divisors == [2, 4, 2, 3]
    assert holm([]) == ([], [])


@pytest.mark.parametrize(
    ("low", "value", "high", "differs", "word", "gated"),
    [
        (1.06, 1.08, 1.10, True, "REGRESSED", "REGRESSED"),
        (1.01, 1.06, 1.11, True, "REGRESSED", "REGRESSED"),
        (0.99, 1.06, 1.13, False, "INCONCLUSIVE", "INCONCLUSIVE"),
        (1.01, 1.04, 1.07, True, "INCONCLUSIVE", "INCONCLUSIVE"),
        (1.01, 1.02, 1.03, True, "SAME", "PASSED"),
        (0.97, 1.00, 1.03, False, "SAME", "PASSED"),
        (0.80, 1.00, 1.20, False, "INCONCLUSIVE", "INCONCLUSIVE"),
        (0.90, 0.97, 1.04, False, "INCONCLUSIVE", "PASSED"),
        (0.80, 0.85, 0.90, True, "IMPROVED", "PASSED"),
        (None, 0.85, None, False, "INCONCLUSIVE", "INCONCLUSIVE"),
    ],
)
def test_the_word_on_an_interval(
    low: float | None, value: float, high: float | None, differs: bool, word: str, gated: str
) -> None:
    cost = RatioInterval(value=value, low=low, high=high, confidence=0.95)
    assert word_for(cost, differs=differs, limit=1.05, gated=False) == word
    assert word_for(cost, differs=differs, limit=1.05, gated=True) == gated


def row(run: ratios.Calls, key: str, slug: str, *, batch: int = 1, target: str = "") -> Measurement:
    return Measurement(
        target=target or f"toy/{slug}", artifact=slug, runtime="onnxruntime", provider="CPUExecutionProvider",
        device="cpu", precision="fp32", threads=1, boundary="host", load=Load(batch=batch), samples=key,
        latency=summarize(run.latencies_ns, turns=run.turns),
        throughput=rate_interval(np.bincount(run.turns), run.durations_s), warmup_calls=1, verdict=Verdict(steady=True),
    )  # fmt: skip


@pytest.fixture
def measured(example: Callable[..., Measured]) -> Callable[..., Measured]:
    """measured((slug, run), ...) is a report of those rows, all at batch 1 unless a third says otherwise."""
    drawn = example().report

    def make(*runs: tuple[str, ratios.Calls] | tuple[str, ratios.Calls, int]) -> Measured:
        rows, samples = [], {}
        for number, (slug, run, *batch) in enumerate(runs):
            key = f"row{number:02d}"
            rows.append(row(run, key, slug, batch=batch[0] if batch else 1))
            samples |= {key: run.latencies_ns, f"{key}.starts": run.latencies_ns, f"{key}.turns": run.turns}
        report = drawn.model_copy(update={"measurements": tuple(rows)})
        return Measured(report=report, samples=samples)

    return make


def words(comparison: Comparison) -> dict[str, str]:
    (one,) = comparison.rows
    return {judged.quantity: judged.word for judged in one.judged}


def test_a_planted_five_per_cent_is_found_and_mirrored(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(3)
    found = 0
    for _ in range(100):
        runs = [calls(independent(draw)), calls(independent(draw), 1.05)]
        report = measured(("onnx-fp32", runs[0]), ("onnx-fp32", runs[1]))
        comparison = compare_turns(report, base="a", new="b", margin=0.02)
        found += words(comparison)["p50"] == "REGRESSED"
        assert words(comparison)["throughput"] in ("REGRESSED", "INCONCLUSIVE")
    assert found >= 95
    back = compare_turns(measured(("x", runs[1]), ("x", runs[0])), base="b", new="a", margin=0.02)
    assert words(back)["p50"] == words(back)["throughput"] == back.verdict == "IMPROVED"


def test_no_change_in_any_of_many_rows_is_called_one_in_at_most_a_twentieth_of_runs(
    measured: Callable[..., Measured],
) -> None:
    """The family is all rows and quantities: at a margin near nothing only Holm stands between chance and an alarm."""
    draw = np.random.default_rng(12)
    alarms = 0
    for _ in range(PAIRS):
        runs = [("x", calls(independent(draw)[:24, :20]), batch) for batch in (1, 8) for _ in range(2)]
        comparison = compare_turns(measured(*runs), base="a", new="b", margin=1e-9)
        judged = [one.word for each in comparison.rows for one in each.judged]
        assert len(judged) == 6
        alarms += any(word in ("REGRESSED", "IMPROVED") for word in judged)
    assert alarms / PAIRS <= 0.05 + STRAY


def test_same_needs_evidence(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(4)
    tight, loose = (
        compare_turns(
            measured(*[("x", calls(draw.normal(0, sigma, (TURNS, CALLS)))) for _ in range(2)]), base="a", new="b"
        )
        for sigma in (0.02, 1.0)
    )
    assert words(tight)["p50"] == words(tight)["throughput"] == "SAME"
    assert words(loose)["p50"] == "INCONCLUSIVE"
    assert loose.verdict == "INCONCLUSIVE"


def test_same_is_said_of_a_true_change_at_the_margin_in_at_most_a_fortieth_of_runs(
    measured: Callable[..., Measured],
) -> None:
    draw = np.random.default_rng(5)
    wrong = 0
    for _ in range(PAIRS):
        runs = [("x", calls(independent(draw)[:24, :20], factor)) for factor in (1.0, 1.05)]
        wrong += "SAME" in words(compare_turns(measured(*runs), base="a", new="b", margin=0.0499)).values()
    assert wrong / PAIRS <= 0.025 + HALF_STRAY


def test_intervals_are_at_the_level_of_the_family(measured: Callable[..., Measured]) -> None:
    """SAME may be said of several at once, so each interval is wider; of what changed it is Holm's."""
    draw = np.random.default_rng(5)

    def judged(factor: float) -> list[tuple[str, float]]:
        runs = [("x", calls(draw.normal(0, 0.02, (TURNS, CALLS)), one)) for one in (1.0, factor)]
        (found,) = compare_turns(measured(*runs), base="a", new="b").rows
        return [(one.word, round(one.ratio.confidence, 6)) for one in found.judged]

    assert judged(1.0) == [("SAME", round(1 - 0.05 / 3, 6))] * 3
    assert sorted(judged(1.5)) == [("REGRESSED", 0.95), ("REGRESSED", 0.975), ("REGRESSED", round(1 - 0.05 / 3, 6))]


def test_the_verdict_is_the_worst_word(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(6)
    short = [("x", calls(draw.normal(0, 0.01, (12, 20)), factor)) for factor in (1.0, 1.5)]
    comparison = compare_turns(measured(*short), base="a", new="b")
    assert words(comparison) == {"p50": "REGRESSED", "p99": "INCONCLUSIVE", "throughput": "REGRESSED"}
    assert comparison.verdict == "REGRESSED"


def test_p99_is_inconclusive_where_the_sample_does_not_certify_it(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(6)
    short = [("x", calls(draw.normal(0, 0.01, (12, 20)))) for _ in range(2)]
    comparison = compare_turns(measured(*short), base="a", new="b")
    assert words(comparison) == {"p50": "SAME", "p99": "INCONCLUSIVE", "throughput": "SAME"}
    (p99,) = [one for one in comparison.rows[0].judged if one.quantity == "p99"]
    assert p99.ratio is None
    assert "p99 is not certified" in p99.because
    assert "p99 is not certified" in comparison_text(comparison)


def test_a_gate_judges_only_what_it_names_against_its_own_limits(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(7)
    runs = [("x", calls(draw.normal(0, 0.02, (TURNS, CALLS)), factor)) for factor in (1.0, 1.05)]
    for limits, found in (
        ({"p50": 1.03, "throughput": 0.90}, {"p50": "REGRESSED", "throughput": "PASSED"}),
        ({"p50": 1.10, "throughput": 0.97}, {"p50": "PASSED", "throughput": "REGRESSED"}),
    ):
        comparison = compare_turns(measured(*runs), base="a", new="b", gate=limits)
        assert words(comparison) == found
        assert comparison.margin is None
        assert comparison.verdict == "REGRESSED"


def test_rows_of_two_reports_are_matched_by_what_was_measured(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(0)
    runs = [calls(draw.normal(0, 0.01, (TURNS, CALLS)), factor) for factor in (1.0, 1.2, 3.0)]
    base = measured(("onnx-fp32", runs[0]), ("onnx-int8", runs[2]), ("onnx-fp32", runs[2], 8))
    new = measured(("onnx-fp16", runs[2]), ("onnx-fp32", runs[2], 4), ("onnx-fp32", runs[1]))
    comparison = compare_reports(base, new)
    assert words(comparison)["p50"] == "REGRESSED"
    assert comparison.rows[0].judged[0].ratio.value == pytest.approx(1.2, abs=0.02)
    text = comparison_text(comparison)
    for side, slug, batch in (("BASE", "int8", 1), ("BASE", "fp32", 8), ("NEW", "fp16", 1), ("NEW", "fp32", 4)):
        assert any(
            line.startswith(f"only in {side}") and slug in line and f"batch {batch}," in line
            for line in comparison.unmatched
        )
    assert len(comparison.unmatched) == 4
    assert text.count("only in") == 4
    assert "spread within each run" in " ".join(text.split())


def test_a_row_that_new_lacks_has_passed_no_gate(measured: Callable[..., Measured]) -> None:
    quiet = calls(np.random.default_rng(0).normal(0, 0.001, (TURNS, CALLS)), 1.0)
    both, one = measured(("onnx-fp32", quiet), ("onnx-int8", quiet)), measured(("onnx-fp32", quiet))
    gate = {"p50": 1.05}
    assert compare_reports(both, both, gate=gate).verdict == "PASSED"
    assert compare_reports(one, both, gate=gate).verdict == "PASSED"
    assert compare_reports(both, one, gate=gate).verdict == "INCONCLUSIVE"
    assert compare_reports(both, one).verdict == "SAME"


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"arrivals": "poisson"}, {"arrivals": "constant"}, "20 a second, constant"),
        ({"arrivals": "poisson"}, {"arrivals": "poisson", "pauses_s": (5.0, 10.0)}, "5 s busy, 10 s idle"),
        ({"arrivals": "trace", "trace": "a" * 16}, {"arrivals": "trace", "trace": "b" * 16}, "trace bbbbbb"),
    ],
)
def test_rows_of_two_schedules_are_no_partners(
    one: dict[str, object], other: dict[str, object], said: str, example: Callable[..., Measured]
) -> None:
    def scheduled(fields: dict[str, object]) -> Measured:
        measured = example()
        row = measured.measurements[4]
        row = row.model_copy(update={"load": row.load.model_copy(update={"rate": 20.0, **fields})})
        report = measured.report.model_copy(update={"measurements": (row,)})
        return Measured(report=report, samples=measured.samples)

    with pytest.raises(UsageError) as refusal:
        compare_reports(scheduled(one), scheduled(other))
    assert said in str(refusal.value)
    assert compare_reports(scheduled(one), scheduled(one)).rows


def test_a_gate_on_what_was_given_has_nothing_to_judge(example: Callable[..., Measured]) -> None:
    measured = example()
    row = measured.measurements[4]
    row = row.model_copy(update={"load": row.load.model_copy(update={"rate": 20.0, "arrivals": "poisson"})})
    given = Measured(report=measured.report.model_copy(update={"measurements": (row,)}), samples=measured.samples)
    with pytest.raises(UsageError, match="at a given rate throughput is what was offered"):
        compare_reports(given, given, gate={"throughput": 0.97})


def test_two_reports_without_a_common_row_are_refused(measured: Callable[..., Measured]) -> None:
    run = calls(np.zeros((TURNS, CALLS)))
    with pytest.raises(UsageError, match="onnx-fp16") as refusal:
        compare_reports(measured(("onnx-fp32", run)), measured(("onnx-fp16", run)))
    assert "variant" in refusal.value.hint


@pytest.mark.parametrize(
    ("target", "said"),
    [("http://127.0.0.1:3000", ", over HTTP, batch 1"), ("oip+grpc://a:8001/m", ", over HTTP and over gRPC, batch 1")],
)
def test_a_service_is_said_to_be_measured_over_what_it_was(target: str, said: str, example) -> None:
    base = example()
    *local, served = base.measurements
    report = base.report.model_copy(update={"measurements": (*local, served.model_copy(update={"target": target}))})
    comparison = compare_reports(base, Measured(report=report, samples=base.samples))
    assert said in comparison_text(comparison)
    assert said in comparison_markdown(comparison)


def test_every_difference_of_the_environment_is_a_warning(example: Callable[..., Measured]) -> None:
    base = example()
    where = base.report.environment
    there = where.model_copy(update={"cores": 64, "packages": {"numpy": "2.4.6", "torch": "2.14.1"}})
    assert environment_differences(where, where) == []
    assert environment_differences(where, there) == [
        "cores: 2 in BASE, 64 in NEW",
        "numpy: 2.0.0 in BASE, 2.4.6 in NEW",
        "onnxruntime: 1.31.1 in BASE, none in NEW",
        "torch: none in BASE, 2.14.1 in NEW",
    ]
    rows = tuple(one.model_copy(update={"threads": 8}) for one in base.measurements)
    report = base.report.model_copy(update={"environment": there, "measurements": rows})
    comparison = compare_reports(base, Measured(report=report, samples=base.samples))
    assert "warning: cores: 2 in BASE, 64 in NEW" in comparison_text(comparison)
    assert any("threads" in line for line in comparison.warnings)


def test_every_kind_of_row_is_compared_and_what_stands_against_it_is_said(example: Callable[..., Measured]) -> None:
    comparison = compare_reports(example(), example())
    assert comparison.rows[0].name == "eager"
    assert comparison.rows[-1].boundary == "network"
    assert len(comparison.rows) == 5
    assert "the median moved by +12%" in comparison_text(comparison)
    assert any("HTTP 503" in reason for reason in comparison.rows[-1].against)


def test_the_table_fits_eighty_columns_and_markdown_has_the_same_numbers(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(1)
    runs = [calls(independent(draw), factor) for factor in (1.0, 1.0, 30.0, 30.0)]
    named = [("torchscript-fp32-pruned50", runs[i], batch) for batch in (1, 1024) for i in (0, 2)]
    comparison = compare_turns(measured(*named), base="a|b", new="c", margin=0.05)
    text, markdown = comparison_text(comparison), comparison_markdown(comparison)
    assert max(map(len, text.splitlines())) <= 80
    assert comparison.verdict == "REGRESSED"
    assert text.count("REGRESSED") == 6
    for one in comparison.rows[0].judged:
        assert f"{one.ratio.value:.3f}" in text
        assert f"{one.ratio.value:.3f}" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {8}


def test_a_partial_run_is_marked(measured: Callable[..., Measured]) -> None:
    run = calls(np.random.default_rng(0).normal(0, 0.01, (TURNS, CALLS)))
    made = measured(("x", run), ("x", run))
    partial = Measured(report=made.report.model_copy(update={"partial": True}), samples=made.samples)
    comparison = compare_turns(partial, base="a", new="b")
    assert comparison.partial
    assert "partial" in comparison_text(comparison)
    assert exit_status(comparison.model_copy(update={"rows": ()})) == 3


def test_calls_that_fail_leave_nothing_to_be_glad_of(example: Callable[..., Measured]) -> None:
    base = example()
    failing = [row.model_copy(update={"errors": {"HTTP 503": 70}}) for row in base.measurements]
    new = Measured(report=base.report.model_copy(update={"measurements": tuple(failing)}), samples=base.samples)
    same = compare_reports(base, base, margin=0.9)
    assert {one.word for row in same.rows for one in row.judged if one.ratio} == {"SAME"}
    judged = [one for row in compare_reports(base, new, margin=0.9).rows for one in row.judged if one.ratio]
    # The service's row had failed calls before, too.
    assert {one.word for one in judged} == {"INCONCLUSIVE"}
    assert judged[0].because == "70 calls of NEW failed"


def test_calls_that_failed_are_no_throughput_and_make_no_median(example: Callable[..., Measured]) -> None:
    """BASE failed every other call, at once; NEW none: it is twice as fast and not slower."""
    measured = example()
    row = measured.measurements[4]
    count = len(measured.samples[row.samples])
    starts = np.sort(measured.samples[row.samples + STARTS])
    good = np.arange(count) % 2 == 0
    failing = np.where(good, 50_000_000, 30_000_000_000)
    half = row.model_copy(
        update={
            "errors": {"HTTP 500": int((~good).sum())}, "throughput": rate(count / 2), "latency": summarize(failing),
            "duration_ns": int(starts[-1]) + 1,
        }
    )  # fmt: skip
    whole = row.model_copy(
        update={
            "throughput": rate(count), "latency": summarize(np.full(count, 50_000_000)),
            "duration_ns": half.duration_ns,
        }
    )  # fmt: skip

    def report(one: Measurement, latencies: np.ndarray, **more: np.ndarray) -> Measured:
        samples = {one.samples: latencies, one.samples + STARTS: starts}
        samples |= {one.samples + suffix: array for suffix, array in more.items()}
        return Measured(report=measured.report.model_copy(update={"measurements": (one,)}), samples=samples)

    base = report(half, failing, **{SERVICE: np.where(good, 50_000_000, -1)})
    (found,) = compare_reports(base, report(whole, np.full(count, 50_000_000))).rows
    judged = {one.quantity: one for one in found.judged}
    assert judged["throughput"].word == "IMPROVED"
    assert judged["throughput"].ratio.value == pytest.approx(2, abs=0.1)
    assert judged["p50"].word == "INCONCLUSIVE"
    assert "BASE: up to" in judged["p50"].because
    assert "failed" in judged["p50"].because


def rate(value: float) -> Interval:
    return Interval(value=value, low=0.9 * value, high=1.1 * value)


def test_a_stall_at_the_end_of_a_run_is_in_its_throughput(example: Callable[..., Measured]) -> None:
    row = example().measurements[-1].model_copy(update={"duration_ns": 3_000_000_000, "errors": {}})
    whole = np.arange(1000) * 3_000_000
    report = example().report.model_copy(update={"measurements": (row,), "chosen": None, "baseline": None})
    base, new = (
        Measured(
            report=report, samples={row.samples: np.full(len(starts), 2_000_000), row.samples + STARTS: starts}
        )
        for starts in (whole, whole[whole < 2_000_000_000])
    )  # fmt: skip
    found = {one.quantity: one for one in compare_reports(base, new).rows[0].judged}
    # 1,000 answers in 3 s against 667, after which it stood still.
    assert found["throughput"].ratio.value == pytest.approx(0.667, abs=0.01)


def test_the_same_samples_give_the_same_answer(measured: Callable[..., Measured]) -> None:
    draw = np.random.default_rng(0)
    made = measured(*[("x", calls(independent(draw))) for _ in range(2)])
    assert compare_turns(made, base="a", new="b") == compare_turns(made, base="a", new="b")
