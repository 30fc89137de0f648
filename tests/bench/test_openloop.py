"""Requests on schedule against real servers: healthy, slow, failing, frozen, dying."""

from __future__ import annotations

import json
import signal
import socketserver
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import dlops
from dlops.bench import cells, openloop, pacing
from dlops.bench.analysis import analyse_rate
from dlops.bench.arrivals import Offered, constant, poisson
from dlops.bench.oip import encode_request, find_endpoint
from dlops.bench.openloop import OpenLoaded, open_loop
from dlops.bench.payload import artifact_feeds
from dlops.bench.run import measure, save_report
from dlops.bench.table import table_text
from dlops.cli import run
from dlops.errors import MachineError, UsageError

BODY = json.dumps({"error": "busy"}).encode()


def requests_for(artifact, server) -> list[bytes]:
    endpoint = find_endpoint(server.url, model=artifact.name)
    return [encode_request(endpoint, feed) for feed in artifact_feeds(artifact, 1)]


def test_every_request_is_sent_once_and_its_times_are_in_order(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    requests = requests_for(artifact, server)
    due = poisson(150, duration_s=1.5)
    loaded = open_loop("127.0.0.1", server.port, requests, due, senders=2)
    assert server.requests == len(due) == len(loaded.sent_ns)
    assert loaded.errors == {}
    assert loaded.stopped is None
    assert np.all(loaded.sent_ns >= loaded.due_ns), "none may leave before it is due"
    assert np.all(loaded.arrived_ns > loaded.sent_ns)
    assert np.all(loaded.response_ns >= loaded.service_ns)
    # What reached the server is what the schedule offered, however slow the machine.
    assert len(due) / (loaded.arrived_ns.max() / 1e9) <= 1.2 * 150


def test_a_slow_server_is_offered_the_rate_all_the_same(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    requests = requests_for(artifact, server)
    server.behave = lambda count: time.sleep(0.4)
    loaded = open_loop("127.0.0.1", server.port, requests, constant(40, duration_s=1))
    # 40 a second that take 0.4 s each need 16 connections: a closed loop of one would have sent 3 requests.
    assert len(loaded.sent_ns) == 40
    assert loaded.connections >= 16
    assert np.median(loaded.response_ns) >= 0.4e9


def test_a_frozen_server_makes_late_what_was_due_meanwhile(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    requests = requests_for(artifact, server)
    first: list[float] = []

    def frozen_for_a_second(count: int) -> None:
        first.append(time.monotonic())
        time.sleep(max(0.0, first[0] + 1.0 - time.monotonic()))

    server.behave = frozen_for_a_second
    loaded = open_loop("127.0.0.1", server.port, requests, constant(50, duration_s=1.2))
    waited = loaded.response_ns[loaded.due_ns < 0.5e9]
    # Due in the first half second, answered after the first whole one: each waited at least half a second.
    assert len(waited) == 25
    assert waited.min() > 0.4e9


def test_failures_are_counted_by_kind_and_count_as_the_worst(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    requests = requests_for(artifact, server)
    server.behave = lambda count: (503, BODY) if count % 5 == 0 else None
    loaded = open_loop("127.0.0.1", server.port, requests, constant(100, duration_s=1), timeout_s=5.0)
    assert loaded.errors == {"HTTP 503": 20}
    assert (loaded.response_ns >= 5e9).sum() == 20
    assert len(loaded.service_ns) == 80


def test_a_request_that_is_never_answered_times_out_and_the_rest_goes_on(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    requests = requests_for(artifact, server)
    hang = threading.Event()
    server.behave = lambda count: hang.wait(30) and None if count == 3 else None
    loaded = open_loop("127.0.0.1", server.port, requests, constant(20, duration_s=1), timeout_s=2.5)
    hang.set()
    assert loaded.errors == {"timed out": 1}
    assert loaded.succeeded.sum() == 19


def test_a_server_that_dies_half_way_is_noticed_and_the_rest_is_not_sent(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    requests = requests_for(artifact, server)
    dying = threading.Thread(target=server.close)
    server.behave = lambda count: dying.start() if count == 30 else None
    loaded = open_loop("127.0.0.1", server.port, requests, constant(50, duration_s=60))
    dying.join()
    assert loaded.stopped is not None
    assert "the server is gone" in loaded.stopped
    assert loaded.succeeded.sum() > 10
    assert "connection refused" in loaded.errors
    # Of 3,000 in a minute: it does not go on to the end of the schedule.
    assert loaded.errors["not sent: the server was gone"] > 1000
    figures = analyse_rate(
        loaded.response_ns, loaded.due_ns, np.where(loaded.succeeded, loaded.arrived_ns - loaded.sent_ns, -1),
        np.empty(0, np.int64), duration_ns=60_000_000_000, lag_p99_ns=0.0, batch=1, observed=(loaded.stopped,),
    )  # fmt: skip
    # A server that died was not asked too much.
    assert [one for one in figures.verdict.reasons if not one.startswith("under-sampled")] == [loaded.stopped]


@pytest.mark.parametrize(
    ("last", "gone"),
    [
        ([pacing.LOST, pacing.REFUSED, pacing.REFUSED], True),
        ([pacing.LOST] * 12, True),
        ([pacing.LOST] * 3, False),
        ([pacing.ANSWERED] * 1000 + [pacing.LOST] * 12, False),
        ([pacing.REFUSED] * 12 + [pacing.ANSWERED], False),
        ([503] * 12, False),
        ([pacing.REFUSED] + [pacing.TIMED_OUT] * 12, False),
    ],
)
def test_a_server_is_gone_where_nobody_is_there_at_the_end(last: list[int], gone: bool) -> None:
    outcome = np.array([pacing.ANSWERED] * 50 + last)
    times = np.arange(len(outcome)) * 1_000_000
    loaded = OpenLoaded(
        due_ns=times, sent_ns=times, arrived_ns=np.where(outcome > 0, times + 1000, -1), outcome=outcome,
        timeout_s=30.0, connections=1, stopped=None, interrupted=False,
    )  # fmt: skip
    assert loaded.ends_without_server is gone


def test_one_failure_and_then_nothing_to_do_is_no_server_that_is_gone(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    server.behave = lambda count: (503, BODY) if count == 1 else None
    due_ns = np.concatenate([[0], np.arange(10) * 10_000_000 + 3_000_000_000])
    loaded = open_loop("127.0.0.1", server.port, requests_for(artifact, server), due_ns)
    assert loaded.stopped is None
    assert loaded.errors == {"HTTP 503": 1}
    assert loaded.succeeded.sum() == 10


def test_nobody_there_is_refusals_not_a_hang(free_port: int) -> None:
    loaded = open_loop("127.0.0.1", free_port, [b"GET / HTTP/1.1\r\n\r\n"], constant(10, duration_s=0.5))
    assert loaded.errors == {"connection refused": 5}


def test_what_is_not_http_is_said(free_port: int) -> None:
    class Talker(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(65536):
                self.request.sendall(b"220 mail.example ready\r\n\r\n")

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", 0), Talker) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        loaded = open_loop("127.0.0.1", port, [b"GET / HTTP/1.1\r\n\r\n"], constant(10, duration_s=0.5))
        server.shutdown()
    assert loaded.errors == {"not an HTTP answer": 5}


def test_a_sender_that_does_not_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setattr(openloop.sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match="a sender process"):
        open_loop("127.0.0.1", free_port, [b"x"], constant(10, duration_s=0.5))


def test_rows_at_rates_and_with_calls_in_flight_are_in_one_report(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    measured = measure(
        [server.url], payload=artifact, concurrency=(2,), offered=Offered(rates=(400.0, 200.0)), duration_s=0.4
    )
    flight, slow, fast = measured.measurements
    assert (flight.load.rate, flight.service, flight.lag_p99_ns) == (None, None, None)
    assert (slow.load.rate, fast.load.rate) == (200, 400)
    for row in (slow, fast):
        assert row.load.scenario == "server"
        assert row.service is not None
        assert row.lag_p99_ns is not None
        # The throughput of a server that keeps up is what was offered, within chance: Poisson counts over a second.
        assert row.throughput.value == pytest.approx(row.load.rate, rel=0.5)
        assert row.latency.mean_ns >= row.service.mean_ns
    report = save_report(measured, tmp_path / "report")
    samples = dlops.read_report(report.directory).raw_samples()
    key = fast.samples
    assert np.all(samples[key + ".service"] <= samples[key])
    assert len(samples[key]) == fast.latency.samples == len(samples[key + ".starts"])
    text = table_text(report)
    # In full where it fits, which depends on the digits of the times.
    for row in (slow, fast):
        assert cells.name(row) in text or cells.short_name(row) in text
    assert "p50 and p99 are of the response time" in " ".join(text.split())


def test_an_overloaded_service_is_called_saturated(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    one_at_a_time = threading.Lock()

    def slow(count: int) -> None:
        with one_at_a_time:
            time.sleep(0.01)

    server.behave = slow
    # It can do 100 a second at most and is asked for 300.
    (row,) = measure([server.url], payload=artifact, offered=Offered(rates=(300.0,)), duration_s=0.2).measurements
    assert not row.verdict.steady
    assert any(reason.startswith("saturated") for reason in row.verdict.reasons), row.verdict.reasons
    assert row.throughput.value < 110


def test_a_rate_is_for_urls(make_artifact) -> None:
    with pytest.raises(UsageError, match="a rate is for URLs"):
        measure([make_artifact()], offered=Offered(rates=(5.0,)))


def test_ctrl_c_keeps_the_requests_that_were_sent(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    command = [
        sys.executable, "-m", "dlops", "bench", server.url, "--payload", str(artifact.directory),
        "--rate", "100", "--duration", "60", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "offering" in line)
        # Said when the warm-up has ended; what leads in to a schedule is not measured either.
        enough = server.requests + 200
        while server.requests < enough:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, said + errors
    assert "Traceback" not in errors
    report = dlops.read_report(tmp_path / "out")
    assert report.partial
    (row,) = report.measurements
    assert 20 < row.latency.samples < 100 * 60
    # Of the time until Ctrl-C, not of all that was planned.
    assert row.duration_ns < 55e9
    assert row.throughput.value > 50
    assert row.errors == {}
    assert "interrupted" in row.verdict.reasons
    assert "at 100 a second" in output


def test_a_second_ctrl_c_does_not_wait_for_a_server_that_hangs(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    command = [
        sys.executable, "-m", "dlops", "bench", server.url, "--payload", str(artifact.directory), "--rate", "100",
        "--duration", "60", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "offering" in line)
        enough = server.requests + 200
        while server.requests < enough:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        hang = threading.Event()
        server.behave = lambda count: hang.wait(60) and None
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        next(line for line in process.stderr if "Ctrl-C again" in line)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        # The time-out of a call is 30 s.
        assert time.monotonic() - began < 20
        hang.set()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (row,) = dlops.read_report(tmp_path / "out").measurements
    assert row.latency.samples > 20
    assert "interrupted" in row.verdict.reasons
    assert row.errors["not waited for after Ctrl-C"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "0"], "a rate of 0"),
        (["--rate", "5", "--pauses", "often"], "expected BUSY:IDLE"),
        (["--pauses", "1:2"], "add --rate, --trace or --slo"),
        (["--rate", "5", "--trace", "none.txt"], "none.txt"),
    ],
)
def test_a_wrong_option_is_one_clear_line(options: list[str], said: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "http://127.0.0.1:1", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_option_ends_the_process_without_a_traceback(tmp_path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "dlops", "bench", "http://127.0.0.1:1", "--rate", "0"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert answer.returncode == 2
    assert "a rate of 0" in answer.stderr
    assert "Traceback" not in answer.stderr
