"""The highest rate that keeps an objective: how a rate is judged, and how the highest is found."""

from __future__ import annotations

import itertools
import math
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import dlops
from dlops.bench import cells, pacing, rates, reanalysis, sentences, service_rows, slo, stats
from dlops.bench.arrivals import Offered, poisson
from dlops.bench.openloop import OpenLoaded, open_loop
from dlops.bench.run import MeasureInterrupted, measure, save_report
from dlops.bench.slo import Found, Outcome, found_among, judge, parse_objective, search
from dlops.bench.table import table_text
from dlops.errors import UsageError
from dlops.report import Objective, Verdict

MS = 1_000_000


@pytest.mark.parametrize(
    ("text", "quantile", "limit_ns"),
    [("p99=20ms", "p99", 2e7), ("p90 = 1.5 s", "p90", 1.5e9), ("p50=500us", "p50", 5e5)],
)
def test_an_objective_is_a_quantile_and_a_time(text: str, quantile: str, limit_ns: float) -> None:
    assert parse_objective(text) == Objective(quantile=quantile, limit_ns=limit_ns)


def test_a_p99_is_judged_by_as_many_requests_as_loadgen_wants() -> None:
    assert [slo.samples_for(parse_objective(text)) for text in ("p99=1s", "p90=1s", "p50=1s")] == [662, 63, 10]


@pytest.mark.parametrize("text", ["p99", "p95=3ms", "p99=20", "p99=fast", "p99=0ms", "20ms", "p99=-3ms", ""])
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a quantile and a time"):
        parse_objective(text)


def test_share_bounds_are_those_of_the_binomial() -> None:
    # No late one of 299: (1 - p)^299 = 0.05 at p = 0.00997. Ten of ten: p^10 = 0.05 at p = 0.741.
    assert stats.share_bounds(0, 299) == pytest.approx((0, 1 - 0.05 ** (1 / 299)))
    assert stats.share_bounds(1, 10) == pytest.approx((0.05**0.1, 1))
    low, high = stats.share_bounds(0.01, 10_000)
    assert low == pytest.approx(0.0084, abs=0.0002)
    assert high == pytest.approx(0.0118, abs=0.0002)


@pytest.mark.parametrize(("late", "n"), [(29, 100), (7, 100)])
def test_share_bounds_of_a_whole_number_are_that_numbers(late: int, n: int) -> None:
    # 29 / 100 * 100 is below 29, 7 / 100 * 100 above 7.
    def at_least(count: int, p: float) -> float:
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))

    low, high = stats.share_bounds(late / n, n)
    assert at_least(late, low) == pytest.approx(0.05)
    assert at_least(late + 1, high) == pytest.approx(0.95)


def test_share_bounds_hold_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    counts = draw.binomial(1000, 0.01, 2000)
    bounds = {count: stats.share_bounds(count / 1000, 1000) for count in set(counts.tolist())}
    assert np.mean([bounds[count][1] >= 0.01 for count in counts.tolist()]) >= 0.95
    assert np.mean([bounds[count][0] <= 0.01 for count in counts.tolist()]) >= 0.95


def judged(example, late: np.ndarray, *, reasons: tuple[str, ...] = ()) -> str:
    row = example().report.measurements[4]
    row = row.model_copy(update={"verdict": row.verdict.model_copy(update={"reasons": reasons})})
    response = np.where(late, 30 * MS, 10 * MS)
    due = np.arange(len(late)) * MS
    return judge(row, response, due, Objective(quantile="p99", limit_ns=20 * MS))


def test_a_rate_is_judged_by_what_this_run_saw_of_our_own_lateness(example) -> None:
    """What a calibration says of the rate afterwards does not change the outcome: `--from` comes to the same."""
    late = np.arange(2000) % 10 == 0
    assert judged(example, late) == "missed"
    assert (
        judged(example, late, reasons=("client-bound: offered more than the 100 a second that one keeps",)) == "missed"
    )
    expected, seen = (
        f"client-bound: {why}" for why in ("offered more than the 100 a second", "1% of the requests left")
    )
    assert judged(example, late, reasons=(expected,)) == "missed"
    assert judged(example, late, reasons=(f"{seen} 3.0 ms late or more",)) == "unsure"


def test_a_rate_is_judged_by_the_share_of_late_requests(example) -> None:
    def spread(n: int, late: int) -> np.ndarray:
        flags = np.zeros(n, bool)
        flags[np.linspace(0, n - 1, late).astype(int)] = True
        return flags

    assert judged(example, spread(400, 0)) == "met"
    assert judged(example, spread(300, 0)) == "unsure", "too few to rule out one in a hundred"
    assert judged(example, spread(1000, 10)) == "unsure"
    assert judged(example, spread(1000, 30)) == "missed"
    # The same share in one cluster is worth far fewer samples.
    clustered = np.zeros(1000, bool)
    clustered[500:530] = True
    assert judged(example, clustered) == "unsure"


@pytest.mark.parametrize("load", [0.7, 0.9])
def test_a_queue_that_breaks_the_objective_is_seldom_said_to_keep_it(example, load: float) -> None:
    """M/D/1 with the limit at its 98th percentile, where p99 allows one in a hundred: late requests come in bursts."""
    service_ns, seconds, runs = 4 * MS, 3.0, 120

    def responses(due_ns: np.ndarray) -> np.ndarray:
        found, free = np.empty(len(due_ns)), 0.0
        for place, due in enumerate(due_ns):
            free = max(free, due) + service_ns
            found[place] = free - due
        return found

    rate = load * 1e9 / service_ns
    limit = float(np.quantile(responses(poisson(rate, duration_s=600, seed=999)), 0.98))
    row = example().report.measurements[4]
    row = row.model_copy(update={"verdict": row.verdict.model_copy(update={"reasons": ()})})
    met = 0
    for seed in range(runs):
        due_ns = poisson(rate, duration_s=seconds, seed=seed)
        met += judge(row, responses(due_ns), due_ns, Objective(quantile="p99", limit_ns=limit)) == "met"
    assert met <= 0.1 * runs


def test_a_miss_of_our_own_making_proves_nothing_and_saturation_is_a_miss(example) -> None:
    late = np.arange(1000) % 20 == 0
    assert judged(example, late) == "missed"
    assert judged(example, late, reasons=("client-bound: 1% of the requests left 3.0 ms late or more",)) == "unsure"
    never = np.zeros(1000, bool)
    assert judged(example, never, reasons=("client-bound: 1% of the requests left 3.0 ms late or more",)) == "met"
    assert judged(example, never, reasons=("saturated: 3 of 9 requests were answered in time",)) == "missed"


@pytest.mark.parametrize(
    ("outcomes", "unsure"),
    [({100.0: "met", 200.0: "unsure"}, True), ({100.0: "met", 200.0: "missed"}, False), ({100.0: "unsure"}, True)],
)
def test_a_rate_that_could_not_be_judged_is_not_said_to_have_missed(
    outcomes: dict[float, Outcome], unsure: bool, example
) -> None:
    tried: list[tuple[float, Outcome]] = []

    def probe(rate: float) -> Outcome:
        tried.append((rate, outcomes.get(rate, "missed" if rate > 100 else "unsure")))
        return tried[-1][1]

    found = search(probe, start=100.0, least=60.0, resolution=2.0)
    assert found == found_among(tried)
    assert found.unsure is unsure
    objective = Objective(quantile="p99", limit_ns=1e6, rate=found.met, missed=found.missed, unsure=found.unsure)
    report = example().report.model_copy(update={"objectives": {"it": objective}})
    (said,) = sentences.objectives(report)
    assert ("could not be judged" in said) is unsure


def test_a_search_that_was_cut_short_names_no_highest_rate(example) -> None:
    def said(**found: object) -> str:
        objective = Objective(quantile="p99", limit_ns=2e7, **found)
        return sentences.objectives(example().report.model_copy(update={"objectives": {"it": objective}}))[0]

    wanted = "p99 ≤ 20.0 ms"
    assert (
        said(rate=50.0) == f"it: 50.0 requests a second is the highest rate that kept {wanted}; the search ended there"
    )
    assert said(rate=50.0, missed=100.0, stopped="interrupted") == (
        f"it: 50.0 requests a second kept {wanted}; 100 did not; the search was interrupted"
    )
    assert said(missed=25.0, stopped="the server was gone") == (
        f"it: no rate tried certainly kept {wanted}; the lowest, 25.0 a second, did not; the search ended early: "
        "the server was gone"
    )


@pytest.mark.parametrize("capacity", [3.0, 77.0, 1234.0, 51_000.0])
@pytest.mark.parametrize("start", [1.0, 100.0, 3000.0])
def test_the_highest_rate_is_found_within_a_tenth(capacity: float, start: float) -> None:
    tried: list[float] = []

    def probe(rate: float) -> str:
        tried.append(rate)
        return "met" if rate <= capacity else "missed"

    found = search(probe, start=start)
    if start / 2**6 > capacity:
        assert found.met is None
        return
    assert found.met is not None
    assert found.missed is not None
    assert found.met <= capacity < found.missed <= 1.12 * found.met
    assert len(tried) < 30


def test_a_rate_that_cannot_be_judged_is_tried_twice_and_not_promised() -> None:
    tried: list[float] = []

    def probe(rate: float) -> str:
        tried.append(rate)
        return "met" if rate < 100 else "unsure"

    found = search(probe, start=64)
    assert found.met is not None
    assert found.met < 100
    assert tried.count(128) == 2
    outcomes = iter(["unsure", "met", "missed", "missed", "missed", "missed", "missed"])
    assert search(lambda rate: next(outcomes), start=64).met == 64


def test_the_search_goes_no_lower_than_it_can_certify() -> None:
    tried: list[float] = []

    def probe(rate: float) -> str:
        tried.append(rate)
        return "missed"

    assert search(probe, start=100, least=20) == Found(met=None, missed=25)
    assert tried == [100, 50, 25]


def test_a_service_of_known_capacity_is_found_out(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    one_at_a_time = threading.Lock()

    def slow(count: int) -> None:
        with one_at_a_time:
            time.sleep(0.005)

    server.behave = slow
    # Under 200 a second at most, whatever the machine; what it certainly keeps within a second is well above 20. A
    # machine that stands still meanwhile leaves a search unsure, and rightly so.
    for _ in range(3):
        measured = measure(
            [server.url], payload=artifact, duration_s=0.5, offered=Offered(objective=parse_objective("p90=1s"))
        )
        (objective,) = measured.report.objectives.values()
        if objective.rate is not None:
            break
        assert objective.unsure
    assert objective.rate is not None
    assert 15 < objective.rate < 220
    assert objective.missed is not None
    assert objective.missed > objective.rate
    rates = [row.load.rate for row in measured.measurements]
    assert rates == sorted(rates)
    report = save_report(measured, tmp_path / "report")
    assert dlops.read_report(report.directory).objectives == measured.report.objectives
    assert "requests a second is the highest rate that kept p90 ≤ 1,000 ms" in " ".join(sentences.objectives(report))
    assert "the highest rate that kept" in " ".join(table_text(report).split())


def test_a_rate_that_is_tried_twice_says_which_try_a_row_is(make_artifact, serve, monkeypatch) -> None:
    artifact, outcomes = make_artifact(), iter(["met", "unsure", "missed"])
    monkeypatch.setattr(service_rows, "judge", lambda *arguments: next(outcomes))
    monkeypatch.setattr(service_rows, "search", partial(search, resolution=2.0))
    offered = Offered(objective=parse_objective("p50=500ms"))
    measured = measure([serve(artifact).url], payload=artifact, offered=offered, duration_s=0.3)
    first, second, third = measured.measurements
    assert second.load.rate == third.load.rate == 2 * first.load.rate
    assert [row.load.attempt for row in (first, second, third)] == [1, 1, 2]


def test_a_rate_that_is_asked_for_and_searched_too_has_rows_of_other_names(make_artifact, serve, monkeypatch) -> None:
    artifact, outcomes = make_artifact(), iter(["unsure", "missed"])
    monkeypatch.setattr(service_rows, "judge", lambda *arguments: next(outcomes))
    monkeypatch.setattr(service_rows, "search", lambda probe, **options: search(probe, start=50.0, least=50.0))
    offered = Offered(rates=(50.0,), objective=parse_objective("p50=500ms"))
    measured = measure([serve(artifact).url], payload=artifact, offered=offered, duration_s=0.3)
    assert [row.load.rate for row in measured.measurements] == [50.0] * 3
    assert [row.load.attempt for row in measured.measurements] == [1, 2, 3]
    assert [cells.offered(row.load) for row in measured.measurements] == [
        "50 a second", "50 a second (second try)", "50 a second (third try)"
    ]  # fmt: skip


def test_a_search_that_a_server_ends_keeps_what_it_found(make_artifact, serve, monkeypatch) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    # After the second rate it answers nothing.
    probes = itertools.count(1)

    def judged(*arguments: object) -> str:
        if next(probes) == 2:
            server.behave = lambda count: (503, b"{}")
        return "met"

    monkeypatch.setattr(service_rows, "judge", judged)
    offered = Offered(objective=parse_objective("p50=50ms"))
    measured = measure([server.url], payload=artifact, offered=offered, duration_s=0.3)
    assert measured.partial
    assert any("no request succeeded" in note for note in measured.report.notes)
    (found,) = measured.report.objectives.values()
    assert found.rate == max(row.load.rate for row in measured.measurements)
    assert len(found.tried) == 2
    (said,) = sentences.objectives(measured.report)
    assert "is the highest" not in said
    assert "requests a second kept p50 ≤ 50.0 ms; the search ended early: no request succeeded" in said
    assert found.stopped in said


def test_a_server_that_dies_missed_no_rate_and_ends_the_search(make_artifact, serve, monkeypatch) -> None:
    """Of the second rate nobody answers the later half, for less than two seconds."""
    artifact, calls = make_artifact(), itertools.count(1)

    def dying(*arguments: object, **options: object) -> OpenLoaded:
        loaded = open_loop(*arguments, **options)
        if next(calls) == 1:
            return loaded
        refused = loaded.due_ns > loaded.due_ns[-1] * 0.8
        return replace(loaded, outcome=np.where(refused, pacing.REFUSED, loaded.outcome))

    monkeypatch.setattr(rates, "open_loop", dying)
    monkeypatch.setattr(service_rows, "judge", lambda *arguments: "met")
    offered = Offered(objective=parse_objective("p50=500ms"))
    measured = measure([serve(artifact).url], payload=artifact, offered=offered, duration_s=0.5)
    first, second = measured.measurements
    assert pacing.GONE_AT_END in second.verdict.reasons
    assert not any(reason.startswith(("saturated", "not steady: the median")) for reason in second.verdict.reasons)
    (found,) = measured.report.objectives.values()
    assert (found.rate, found.missed, found.tried) == (first.load.rate, None, (first.samples,))
    assert found.stopped is not None
    assert found.stopped.startswith(f"the server was gone at {second.load.rate:,.5g} a second (connection refused")
    assert measured.partial


def test_a_rate_that_ctrl_c_cut_short_is_not_judged_later_either(make_artifact, serve, monkeypatch, tmp_path) -> None:
    artifact = make_artifact()
    real, calls = service_rows.measure_rate, itertools.count(1)

    def interrupted(*arguments: object, **options: object) -> object:
        row, samples, loaded = real(*arguments, **options)
        return row, samples, replace(loaded, interrupted=next(calls) == 2)

    monkeypatch.setattr(service_rows, "measure_rate", interrupted)
    for module in (service_rows, reanalysis):
        monkeypatch.setattr(module, "judge", lambda *arguments: "met")
    offered = Offered(objective=parse_objective("p50=500ms"))
    with pytest.raises(MeasureInterrupted) as caught:
        measure([serve(artifact).url], payload=artifact, offered=offered, duration_s=0.3)
    (found,) = caught.value.measured.report.objectives.values()
    assert len(caught.value.measured.measurements) == 2
    assert len(found.tried) == 1
    assert found.rate == min(row.load.rate for row in caught.value.measured.measurements)
    assert found.stopped == "interrupted"
    (said,) = sentences.objectives(caught.value.measured.report)
    kept = "requests a second kept p50 ≤ 500 ms; the search was interrupted before a higher one was judged"
    assert kept in said
    report = save_report(caught.value.measured, tmp_path / "report")
    assert dlops.reanalyse(report).report.objectives == report.objectives


def test_what_stands_against_the_row_is_said_of_its_rate(make_artifact, serve, monkeypatch) -> None:
    artifact, outcomes = make_artifact(), iter(["met", "missed"])
    monkeypatch.setattr(service_rows, "judge", lambda *arguments: next(outcomes, "met"))
    offered = Offered(objective=parse_objective("p50=500ms"))
    measured = measure([serve(artifact).url], payload=artifact, offered=offered, duration_s=0.3)
    (found,) = measured.report.objectives.values()

    def said(*reasons: str, steady: bool = False, remarks: tuple[str, ...] = ()) -> str:
        verdict = Verdict(steady=steady, reasons=(*reasons, *remarks), remarks=remarks)
        rows = tuple(
            row.model_copy(update={"verdict": verdict})
            if row.load.rate == found.rate else row
            for row in measured.measurements
        )  # fmt: skip
        return " ".join(sentences.objectives(measured.report.model_copy(update={"measurements": rows})))

    bound, short = "client-bound: it was", "under-sampled: p99 is not certified"
    assert "not to be quoted" not in said(short, steady=True, remarks=("for 60 s it would be",))
    told = said(bound, short, remarks=("for 60 s it would be",))
    assert told.endswith(f"; its row is not to be quoted: {bound}")
    assert said(short).endswith(f"; its row is not to be quoted: {short}")
