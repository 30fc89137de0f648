"""LoadGen drives the same targets: its logs are read, its rows are a report's, and they say what they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import dlops
from dlops.bench import loadgen
from dlops.bench.arrivals import Offered
from dlops.bench.cells import LOADGEN
from dlops.bench.loadgen import Settings, read_result, read_trace
from dlops.bench.run import measure, merge, save_report
from dlops.bench.table import to_markdown
from dlops.errors import MachineError
from dlops.report import read_report

installed = pytest.mark.skipif(
    find_spec("mlperf_loadgen") is None, reason="mlcommons-loadgen is not installed: pip install 'dlops[loadgen]'"
)
TRACE = """{"traceEvents":[
{"name":"IssueQuery","ph":"X","pid":1,"tid":1,"ts":1412.945,"dur":270.795,"args":{}},
{"name":"Sample","cat":"default","ph":"b","pid":1,"id":0,"ts":118.691,"args":{"sample_seq":0,"query_seq":0,"sample_idx":6,"issue_start_ns":5,"complete_ns":233035}},
{"name":"Sample","cat":"default","ph":"e", "pid":1,"id":0,"ts":351.726},
{"name":"Sample","cat":"default","ph":"b","pid":1,"id":1,"ts":118.691,"args":{"sample_seq":1,"query_seq":0,"sample_idx":4,"issue_start_ns":5,"complete_ns":240000}},
{"name":"Sample","cat":"default","ph":"b","pid":1,"id":3,"ts":901.002,"args":{"sample_seq":3,"query_seq":1,"sample_idx":6,"issue_start_ns":-2,"complete_ns":221423}},
"""


def test_a_query_of_several_samples_ends_with_the_last(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(TRACE)
    numbers, due, lag, latencies = read_trace(path)
    assert numbers.tolist() == [0, 1]
    assert due.tolist() == [118_691, 901_002]
    assert lag.tolist() == [5, -2]
    assert latencies.tolist() == [240_000, 221_423]


def test_a_trace_without_queries_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents":[\n{"name":"LastTrace"}\n')
    with pytest.raises(MachineError, match="no query"):
        read_trace(path)


@installed
def test_the_result_of_a_scenario_is_read_with_its_reasons(tmp_path: Path) -> None:
    def line(key: str, value: object, *, is_error: bool = False) -> str:
        return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": {"is_error": is_error}})

    path = tmp_path / "detail.txt"
    lines = [
        line("result_90.00_percentile_latency_ns", 209_611), line("result_validity", "INVALID"),
        line("error_runtime", "Ending early: ran out.", is_error=True), line("result_invalid_reason", ""),
        line("early_stopping_result", " * Only processed\n 8 queries."), "not of the log",
    ]  # fmt: skip
    path.write_text("\n".join(lines))
    said = read_result(path, "single_stream")
    assert (said.value, said.valid) == (209_611, False)
    assert said.reasons == ("Ending early: ran out.", "Only processed 8 queries.")
    assert read_result(path, "offline").value is None
    path.write_text(lines[1].replace("INVALID", "VALID") + "\n" + lines[4])
    assert read_result(path, "single_stream").reasons == ()


@installed
def test_settings_are_loadgens_own_words() -> None:
    test = loadgen._test_settings(Settings(scenario="server", duration_s=0.2, rate=50.0, expected_ns=1e6))
    assert (test.scenario.name, test.server_target_qps) == ("Server", 50.0)
    assert (test.min_duration_ms, test.max_duration_ms) == (200, 400)
    test = loadgen._test_settings(Settings(scenario="multi_stream", duration_s=0.2, batch=3, expected_ns=1e6))
    assert (test.scenario.name, test.multi_stream_samples_per_query) == ("MultiStream", 3)
    assert test.multi_stream_expected_latency_ns < 1e6
    test = loadgen._test_settings(Settings(scenario="offline", duration_s=0.2, batch=4, expected_ns=1e6))
    assert (test.scenario.name, test.offline_expected_qps) == ("Offline", 4000.0)


def test_a_missing_package_is_one_clear_line(make_artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadgen, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="--engine loadgen needs mlcommons-loadgen") as caught:
        measure([make_artifact()], scenarios=("single_stream",), engine="loadgen")
    assert caught.value.hint == "pip install 'dlops[loadgen]'"


@installed
def test_rows_of_loadgen_are_a_reports_and_say_what_they_are(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    url, offered = serve(artifact).url, Offered(rates=(1000.0,))
    options = {"duration_s": 0.2, "engine": "loadgen"}
    inside = measure([artifact], scenarios=("single_stream", "server"), offered=offered, threads=1, **options)
    outside = measure([url], payload=artifact, scenarios=("multi_stream", "offline"), batch=(4,), **options)
    measured = merge(inside, outside)
    rows = measured.measurements
    assert [(row.boundary, row.load.scenario) for row in rows] == [
        ("host", "single_stream"), ("host", "server"), ("network", "multi_stream"), ("network", "offline")
    ]  # fmt: skip
    for row in rows:
        assert row.engine == "loadgen"
        assert row.errors == {}
        assert any(reason.startswith("LoadGen itself: ") for reason in row.verdict.remarks)
        assert row.throughput.value > 0
        assert row.latency.samples == len(measured.samples[row.samples])
        assert (row.service is not None) == (row.load.scenario == "server")
    # The p90 that LoadGen worked out is the row's own, from the same latencies.
    stream = rows[0]
    own = np.quantile(measured.samples[stream.samples], 0.9, method="higher") / 1e6
    said = float(stream.verdict.remarks[0].split("p90 ")[1].split(" ms")[0])
    assert said == pytest.approx(own, rel=0.02)
    report = save_report(measured, tmp_path / "report")
    assert any(note.startswith(f"{LOADGEN}: mlcommons-loadgen 6") for note in report.notes)
    assert f"**{LOADGEN}: in process, single_stream**" in to_markdown(report)
    assert f"{LOADGEN}: in process, single_stream" in (tmp_path / "report" / "report.html").read_text()
    assert dlops.reanalyse(read_report(tmp_path / "report")).report.measurements == rows


@installed
def test_what_a_service_refuses_is_counted_and_no_latency(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    failing = {0: (503, b"{}"), 25: (200, b"")}
    server.behave = lambda count: failing.get(count % 50) if count > 40 else None
    (row,) = measure(
        [server.url], payload=artifact, scenarios=("single_stream",), duration_s=0.2, engine="loadgen"
    ).measurements
    assert row.errors["HTTP 503"] >= 1
    assert row.errors["another answer than the first"] >= 1
    assert not row.verdict.steady
    # Of some 660 queries or more, one in fifty failed.
    assert row.latency.samples > 20 * row.errors["HTTP 503"]


def answers_at_the_end(trace: Path) -> int:
    """How many the last 100 kB name: fast calls fill many megabytes a second."""
    with trace.open("rb") as file:
        file.seek(max(0, trace.stat().st_size - 100_000))
        return file.read().count(b'"Sample"')


def interrupted(arguments: list[str], folder: Path, *, answers: int, begun: Callable[[], None] = lambda: None) -> None:
    """`dlops bench`, ended by Ctrl-C once LoadGen's trace has so many answers. begun: called when LoadGen is started.

    folder: for temporary files; LoadGen's logs there go with its process.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "dlops", "bench", *arguments, "--engine", "loadgen", "--duration", "5"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "LoadGen on" in line)
        begun()
        limit = time.monotonic() + 60
        while not any(answers_at_the_end(one) >= answers for one in folder.glob("*/mlperf_log_trace.json")):
            assert time.monotonic() < limit
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, said + output + errors
    assert "Traceback" not in errors
    assert [*folder.iterdir()] == []


@installed
@pytest.mark.parametrize(
    ("scenario", "load"),
    [
        ("single_stream", ()), ("multi_stream", ("--samples-per-query", "2")), ("server", ("--rate", "200")),
        ("offline", ("--batch", "2")),
    ],
    ids=["single_stream", "multi_stream", "server", "offline"],
)  # fmt: skip
@pytest.mark.parametrize("where", ["in process", "service"])
def test_ctrl_c_keeps_what_loadgen_had_measured(make_artifact, serve, tmp_path, scenario, load, where) -> None:
    artifact = make_artifact()
    target = [str(artifact.directory), "--threads", "1"]
    if where == "service":
        target = [serve(artifact).url, "--payload", str(artifact.directory)]
    interrupted(
        [*target, "--scenario", scenario, *load, "--out", str(tmp_path / "out")], tmp_path / "logs", answers=100
    )
    report = read_report(tmp_path / "out")
    (row,) = report.measurements
    assert report.partial
    assert row.engine == "loadgen"
    assert "interrupted" in row.verdict.reasons
    assert row.errors == {}
    assert row.latency.samples > 10
    assert row.duration_ns < 5e9
    assert any("INVALID by its rules (it was interrupted)" in remark for remark in row.verdict.remarks)


@installed
def test_ctrl_c_before_loadgen_has_an_answer_leaves_nothing(make_artifact, serve, tmp_path) -> None:
    artifact, over = make_artifact(), threading.Event()
    server = serve(artifact)

    def hold() -> None:
        server.behave = lambda count: over.wait(60) and None

    arguments = [server.url, "--payload", str(artifact.directory), "--scenario", "single_stream"]
    interrupted([*arguments, "--out", str(tmp_path / "out")], tmp_path / "logs", answers=0, begun=hold)
    over.set()
    assert not (tmp_path / "out").exists()


@installed
def test_a_target_that_fails_under_loadgen_is_one_clear_error() -> None:
    def broken() -> None:
        raise ValueError("out of order")

    for scenario, rate in (("single_stream", None), ("server", 5000.0)):
        with pytest.raises(ValueError, match="out of order"):
            loadgen.drive_session(broken, Settings(scenario=scenario, duration_s=0.05, rate=rate, expected_ns=1e5))


def test_a_query_is_held_up_by_the_one_before_it() -> None:
    due, latencies = np.array([0, 10, 30]), np.array([25, 16, 5])
    assert loadgen._held_up(due, latencies).tolist() == [0, 15, 0]


@installed
def test_under_server_in_process_queries_wait_in_loadgen_and_count_from_when_they_were_due() -> None:
    """Twice what it can do: one runs at a time, service is the call's own time, and the rest is waiting, not lag."""
    call_ns = 3_000_000
    settings = Settings(scenario="server", duration_s=0.2, rate=2 * 1e9 / call_ns, expected_ns=call_ns)
    driven = loadgen.drive_session(lambda: time.sleep(call_ns / 1e9), settings)
    ended = driven.starts_ns + driven.latencies_ns
    assert (driven.service_ns >= call_ns).all()
    assert (np.diff(ended) >= call_ns).all()
    assert driven.latencies_ns[-1] > 10 * call_ns
    assert (driven.lag_ns <= driven.latencies_ns - driven.service_ns).all()
    # It is issued when the one before it is done, and not only later.
    waited = (driven.latencies_ns - driven.service_ns)[len(ended) // 2 :]
    assert driven.lag_ns[len(ended) // 2 :].sum() < waited.sum() / 2
