"""Rows over several fresh processes: what they keep, what they say, and how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlops.bench import inprocess, ratios, stats
from dlops.bench.compare import ONE_PROCESS, WITHIN_RUNS, compare_reports, compare_turns
from dlops.bench.reanalysis import reanalyse
from dlops.bench.results import Measured, MeasureInterrupted, save_report
from dlops.bench.run import measure
from dlops.bench.stats import Integers
from dlops.errors import MachineError, UsageError
from dlops.report import PROCESSES, STARTS, TURNS, read_report

from .conftest import MakeArtifact, write_artifact

LAUNCHES, TURNS_EACH, CALLS = 8, 10, 20
RUNS = 200
# Three standard errors of a share of 1 in 20 in a simulation of so many.
STRAY = 3 * 0.0154


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Two artifacts, six processes each."""
    folder = tmp_path_factory.mktemp("artifacts")
    two = [write_artifact(folder, hidden=8), write_artifact(folder, hidden=512, name="large")]
    return measure(two, duration_s=0.6, processes=6, threads=1)


def test_a_row_holds_the_calls_of_all_processes_in_order(measured: Measured) -> None:
    for row in measured.measurements:
        calls, turns, processes = (measured.samples[row.samples + name] for name in ("", TURNS, PROCESSES))
        assert row.processes == 6
        assert calls.shape == turns.shape == processes.shape
        assert np.unique(processes).tolist() == list(range(6))
        assert (np.diff(turns) >= 0).all()
        assert (np.diff(processes) >= 0).all()
        # No turn is of two processes, and each had enough of them for a median of its own.
        pairs = np.unique(np.stack([turns, processes]), axis=1)
        assert len(pairs[0]) == len(np.unique(turns))
        assert np.bincount(pairs[1]).min() >= 6
        # One clock: a later process's calls began later.
        assert (np.diff(measured.samples[row.samples + STARTS]) > 0).all()
        assert row.cold_start is not None
        assert row.peak_memory_bytes is not None
        assert row.latency.p50_ns is not None
        assert row.latency.p50_ns.low is not None
    small, large = measured.measurements
    assert large.paired_with == small.samples
    assert large.speedup is not None


def test_its_report_is_worked_out_again_to_the_last_bit(measured: Measured, tmp_path) -> None:
    report = save_report(measured, tmp_path / "report")
    again = reanalyse(report)
    assert again.report.notes[-1].endswith("every number as before")
    assert again.report.measurements == report.measurements


def test_its_own_comparison_counts_processes(measured: Measured) -> None:
    found = compare_turns(measured, base="small", new="large")
    assert found.processes == 6
    assert ONE_PROCESS not in found.warnings
    reports = compare_reports(measured, measured)
    assert reports.processes == 6
    assert WITHIN_RUNS not in reports.warnings
    assert any("different times" in one for one in reports.warnings)


@pytest.mark.parametrize("apart", [True, False])
def test_what_a_comparison_says_is_of_its_processes(measured: Measured, apart: bool) -> None:
    """By hand from the samples; taken for one process they give another interval."""
    calls = []
    for row in measured.measurements:
        latencies, turns, processes = (measured.samples[row.samples + name] for name in ("", TURNS, PROCESSES))
        _, first, place = np.unique(turns, return_index=True, return_inverse=True)
        durations = np.bincount(place, weights=latencies / 1e9)
        calls.append(
            ratios.Calls(
                latencies_ns=latencies,
                turns=place,
                durations_s=durations,
                processes=processes[first] if apart else None,
            )
        )
    (found,) = compare_turns(measured, base="small", new="large").rows
    judged = next(one.ratio for one in found.judged if one.quantity == "p50")
    wanted = ratios.median_ratio(*calls, paired=True)
    assert judged is not None
    assert wanted is not None
    assert ((judged.low, judged.high) == pytest.approx(wanted.interval(judged.confidence))) is apart


@pytest.mark.parametrize("count", [2, 5, 101])
def test_too_few_processes_or_too_many_are_refused(make_artifact: MakeArtifact, count: int) -> None:
    with pytest.raises(UsageError, match=f"{count} processes"):
        measure([make_artifact()], processes=count)


def test_services_have_one_process(make_artifact: MakeArtifact) -> None:
    with pytest.raises(UsageError, match="a service is one"):
        measure([make_artifact(), "http://127.0.0.1:9"], processes=6)


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), MachineError("no more memory", hint="buy some")])
def test_what_earlier_processes_measured_is_kept(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, ending: BaseException
) -> None:
    start, starts = inprocess.started, []

    @contextmanager
    def failing(*words: Any, **named: Any) -> Iterator[Any]:
        starts.append(words)
        if len(starts) == 3:
            raise ending
        with start(*words, **named) as ready:
            yield ready

    monkeypatch.setattr(inprocess, "started", failing)
    if isinstance(ending, MachineError):
        found = measure([make_artifact()], processes=6, duration_s=0.6)
        (said,) = [reason for reason in found.measurements[0].verdict.reasons if "no more memory" in reason]
        assert said.startswith("cut short")
    else:
        with pytest.raises(MeasureInterrupted) as interruption:
            measure([make_artifact()], processes=6, duration_s=0.6)
        found = interruption.value.measured
        assert "interrupted" in found.measurements[0].verdict.reasons
    (row,) = found.measurements
    assert found.partial
    assert row.processes == 2
    # Two processes do not say how much processes differ.
    assert row.latency.p50_ns is None
    assert row.throughput.low is None
    comparison = compare_turns(
        Measured(report=found.report.model_copy(update={"measurements": (row, row)}), samples=found.samples),
        base="a", new="b",
    )  # fmt: skip
    assert comparison.verdict == "INCONCLUSIVE"


def _run(
    draw: np.random.Generator, *, between: float, factor: float = 1.0, disturbed: float = 0.0
) -> tuple[Integers, Integers, Integers]:
    """Latencies, turns and processes: a process has its own pace, a share of them the machine against them."""
    pace = draw.normal(0, between, LAUNCHES)
    pace = (pace + (draw.random(LAUNCHES) < disturbed) * draw.exponential(0.1, LAUNCHES))[:, None, None]
    noise = draw.normal(0, 0.05, (LAUNCHES, TURNS_EACH, CALLS))
    latencies = (factor * 1_000_000 * np.exp(pace + noise)).astype(np.int64).ravel()
    turns = np.repeat(np.arange(LAUNCHES * TURNS_EACH), CALLS)
    return latencies, turns, turns // TURNS_EACH


def _calls(
    draw: np.random.Generator, *, between: float, factor: float = 1.0, apart: bool = True, disturbed: float = 0.0
) -> ratios.Calls:
    latencies, turns, processes = _run(draw, between=between, factor=factor, disturbed=disturbed)
    return ratios.Calls(
        latencies_ns=latencies, turns=turns, durations_s=np.bincount(turns, weights=latencies / 1e9),
        processes=processes[::CALLS] if apart else None,
    )  # fmt: skip


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("between", "disturbed"), [(0.0, 0.0), (0.02, 0.0), (0.01, 0.1)])
def test_processes_that_differ_are_no_change(between: float, disturbed: float, paired: bool) -> None:
    draw = np.random.default_rng(5)
    alarms = np.zeros(3)
    for _ in range(RUNS):
        base, new = (_calls(draw, between=between, disturbed=disturbed) for _ in range(2))
        found = (
            ratios.median_ratio(base, new, paired=paired),
            ratios.rate_ratio(base, new, paired=paired),
            ratios.quantile_ratio(base, new, 0.99, paired=paired),
        )
        alarms += [one is not None and one.p_value < 0.05 for one in found]
    assert alarms.max() / RUNS <= 0.05 + STRAY


def test_one_process_each_would_call_that_a_change() -> None:
    """The simulation can tell: a run of one process each, whose intervals see its calls alone."""
    draw = np.random.default_rng(5)
    alarms = 0
    for _ in range(RUNS):
        base, new = (_calls(draw, between=0.0, factor=float(np.exp(draw.normal(0, 0.02))), apart=False) for _ in "ab")
        found = ratios.median_ratio(base, new, paired=True)
        alarms += found is not None and found.p_value < 0.05
    assert alarms / RUNS > 0.5


@pytest.mark.parametrize("disturbed", [0.0, 0.05])
def test_a_planted_five_per_cent_is_found_over_processes_that_differ_by_one(disturbed: float) -> None:
    draw = np.random.default_rng(6)
    found = 0
    for _ in range(RUNS):
        base = _calls(draw, between=0.01, disturbed=disturbed)
        one = ratios.median_ratio(base, _calls(draw, between=0.01, factor=1.05, disturbed=disturbed), paired=True)
        # By Holm over three quantities, at the worst.
        found += one is not None and one.p_value < 0.05 / 3 and one.value > 1.02
    assert found / RUNS >= 0.95


def test_one_process_of_eight_on_each_side_is_set_aside() -> None:
    """Worked out by hand: -50 and 50 count as -2 and 2 for the spread, whose squares are 2·(4+4+1)=18, over 6·5."""
    found = ratios.trimmed_mean(np.array([50.0, -2, -1, 0, 0, 1, 2, -50]))
    assert (found.value, found.degrees) == (0.0, 5)
    assert found.deviation == pytest.approx((18 / 30) ** 0.5)
    low, high = found.interval(0.95)
    assert (low, high) == pytest.approx((-2.5706 * 0.6**0.5, 2.5706 * 0.6**0.5), rel=1e-4)
    # Below eight it is the mean with its usual error.
    seven = np.array([3.0, 1, 4, 1, 5, 9, 2])
    plain = ratios.trimmed_mean(seven)
    assert (plain.value, plain.degrees) == (pytest.approx(seven.mean()), 6)
    assert plain.deviation == pytest.approx(seven.std(ddof=1) / 7**0.5)


@pytest.mark.parametrize("between", [0.0, 0.05])
def test_the_interval_of_a_median_holds_between_processes(between: float) -> None:
    draw = np.random.default_rng(7)
    held = {True: 0, False: 0}
    for _ in range(RUNS):
        latencies, turns, processes = _run(draw, between=between)
        for apart in held:
            known = stats.summarize(latencies, turns=processes if apart else turns, apart=apart).p50_ns
            held[apart] += known is not None and known.low <= 1e6 <= known.high
    assert held[True] / RUNS >= 0.95 - STRAY
    assert between == 0 or held[False] < held[True]


def test_ctrl_c_again_and_again_loses_nothing_that_was_measured(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "dlops", "bench", str(make_artifact().directory), "--processes", "6", "--duration", "6",
        "--threads", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # Told every five seconds: then whole rounds are made.
        next(line for line in process.stderr if line.startswith("batch 1: "))
        for _ in range(12):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, errors = process.communicate(timeout=60)
    # The last of them may come when all is written and nothing is left to lose.
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert read_report(tmp_path / "out").partial
