"""Latency against load: the curves, an objective's line and the knee, of a queue whose times are known."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dlops.bench import cells, plots_load, sentences
from dlops.bench.knee import knee
from dlops.bench.plots import Series
from dlops.bench.plots_frame import NARROW, WIDE
from dlops.bench.render import render_html
from dlops.bench.results import Measured
from dlops.bench.stats import rate_interval, summarize
from dlops.report import Load, Measurement, Objective, Verdict

URL = "http://127.0.0.1:3000"
SERVICE_NS = 1_000_000


def under(rate: float | None, number: int, *, concurrency: int = 1) -> tuple[Measurement, np.ndarray]:
    """A row as a queue with 1 ms of exponential service would give it: mean time 1/(1 - rho) ms."""
    offered = rate if rate is not None else 900.0 * concurrency / (concurrency + 1)
    mean = SERVICE_NS / (1 - offered / 1000)
    draw = np.random.default_rng(number)
    times = np.asarray(draw.exponential(mean, 3000), np.int64) + 1
    row = Measurement(
        target=URL, artifact=None, runtime="x", provider="unknown", device="unknown", precision="unknown",
        threads=None, warmup_calls=100, boundary="network",
        load=Load(scenario="server" if rate else "multi_stream", concurrency=concurrency, rate=rate),
        samples=f"row{number:02d}", latency=summarize(times), service=summarize(times) if rate else None,
        throughput=rate_interval(np.full(30, offered / 10), np.full(30, 0.1)), duration_ns=3_000_000_000,
        verdict=Verdict(steady=True),
    )  # fmt: skip
    return row, times


RATES = (100.0, 300.0, 500.0, 800.0, 950.0)


def rows_of(rates=RATES, in_flight=()) -> tuple[list[Measurement], dict[str, np.ndarray]]:
    made = [under(rate, number) for number, rate in enumerate(rates)]
    made += [under(None, 50 + calls, concurrency=calls) for calls in in_flight]
    return [row for row, _ in made], {row.samples: times for row, times in made}


def series_of(rows, samples) -> list[Series]:
    return [Series(row=row, number=number, latencies_ns=samples[row.samples]) for number, row in enumerate(rows)]


def test_the_knee_of_a_queue_is_where_half_of_it_is_used() -> None:
    # An M/M/1 queue has most power at a load of one half.
    rows, _ = rows_of()
    assert knee(rows).load.rate == 500.0
    assert knee(rows[:3]) is None  # it may lie beyond the heaviest load
    assert knee(rows[2:]) is None
    assert knee(rows[1:3]) is None
    # The heaviest load tried twice is still the heaviest, and one at which the client was the limit tells nothing.
    assert knee([*rows[:3], rows[2]]) is None
    bound = rows[3].model_copy(update={"verdict": Verdict(steady=False, reasons=("client-bound: it left late",))})
    assert knee([*rows[:3], bound]) is None


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_curves_have_a_point_a_quantile_the_limit_and_the_knee(width: int) -> None:
    drawn = series_of(*rows_of())
    kept = Objective(quantile="p99", limit_ns=20e6, rate=700.0, missed=760.0)
    text = plots_load.latency_against_rate(drawn, width, [kept])
    assert text.count("<circle") == 2 * len(RATES)
    assert "p99 ≤ 20.0 ms" in text
    assert "kept to 700 a second" in text
    cut_short = kept.model_copy(update={"stopped": "interrupted"})
    assert "kept at least to 700 a second" in plots_load.latency_against_rate(drawn, width, [cut_short])
    assert "knee: 500" in text
    places = [float(x) for x in re.findall(r'class="limit" x1="([\d.]+)"', text)]
    assert len(places) == 2
    # The upright line lies between the rates around it.
    circles = sorted({float(x) for x in re.findall(r'<circle class="[^"]*" cx="([\d.]+)"', text)})
    assert circles[2] < places[1] < circles[3]


def test_an_objective_that_no_rate_kept_has_its_limit_and_one_far_off_is_left_out() -> None:
    drawn = series_of(*rows_of())
    missed = Objective(quantile="p50", limit_ns=1e6, missed=100.0)
    text = plots_load.latency_against_rate(drawn, WIDE, [missed, Objective(quantile="p99", limit_ns=1e12, rate=950.0)])
    assert "p50 ≤ 1.00 ms" in text
    assert "kept to" not in text
    assert "p99 ≤" not in text


def test_a_second_try_is_named_so_and_what_has_no_quantile_is_said_not_to_be_drawn(example) -> None:
    rows, samples = rows_of()
    unknown = rows[4].latency.model_copy(update={"p50_ns": None, "p90_ns": None, "p99_ns": None})
    again = rows[4].load.model_copy(update={"attempt": 2})
    rows.append(rows[4].model_copy(update={"latency": unknown, "load": again}))
    assert cells.name(rows[5]) == f"{URL} at 950 a second (second try)"
    assert cells.short_name(rows[5]) == f"{URL} @950 (second try)"
    report = example().report.model_copy(update={"measurements": tuple(rows), "chosen": None})
    not_drawn = f"Not drawn, for too few calls to give a quantile: {cells.name(rows[5])}."
    assert not_drawn in render_html(report, samples)
    whole = report.model_copy(update={"measurements": tuple(rows[:5])})
    assert "Not drawn" not in render_html(whole, samples)


def test_calls_in_flight_make_a_curve_of_two_or_more() -> None:
    rows, samples = rows_of(rates=(), in_flight=(1, 4, 16))
    drawn = series_of(rows, samples)
    assert plots_load.in_flight(drawn) == drawn
    assert plots_load.in_flight(drawn[:1]) == []
    assert plots_load.latency_against_throughput(drawn, WIDE).count("<polyline") == 2


def test_a_throughput_that_may_have_been_nothing_is_drawn_from_the_edge() -> None:
    rows, samples = rows_of(rates=(), in_flight=(1, 4))
    unsure = rows[1].throughput.model_copy(update={"low": 0.0, "high": 5000.0})
    drawn = series_of([rows[0], rows[1].model_copy(update={"throughput": unsure})], samples)
    text = plots_load.latency_against_throughput(drawn, WIDE)
    assert re.search(r'<line class="bar s1" x1="64\.0"', text)


def test_the_page_and_the_tables_have_them(example) -> None:
    rows, samples = rows_of(in_flight=(1, 2, 4, 8))
    objective = Objective(quantile="p99", limit_ns=20e6, rate=700.0, missed=760.0)
    report = example().report.model_copy(
        update={"measurements": tuple(rows), "objectives": {cells.service(rows[0]): objective}, "chosen": None}
    )
    page = render_html(Measured(report=report, samples=samples).report, samples)
    assert page.count("Response time against rate") >= 2
    assert "Latency against throughput" in page
    assert "kept to 700 a second" in page
    said = sentences.explanations(report)
    assert any("at 500 a second is the knee" in line for line in said), said


def test_the_knee_in_words_is_the_one_that_is_drawn(example) -> None:
    rows, samples = rows_of()
    unknown = rows[2].latency.model_copy(update={"p50_ns": None, "p99_ns": None})
    rows[2] = rows[2].model_copy(update={"latency": unknown})
    (drawn,) = plots_load.knees(plots_load.at_rates(series_of(rows, samples))).values()
    (said,) = sentences.knees(example().report.model_copy(update={"measurements": tuple(rows)}))
    assert f"{cells.name(drawn.row)} is the knee" in said


def test_two_services_of_one_artifact_are_told_apart(example) -> None:
    rows, samples = rows_of(rates=(), in_flight=(1, 4, 16))
    rows = [row.model_copy(update={"artifact": "onnx-fp32"}) for row in rows]
    slower = [row.model_copy(update={"target": "http://127.0.0.1:4000", "samples": f"{row.samples}b"}) for row in rows]
    samples |= {f"{key}b": 2 * times for key, times in samples.items()}
    report = example().report.model_copy(update={"measurements": (*rows, *slower), "chosen": None})
    titles = [group.title for group in cells.groups(report)]
    assert titles == [f"over HTTP, batch 1, {url}" for url in (URL, "http://127.0.0.1:4000")]
    # One curve for each, not one through the points of both.
    page = render_html(report, samples)
    assert page.count("<h3>Latency against throughput</h3>") == 2
    alone = report.model_copy(update={"measurements": tuple(rows)})
    assert [group.title for group in cells.groups(alone)] == ["over HTTP, batch 1"]
