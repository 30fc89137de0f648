"""MLPerf's scenarios: what each asks, what is refused, and the queue in front of a session."""

from __future__ import annotations

import csv
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dlops
from dlops.bench import cells, inprocess, session_rows
from dlops.bench.arrivals import Offered
from dlops.bench.fifo import keep_schedule
from dlops.bench.inprocess import Subject
from dlops.bench.results import choose_fastest, save_report
from dlops.bench.run import measure
from dlops.bench.scenarios import METRICS, Asked, Step, load_of, steps
from dlops.bench.slo import parse_objective
from dlops.bench.table import table_text, to_csv, to_markdown
from dlops.cli import run
from dlops.errors import UsageError
from dlops.report import Load, read_report

RATE = Offered(rates=(50.0,))


def planned(*, in_process: bool = True, over_network: bool = False, most_items: int = 64, **asked: Any) -> list[Step]:
    return steps(Asked(**asked), in_process=in_process, over_network=over_network, most_items=most_items)


def test_each_scenario_asks_what_mlperf_means_by_it() -> None:
    found = planned(scenarios=("offline", "server", "multi_stream", "single_stream"), offered=RATE)
    assert [(step.scenario, step.batch, step.concurrency, step.offered) for step in found] == [
        ("single_stream", 1, (1,), None),
        ("multi_stream", 8, (1,), None),
        ("server", 1, (), RATE),
        ("offline", 32, (8,), None),
    ]


def test_offline_takes_what_the_model_takes_or_what_is_asked() -> None:
    assert [step.batch for step in planned(scenarios=("offline",), most_items=4)] == [4]
    assert [step.batch for step in planned(scenarios=("offline",), batch=(16, 2))] == [2, 16]
    assert [step.batch for step in planned(scenarios=("multi_stream",), samples_per_query=3)] == [3]


def test_without_scenarios_a_load_is_named_for_what_it_amounts_to() -> None:
    assert [step.scenario for step in planned(batch=(1, 8))] == [None, None]
    assert load_of(None, batch=1) == Load(scenario="single_stream")
    assert load_of(None, batch=8) == Load(scenario="offline", batch=8)
    assert load_of(None, batch=1, concurrency=8) == Load(scenario="offline", concurrency=8)
    assert load_of(None, batch=1, rate=5.0) == Load(scenario="server", rate=5.0)
    assert {scenario: load_of(scenario, batch=1).metric for scenario in METRICS} == METRICS


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"scenarios": ("server",)}, "server needs a rate"),
        ({"scenarios": ("single_stream",), "offered": RATE}, "a rate is for --scenario server"),
        ({"scenarios": ("single_stream",), "batch": (8,)}, "--batch is for --scenario offline"),
        ({"scenarios": ("offline",), "samples_per_query": 8}, "is for --scenario multi_stream"),
        ({"scenarios": ("offline",), "concurrency": (8,)}, "at URLs"),
        ({"scenarios": ("server",), "offered": Offered(rates=(5.0,), arrivals="constant")}, "Poisson arrivals"),
        ({"scenarios": ("server",), "offered": Offered(rates=(5.0,), pauses=(1.0, 1.0))}, "Poisson arrivals"),
        ({"scenarios": ("server",), "offered": Offered(objective=parse_objective("p99=1ms"))}, "--slo is for URLs"),
        ({"scenarios": ("server",), "offered": Offered(rates=(5.0,), senders=2)}, "--senders is for URLs"),
        ({"scenarios": ("multi_stream",), "samples_per_query": 0}, "samples per query 0"),
        ({"engine": "loadgen"}, "runs MLPerf's scenarios"),
        ({"samples_per_query": 8}, "is for --scenario multi_stream"),
        ({"offered": RATE}, "a rate is for URLs"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(asked, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        planned(**asked)


class Clock:
    """Time moves by what is waited for and by what calls take. stops_at: when it is told to end."""

    def __init__(self, stops_at: int | None = None) -> None:
        self.time, self._stops_at = 0, stops_at

    def now_ns(self) -> int:
        return self.time

    def wait_until(self, due_ns: int) -> bool:
        self.time = max(self.time, due_ns)
        return self._stops_at is None or self.time < self._stops_at


def test_requests_wait_in_line_for_the_one_before_them() -> None:
    clock = Clock()

    def call() -> None:
        clock.time += 10

    due = np.array([0, 4, 30, 31])
    kept = keep_schedule(call, due, give_up_ns=1000, ticker=clock)
    assert kept.begun_ns.tolist() == [0, 10, 30, 40]
    assert (kept.ended_ns - due).tolist() == [10, 16, 10, 19]
    assert kept.lag_ns(due).tolist() == [0, 0, 0, 0]
    assert not kept.interrupted


def test_a_backlog_is_given_up_and_ctrl_c_ends_it() -> None:
    def run_until(give_up_ns: int, stops_at: int | None) -> tuple[list[int], bool]:
        clock = Clock(stops_at)

        def call() -> None:
            clock.time += 10

        kept = keep_schedule(call, np.array([0, 1, 2, 3]), give_up_ns=give_up_ns, ticker=clock)
        return kept.begun_ns.tolist(), kept.interrupted

    assert run_until(15, None) == ([0, 10, -1, -1], False)
    assert run_until(1000, 20) == ([0, 10, -1, -1], True)


@pytest.fixture(scope="module")
def options() -> list[str]:
    every = [word for scenario in METRICS for word in ("--scenario", scenario)]
    return [*every, "--rate", "100", "--batch", "4", "--samples-per-query", "2", "--duration", "0.2", "--threads", "1"]


def test_the_command_runs_every_scenario_in_process(make_artifact, options, tmp_path, capsys) -> None:
    artifact = make_artifact()
    status = run(["bench", str(artifact.directory), *options, "--out", str(tmp_path / "out")])
    assert status in (0, 3)
    report = read_report(tmp_path / "out")
    rows = {row.load.scenario: row for row in report.measurements}
    assert {name: (row.load.batch, row.load.metric, row.load.rate) for name, row in rows.items()} == {
        "single_stream": (1, "p90", None), "multi_stream": (2, "p99", None), "server": (1, "p99", 100.0),
        "offline": (4, "throughput", None),
    }  # fmt: skip
    server = rows["server"]
    assert server.service is not None
    assert server.lag_p99_ns is not None
    assert server.latency.mean_ns >= server.service.mean_ns
    assert server.peak_memory_bytes is not None
    assert server.cold_start is not None
    assert server.provider == "CPUExecutionProvider"
    assert rows["offline"].result == rows["offline"].throughput
    assert rows["single_stream"].result == rows["single_stream"].latency.p90_ns
    shown = capsys.readouterr().out
    assert "in process, multi_stream of 2" in shown
    assert "by MLPerf's rules" in shown
    # Worked out again, rows in process and at a rate are the same to the last bit.
    assert dlops.reanalyse(report).report.measurements == report.measurements


def test_every_form_of_a_report_names_the_scenarios_metric(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    measured = measure(
        [serve(artifact).url], payload=artifact, scenarios=("single_stream", "offline"), batch=(4,), duration_s=0.3
    )
    stream, offline = measured.measurements
    assert (stream.load.concurrency, stream.load.batch) == (1, 1)
    assert (offline.load.concurrency, offline.load.batch) == (8, 4)
    number = f"{cells.rate(offline.throughput)}/s"
    report = save_report(measured, tmp_path / "report")
    assert number in table_text(report)
    assert number in to_markdown(report)
    assert number in (tmp_path / "report" / "report.html").read_text()
    assert all(len(line) <= 80 for line in table_text(report).splitlines())
    first, second = csv.DictReader(io.StringIO(to_csv(report)))
    assert (first["scenario"], first["result_metric"], first["engine"]) == ("single_stream", "p90", "dlops")
    assert (second["result_metric"], float(second["result"])) == ("throughput", offline.throughput.value)


def test_a_rate_that_is_too_high_leaves_requests_that_were_not_run(make_artifact, monkeypatch) -> None:
    # The backlog is given up before it begins.
    monkeypatch.setattr("dlops.bench.inprocess_rates._GIVE_UP", 0.7)
    artifact = make_artifact()
    (row,) = measure([artifact], scenarios=("server",), offered=RATE, duration_s=0.2, threads=1).measurements
    assert set(row.errors) == {"not run: the backlog took longer than the run itself"}
    assert not row.verdict.steady
    assert row.latency.max_ns >= 30e9


def test_rows_at_a_rate_are_not_chosen_from(make_artifact) -> None:
    artifact = make_artifact()
    measured = measure([artifact], scenarios=("server",), offered=RATE, duration_s=0.2, threads=1)
    assert choose_fastest(measured, max_drop=1.0).report.chosen is None


def test_a_module_that_only_this_process_can_build_is_refused(make_artifact) -> None:
    local = Subject(target="eager", kind="eager", source=make_artifact(), model=lambda: None)
    inprocess.check([local], batches=[1], boundaries=["host"])
    with pytest.raises(UsageError, match="a process that builds the module itself"):
        inprocess.check([local], batches=[1], boundaries=["host"], own_process=True)


def test_requests_that_were_never_run_took_no_energy(example) -> None:
    items: list[float] = []
    rows = SimpleNamespace(add=lambda row, samples, seen: items.append(seen.items))
    row = example().measurements[1].model_copy(update={"errors": {"not run": 3}})
    session_rows._add(rows, row, {}, SimpleNamespace(gpu=None), SimpleNamespace(batch=4), began_ns=0)
    assert items == [(row.latency.samples - 3) * 4]
