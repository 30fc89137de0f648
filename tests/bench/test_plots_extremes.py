"""Every plot of rows that no good run makes: nothing, all the same, no interval, one down to zero."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlops.bench import plots
from dlops.bench.render import render_html
from dlops.bench.results import Measured
from dlops.report import Boundary, Interval, Load, Objective, ServerTime

NANOSECONDS = st.sampled_from([0, 1, 40, 999, 1_000, 250_000, 10**6, 3 * 10**9, 10**12])
RATES = st.sampled_from([0.0, 1e-3, 0.7, 12.0, 999.0, 5e6])
SHARES = st.sampled_from([0.0, 1e-4, 0.5, 0.9999, 1.0])


@st.composite
def intervals(draw: st.DrawFn, values: st.SearchStrategy[float]) -> Interval:
    value = draw(values)
    low = draw(st.sampled_from([None, 0.0, value / 2, value]))
    high = draw(st.sampled_from([None, value, value * 2, value + 1.0]))
    return Interval(value=value, low=low, high=high)


@st.composite
def changes(draw: st.DrawFn) -> tuple[dict[str, Any], np.ndarray]:
    """What is different of a row, and its latencies."""
    quantile = st.none() | intervals(NANOSECONDS.map(float))
    latencies = draw(st.lists(NANOSECONDS, min_size=1, max_size=12))
    boundary: Boundary = draw(st.sampled_from(["host", "network"]))
    rate = draw(st.sampled_from([None, 0.5, 100.0, 1e6])) if boundary == "network" else None
    parts = {name: float(draw(NANOSECONDS)) for name in ("queue_ns", "compute_infer_ns", "client_ns")}
    server = ServerTime(requests=1, items=0, executions=0, compute_input_ns=0.0, compute_output_ns=0.0, **parts)
    return {
        "boundary": boundary, "p50_ns": draw(quantile), "p99_ns": draw(quantile),
        "throughput": draw(intervals(RATES)), "speedup": draw(st.none() | intervals(RATES)),
        "load": Load(concurrency=draw(st.sampled_from([1, 8])), rate=rate), "accuracy": draw(st.none() | SHARES),
        "server": draw(st.sampled_from([None, server])) if boundary == "network" else None,
    }, np.array(latencies, np.int64)  # fmt: skip


@given(
    drawn=st.lists(changes(), min_size=1, max_size=5), limit_ns=NANOSECONDS.filter(bool),
    kept=st.none() | RATES.filter(bool),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_page_is_made_of_whatever_was_measured(example, drawn, limit_ns, kept) -> None:
    whole: Measured = example()
    like, rows, samples = whole.measurements[1], [], {}
    for number, (update, latencies) in enumerate(drawn):
        quantiles = {name: update.pop(name) for name in ("p50_ns", "p99_ns")}
        key = f"row{number:02d}"
        target = "http://127.0.0.1:1" if update["boundary"] == "network" else f"m/v{number}"
        rows.append(
            like.model_copy(
                update=update
                | {"samples": key, "target": target, "artifact": None, "paired_with": None}
                | {"latency": like.latency.model_copy(update=quantiles)}
            )
        )
        samples |= {key: latencies, f"{key}.starts": np.cumsum(latencies)}
    objective = Objective(quantile="p99", limit_ns=limit_ns, rate=kept)
    update = {"measurements": tuple(rows), "baseline": None, "objectives": {"http://127.0.0.1:1": objective}}
    report = whole.report.model_copy(update=update | {"chosen": None, "chosen_because": None})
    page = render_html(replace(whole, report=report, samples=samples).report, samples)
    assert page.count("<svg") >= 2
    places = re.findall(r'\b(?:x|y|x1|x2|y1|y2|cx|cy|width|height|points)="([^"]*)"', page)
    assert not [place for place in places if "nan" in place or "inf" in place]


def test_curves_of_latency_go_from_the_fastest_call_to_the_slowest(example) -> None:
    measured = example()
    row = measured.measurements[0]
    latencies = np.full(10_000, 1_000_000)
    latencies[0], latencies[-1] = 10_000, 100_000_000
    page = plots.latency_curves([plots.Series(row=row, number=0, latencies_ns=latencies)], 640)
    found = re.search(r'class="curve[^"]*" points="([^"]*)"', page)
    assert found is not None
    points = [tuple(float(one) for one in point.split(",")) for point in found[1].split(" ")]
    fastest, usual, slowest = points[0], points[len(points) // 2], points[-1]
    # Two decades to either side on a logarithmic axis.
    assert slowest[0] - usual[0] == pytest.approx(usual[0] - fastest[0], rel=0.02)
    assert fastest[1] > usual[1] > slowest[1]
