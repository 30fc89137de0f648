"""Two services in turns within one run, against real servers: alike, slower, failing, dying; and `dlops compare`."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime

import numpy as np
import pytest

from dlops.bench.analysis import analyse_turns
from dlops.bench.compare import compare_turns
from dlops.bench.http import HttpTransport
from dlops.bench.reanalysis import reanalyse
from dlops.bench.run import Measured, MeasureInterrupted, save_report
from dlops.bench.service_turns import measure_in_turns
from dlops.cli import run
from dlops.environment import describe_environment
from dlops.errors import MachineError, UsageError
from dlops.report import Load, Measurement, Report, read_report
from dlops.timing import interleave

from .test_grpc import serve_grpc

__all__ = ["serve_grpc"]


def slower(seconds: float) -> Callable[[int], None]:
    def behave(count: int) -> None:
        time.sleep(seconds)

    return behave


def test_what_is_slower_is_found(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    base, new = serve(artifact), serve(artifact)
    base.behave, new.behave = slower(0.002), slower(0.006)
    # On a machine that stands still meanwhile nothing is certain, and rightly so.
    for _ in range(3):
        measured = measure_in_turns(
            [base.url, new.url], payload=artifact, batch=[1, 4], concurrency=[1, 3], duration_s=0.4
        )
        comparison = compare_turns(measured, base="BASE", new="NEW")
        words = {compared.judged[0].word for compared in comparison.rows}
        assert words <= {"REGRESSED", "INCONCLUSIVE"}
        if words == {"REGRESSED"}:
            break
    rows = measured.measurements
    assert [(row.target, row.load.batch, row.load.concurrency) for row in rows] == [
        (server.url, batch, calls) for batch in (1, 4) for calls in (1, 3) for server in (base, new)
    ]
    for row in rows:
        assert (row.boundary, row.served_by, row.artifact) == ("network", "toy-server 1", "onnx-fp32")
        assert row.error_count == 0
        # Calls that never wait between them: by Little's law what is in flight is the rate times the time.
        in_flight = row.throughput.value / row.load.batch * row.latency.mean_ns / 1e9
        assert in_flight == pytest.approx(row.load.concurrency, rel=1e-6)
    assert comparison.paired
    for compared in comparison.rows:
        p50 = compared.judged[0]
        assert p50.ratio is not None
        assert 1.5 < p50.ratio.value < 3.5
        assert p50.word == "REGRESSED"
    report = save_report(measured, tmp_path / "report")
    assert report.baseline == base.url
    again = reanalyse(read_report(tmp_path / "report"))
    assert "every number as before" in again.report.notes[-1]


def test_one_service_against_itself_over_both_transports(make_artifact, serve, serve_grpc) -> None:
    artifact = make_artifact()
    server, grpc_server = serve(artifact), serve_grpc(artifact)
    measured = measure_in_turns(
        [server.url, server.url + "/", grpc_server.url], payload=artifact, batch=[1], concurrency=[1], duration_s=0.2
    )
    targets = [row.target for row in measured.measurements]
    assert targets == [server.url, f"{server.url}#2", grpc_server.url]
    assert all(row.latency.samples > 6 for row in measured.measurements)


def test_a_call_that_fails_ends_it_with_the_whole_rounds_of_both(make_artifact, serve) -> None:
    artifact = make_artifact()
    base, new = serve(artifact), serve(artifact)
    began = time.monotonic()
    base.behave = new.behave = slower(0.002)

    def fails_later(count: int) -> tuple[int, bytes] | None:
        time.sleep(0.002)
        # After the warm-up and some rounds, on a busy machine too.
        return (503, b"{}") if time.monotonic() - began > 4 and count > 1500 else None

    new.behave = fails_later
    measured = measure_in_turns([base.url, new.url], payload=artifact, batch=[1], concurrency=[2], duration_s=60)
    assert measured.partial
    said = f"{new.url}: a call failed (it was answered HTTP 503)"
    assert said in measured.report.notes
    assert len(measured.measurements) == 2
    for row in measured.measurements:
        assert f"cut short: {said}" in row.verdict.reasons
        assert not row.verdict.steady


def test_an_answer_without_its_tensors_ends_it_too(make_artifact, serve) -> None:
    artifact = make_artifact()
    base, new = serve(artifact), serve(artifact)
    # The first requests are questions.
    new.behave = lambda count: (200, b"") if count > 40 else None
    with pytest.raises(MachineError, match=r"a call failed \(another answer than the first\)"):
        measure_in_turns([base.url, new.url], payload=artifact, batch=[1], concurrency=[1], duration_s=0.2)


def test_a_service_that_fails_from_the_start_is_one_line(make_artifact, serve) -> None:
    artifact = make_artifact()
    base, new = serve(artifact), serve(artifact)
    # The first request of all is answered, and so are those that see what is served.
    new.behave = lambda count: (500, b"") if count > 30 else None
    with pytest.raises(MachineError, match=r"a call failed \(it was answered HTTP 500\)"):
        measure_in_turns([base.url, new.url], payload=artifact, batch=[1], concurrency=[1], duration_s=1)


def test_ctrl_c_keeps_the_whole_rounds(make_artifact, serve, monkeypatch) -> None:
    artifact = make_artifact()
    base, new = serve(artifact), serve(artifact)

    def interrupted(runs, *, on_progress, **options):
        rounds = []

        def ctrl_c(fraction: float) -> None:
            rounds.append(fraction)
            if len(rounds) == 7:
                raise KeyboardInterrupt

        return interleave(runs, on_progress=ctrl_c, **options)

    monkeypatch.setattr("dlops.bench.service_turns.interleave", interrupted)
    with pytest.raises(MeasureInterrupted) as caught:
        measure_in_turns([base.url, new.url], payload=artifact, batch=[1], concurrency=[1], duration_s=9)
    assert caught.value.measured.partial
    assert [row.verdict.reasons[0] for row in caught.value.measured.measurements] == ["interrupted"] * 2


def test_the_command(make_artifact, serve, tmp_path, capsys) -> None:
    artifact = make_artifact()
    base, new = serve(artifact), serve(artifact)
    new.behave = slower(0.004)
    words = [
        "compare", base.url, new.url, "--duration", "0.4", "--payload", str(artifact.directory), "--gate", "p50=+50%",
        "--out", str(tmp_path / "report"), "--json", "-",
    ]  # fmt: skip
    assert run(words) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["paired"]
    assert found["base"] == base.url
    assert found["rows"][0]["judged"][0]["word"] == "REGRESSED"
    assert [row.target for row in read_report(tmp_path / "report").measurements] == [base.url, new.url]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{url}", "{url}", "--processes", "6"], "--processes: for artifacts"),
        (["{url}", "{url}", "--device", "cpu", "--threads", "1"], "--threads, --device: for artifacts"),
        (["{artifact}", "{artifact}", "--concurrency", "2"], "--concurrency: for URLs"),
        (["{artifact}", "{artifact}", "--payload", "{artifact}"], "--payload: for URLs"),
        (["{artifact}", "{url}"], "is an artifact and NEW ({url}) a service"),
        (["{url}", "nowhere"], "NEW nowhere: no such file"),
        (["ftp://127.0.0.1", "{url}"], "target 'ftp://127.0.0.1' is no http://HOST:PORT"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments, said, make_artifact, serve, capsys) -> None:
    artifact = make_artifact()
    known = {"url": serve(artifact).url, "artifact": str(artifact.directory)}
    words = [word.format(**known) for word in arguments]
    assert run(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert said.format(**known) in error
    assert len(error.splitlines()) == 2


@pytest.fixture
def scripted() -> Iterator[Callable[[list[bytes | None]], int]]:
    """scripted([...]) is the port of a server that answers each request on a connection with the next of these, and
    closes it at None."""
    listener = socket.create_server(("127.0.0.1", 0))
    script: list[bytes | None] = []

    def serve_all() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while script and connection.recv(1000):
                    answer = script.pop(0)
                    if answer is None:
                        break
                    connection.sendall(answer)

    thread = threading.Thread(target=serve_all, daemon=True)

    def start(answers: list[bytes | None]) -> int:
        script.extend(answers)
        thread.start()
        return int(listener.getsockname()[1])

    yield start
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"


def test_a_line_connects_anew_after_its_server_closed_it(scripted) -> None:
    port = scripted([OK, LAST, None, OK, b"no HTTP\r\n\r\n", None, OK])
    with closing(HttpTransport().dial("127.0.0.1", port, timeout_s=5)) as line:
        assert [line.ask(b"x").body for _ in range(2)] == [b"hi", b"hi"]
        with pytest.raises(ConnectionResetError):
            line.ask(b"x")
        assert line.ask(b"x").status == 200
        with pytest.raises(ValueError, match="not an HTTP/1 answer"):
            line.ask(b"x")


def test_a_line_waits_no_longer_than_told(scripted) -> None:
    # A little now and then is no answer.
    port = scripted([b"HTTP/1.1 200 OK\r\n", b"never"])
    with closing(HttpTransport().dial("127.0.0.1", port, timeout_s=0.2)) as line:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            line.ask(b"x")
        assert time.monotonic() - began < 5


def test_nothing_is_measured_where_nobody_listens(free_port, make_artifact) -> None:
    with pytest.raises(MachineError, match="no answer"):
        measure_in_turns([f"http://127.0.0.1:{free_port}"] * 2, payload=None, batch=[1], concurrency=[1], duration_s=1)


def test_a_batch_that_the_service_does_not_take_is_refused(make_artifact, serve) -> None:
    artifact = make_artifact()
    url = serve(artifact).url
    with pytest.raises(UsageError):
        measure_in_turns([url, url], payload=artifact, batch=[10_000], concurrency=[1], duration_s=1)
    # What was measured before is kept.
    measured = measure_in_turns([url, url], payload=artifact, batch=[1, 10_000], concurrency=[1], duration_s=0.2)
    assert [row.load.batch for row in measured.measurements] == [1, 1]
    assert measured.partial


def test_the_rows_share_their_rounds(make_artifact, serve) -> None:
    artifact = make_artifact()
    measured = measure_in_turns(
        [serve(artifact).url, serve(artifact).url], payload=artifact, batch=[1], concurrency=[1], duration_s=0.3
    )
    first, second = (np.unique(measured.samples[f"{row.samples}.turns"]) for row in measured.measurements)
    np.testing.assert_array_equal(first, second)
    assert len(first) >= 6


def test_a_spell_that_slows_both_hides_no_difference() -> None:
    """Neither median is certified where the pace wanders; in turns their ratio is."""
    draw = np.random.default_rng(3)
    rounds, calls = 120, 20
    turns = np.repeat(np.arange(rounds), calls)
    pace = np.repeat(np.cumsum(draw.normal(0, 0.08, rounds)), calls)
    rows, samples = [], {}
    for key, slower_by in (("row00", 1.0), ("row01", 1.2)):
        latencies = (1e6 * slower_by * np.exp(pace + draw.normal(0, 0.05, len(turns)))).astype(np.int64)
        figures = analyse_turns(latencies, turns, {}, batch=1, baseline=None, observed=())
        assert figures.latency.p50_ns is None
        assert not figures.verdict.steady
        rows.append(
            Measurement(
                target=key, artifact=None, runtime="r", provider="p", device="d", precision="fp32", threads=None,
                boundary="network", load=Load(), samples=key, warmup_calls=0, **figures.as_fields(),
            )
        )  # fmt: skip
        samples |= {key: latencies, f"{key}.turns": turns}
    report = Report(
        title="t", created=datetime.now(UTC), command=(), environment=describe_environment(), measurements=tuple(rows)
    )
    (compared,) = compare_turns(Measured(report=report, samples=samples), base="a", new="b").rows
    p50 = compared.judged[0]
    assert (p50.quantity, p50.base, p50.new, p50.word) == ("p50", None, None, "REGRESSED")
    assert p50.ratio is not None
    assert p50.ratio.value == pytest.approx(1.2, rel=0.03)
