"""How long a row is measured, by what its pilot shows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from dlops.bench import inprocess_rates, service_rows, stats
from dlops.bench.arrivals import Offered
from dlops.bench.pilot import LONGEST_S, Length, half_width, length, seconds_wanted, shortfalls
from dlops.bench.run import MeasureInterrupted, measure
from dlops.cli import run
from dlops.errors import UsageError
from dlops.report import STARTS, read_report


def drawn(n: int, *, spread: float, seed: int = 0, tail: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Latencies around 1 ms, lognormal, and the turns they were made in, 100 to a turn.

    tail: the spread of one call in thirty, which takes about twice as long as the others.
    """
    draw = np.random.default_rng(seed)
    latencies = 1e6 * np.exp(spread * draw.standard_normal(n))
    if tail:
        slow = draw.random(n) < 1 / 30
        latencies[slow] = 2e6 * np.exp(tail * draw.standard_normal(n)[slow])
    return np.asarray(latencies, np.int64), np.arange(n) // 100


def test_what_is_known_well_enough_takes_no_longer() -> None:
    samples, turns = drawn(20_000, spread=0.05)
    assert seconds_wanted(samples, turns=turns, spent_s=3.0) == 3.0


@pytest.mark.parametrize(("spread", "tail", "limiting"), [(0.5, 0.0, 0.5), (0.05, 0.5, 0.99)])
def test_the_time_a_pilot_asks_for_is_enough_and_not_far_too_much(spread: float, tail: float, limiting: float) -> None:
    widths: dict[float, list[float]] = {0.5: [], 0.99: []}
    for seed in range(10):
        samples, turns = drawn(4000, spread=spread, tail=tail, seed=seed)
        takes_s = seconds_wanted(samples, turns=turns, spent_s=1.0)
        assert takes_s > 1.0
        more, more_turns = drawn(round(4000 * takes_s), spread=spread, tail=tail, seed=100 + seed)
        for q, wanted in {0.5: 0.01, 0.99: 0.05}.items():
            widths[q].append((half_width(stats.quantile_interval(more, q, turns=more_turns)) or 9) / wanted)
    medians = {q: float(np.median(of_q)) for q, of_q in widths.items()}
    assert max(medians.values()) <= 1.0
    # The quantile that is hardest to know decides, and it is known no better than asked.
    assert max(medians, key=lambda q: medians[q]) == limiting
    assert medians[limiting] > 0.5


def test_a_pilot_that_certifies_no_p99_asks_for_enough_to_do_so() -> None:
    samples, turns = drawn(300, spread=0.01)
    takes_s = seconds_wanted(samples, turns=turns, spent_s=3.0)
    assert takes_s > 3.0 * 2 * stats.certifying_samples(0.99) / 300


def test_a_pilot_whose_p99_has_an_interval_and_is_not_certified_goes_on() -> None:
    # Next to no spread, and every turn sees all of it: the intervals are as narrow as is asked for.
    order = np.arange(600)
    samples, turns = 1_000_000 + 37 * order % 600, order // 120
    assert stats.fewest_samples(0.99) < 600 < stats.certifying_samples(0.99)
    known = [half_width(stats.quantile_interval(samples, q, turns=turns)) for q in (0.5, 0.99)]
    assert all(width is not None and width < 0.01 for width in known)
    assert seconds_wanted(samples, turns=turns, spent_s=1.0) > stats.certifying_samples(0.99) / 600


def test_intervals_still_hold_where_a_pilot_ends_the_run() -> None:
    covered = looks = 0
    for seed in range(200):
        samples, turns = drawn(40_000, spread=0.3, seed=seed)
        spent = 1.0
        lasting = Length(first_s=1.0, longest_s=40.0)
        for _ in range(4):
            n = round(spent * 1000)
            longer = lasting.after(samples[:n], turns=turns[:n], spent_s=spent)
            if longer <= spent:
                break
            looks += 1
            spent = longer
        n = round(spent * 1000)
        interval = stats.quantile_interval(samples[:n], 0.5, turns=turns[:n])
        assert interval is not None
        covered += interval.low <= 1e6 <= interval.high
    assert looks > 200
    # 95 % less three standard errors of a simulation of 200.
    assert covered / 200 >= 0.95 - 3 * 0.0154


def test_the_parts_of_a_row_know_it_together() -> None:
    samples, turns = drawn(4000, spread=0.5)
    lasting = length(None, 30.0)
    alone, part = (lasting.part(parts).after(samples, turns=turns, spent_s=0.5) for parts in (1, 4))
    assert part == pytest.approx(alone / 4, rel=0.01)
    assert (lasting.part(4).first_s, lasting.part(4).longest_s) == (lasting.first_s / 4, 7.5)


def test_a_named_duration_is_kept_whatever_is_known_then() -> None:
    samples, turns = drawn(1000, spread=0.5)
    lasting = length(2.0)
    assert (str(lasting), lasting.after(samples, turns=turns, spent_s=2.0)) == ("2 s", 2.0)


def test_what_the_longest_row_does_not_reach_is_said_with_what_it_would_take() -> None:
    samples, turns = drawn(1000, spread=0.5)
    lasting = length(None, 3.0)
    assert lasting == Length(first_s=3.0, longest_s=3.0)
    # The longest may be the pilot, and less: then it is only said.
    assert lasting.after(samples, turns=turns, spent_s=3.0) == 3.0
    lasting = length(None, 4.0)
    assert str(lasting) == "3 to 4 s"
    assert lasting.after(samples, turns=turns, spent_s=3.0) == 4.0
    assert lasting.after(samples, turns=turns, spent_s=4.1) == 4.1
    latency = stats.summarize(samples, turns=turns)
    said = shortfalls(latency, spent_s=4.1)
    assert any(one.startswith("under-sampled: p50 is known to ±") and "4 s were spent" in one for one in said)
    assert any(one.endswith("processes, 8 were measured") for one in shortfalls(latency, spent_s=4.1, processes=8))
    samples, turns = drawn(20_000, spread=0.05)
    assert shortfalls(stats.summarize(samples, turns=turns), spent_s=3.0) == ()
    assert length(None).longest_s == LONGEST_S


@pytest.mark.parametrize(
    ("duration_s", "longest_s"),
    [(0.0, 30.0), (-1.0, 30.0), (math.inf, 30.0), (math.nan, 30.0), (None, 0.0), (None, math.nan)],
)
def test_no_time_is_refused(duration_s: float | None, longest_s: float) -> None:
    with pytest.raises(UsageError):
        length(duration_s, longest_s)


def unsure(row) -> str:
    """What a row says of its median where nothing is known to a hundred-thousandth."""
    # On a busy machine the median of so few turns may not be certified at all.
    starts = ("under-sampled: p50 is known", "under-sampled: p50 is not certified")
    known = [one for one in row.verdict.reasons if one.startswith(starts)]
    assert len(known) == 1, row.verdict
    assert "not certified" in known[0] or known[0] in row.verdict.remarks, row.verdict
    return known[0]


@pytest.fixture
def never_sure(monkeypatch) -> None:
    """Nothing is known to a hundred-thousandth after a quarter of a second."""
    monkeypatch.setattr("dlops.bench.pilot.WANTED", {0.5: 1e-5})
    monkeypatch.setattr("dlops.bench.pilot.PILOT_S", 0.25)


@pytest.mark.usefixtures("never_sure")
def test_rows_that_stay_unsure_last_longer_and_say_so_in_process_and_over_http(make_artifact, serve) -> None:
    artifact = make_artifact()
    service = serve(artifact).url
    # Six times the pilot: of a machine that stands still meanwhile less might come than of that, which is kept then.
    measured = measure([artifact, service], payload=artifact, threads=1, max_duration_s=1.5)
    local, served = measured.measurements
    assert measured.samples[local.samples + STARTS][-1] > 1.2e9
    assert served.duration_ns >= 1.5e9
    for row in (local, served):
        unsure(row)


@pytest.mark.usefixtures("never_sure")
def test_a_row_of_a_named_duration_says_how_unsure_it_is(make_artifact, serve) -> None:
    artifact = make_artifact()
    service = serve(artifact).url
    measured = measure(
        [artifact, service], payload=artifact, threads=1, duration_s=0.2, scenarios=("server",),
        offered=Offered(rates=(300,)),
    )  # fmt: skip
    assert [row.boundary for row in measured.measurements] == ["host", "network"]
    for row in measured.measurements:
        unsure(row)
        # Three times as long, as so few requests come.
        assert row.duration_ns == pytest.approx(0.6e9)


@pytest.mark.usefixtures("never_sure")
def test_a_queue_in_front_of_a_session_has_a_pilot_too(make_artifact, monkeypatch) -> None:
    scheduled = []
    real = inprocess_rates.measure_queue

    def watched(one, schedule, **options):
        scheduled.append(schedule)
        return real(one, schedule, **options)

    monkeypatch.setattr(inprocess_rates, "measure_queue", watched)
    measured = measure(
        [make_artifact()], threads=1, scenarios=("server",), offered=Offered(rates=(1400,)), max_duration_s=0.75
    )
    (row,) = measured.measurements
    # 662 requests take that long; then it is made anew at other times, for as long as it may last.
    assert [schedule.duration_s for schedule in scheduled] == [pytest.approx(662 / 1400), pytest.approx(0.75)]
    assert scheduled[0].due_ns[0] != scheduled[1].due_ns[0]
    assert row.duration_ns == pytest.approx(scheduled[1].duration_s * 1e9)
    assert len(measured.samples[row.samples]) == row.latency.samples
    unsure(row)


@pytest.mark.parametrize(
    ("load", "how"),
    [("measure_endpoint", {"concurrency": (2,)}), ("measure_rate", {"offered": Offered(rates=(200,))})],
    ids=["calls in flight", "at a rate"],
)
def test_ctrl_c_before_the_longer_run_has_anything_keeps_the_pilot(
    load, how, make_artifact, serve, monkeypatch
) -> None:
    monkeypatch.setattr("dlops.bench.pilot.WANTED", {0.5: 1e-5})
    monkeypatch.setattr("dlops.bench.pilot.PILOT_S", 0.25)
    real, made = getattr(service_rows, load), []

    def second_is_interrupted(*arguments, **options):
        if made:
            raise KeyboardInterrupt
        row, *rest = real(*arguments, **options)
        # What saturates is not measured for longer, and a machine that stands still for a moment looks like that.
        row = row.model_copy(update={"verdict": row.verdict.model_copy(update={"reasons": ()})})
        made.append((row, *rest))
        return made[0]

    monkeypatch.setattr(service_rows, load, second_is_interrupted)
    artifact = make_artifact()
    with pytest.raises(MeasureInterrupted) as interruption:
        measure([serve(artifact).url], payload=artifact, **how)
    (row,) = interruption.value.measured.measurements
    assert interruption.value.measured.partial
    assert row.latency == made[0][0].latency
    assert len(interruption.value.measured.samples[row.samples]) == row.latency.samples


def test_ctrl_c_early_in_the_longer_run_keeps_the_pilot_that_has_more(make_artifact, serve, monkeypatch) -> None:
    monkeypatch.setattr("dlops.bench.pilot.WANTED", {0.5: 1e-5})
    monkeypatch.setattr("dlops.bench.pilot.PILOT_S", 0.25)
    real, made = service_rows.measure_endpoint, []

    def second_has_three_calls(*arguments, **options):
        made.append(real(*arguments, **options))
        row, samples, loaded = made[-1]
        if len(made) == 1:
            return made[-1]
        few = {key: array[:3] for key, array in samples.items()}
        row = row.model_copy(update={"latency": row.latency.model_copy(update={"samples": 3})})
        return row, few, replace(loaded, interrupted=True)

    monkeypatch.setattr(service_rows, "measure_endpoint", second_has_three_calls)
    artifact = make_artifact()
    with pytest.raises(MeasureInterrupted) as interruption:
        measure([serve(artifact).url], payload=artifact, concurrency=(2,))
    measured = interruption.value.measured
    (row,) = measured.measurements
    assert len(made) == 2
    assert measured.partial
    assert row.latency == made[0][0].latency
    assert len(measured.samples[row.samples]) == row.latency.samples


def test_a_low_rate_is_kept_up_no_longer_than_the_longest_a_row_may_last(make_artifact, serve, monkeypatch) -> None:
    monkeypatch.setattr("dlops.bench.pilot.PILOT_S", 0.25)
    artifact = make_artifact()
    service = serve(artifact).url
    (row,) = measure([service], payload=artifact, offered=Offered(rates=(20,)), max_duration_s=0.5).measurements
    assert row.duration_ns == pytest.approx(0.5e9)
    # A named duration is what an independent p99 at a low rate may take three times.
    (row,) = measure([service], payload=artifact, offered=Offered(rates=(20,)), duration_s=0.2).measurements
    assert row.duration_ns == pytest.approx(0.6e9)


def test_the_command_takes_the_longest_a_row_may_last(make_artifact, tmp_path, capsys) -> None:
    artifact = make_artifact()
    status = run(
        ["bench", str(artifact.directory), "--max-duration", "0.2", "--threads", "1", "--out", str(tmp_path / "r")]
    )
    assert status in (0, 3)
    assert "0.2 s a row" in capsys.readouterr().err
    assert len(read_report(tmp_path / "r").measurements) == 1


def test_a_duration_and_a_longest_one_are_refused_together(make_artifact, capsys) -> None:
    folder = str(make_artifact().directory)
    assert run(["bench", folder, "--duration", "1", "--max-duration", "2"]) == 2
    assert "--duration sets the seconds" in capsys.readouterr().err
    assert run(["bench", folder, "--duration", "inf"]) == 2
    assert "a duration of inf s" in capsys.readouterr().err
