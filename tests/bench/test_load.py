"""Load over HTTP against real servers: healthy, failing, frozen, dying."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from dlops.bench import pacing
from dlops.bench.http import AnswerParser, Connection, HttpTransport
from dlops.bench.load import TIMEOUT_S, closed_loop, failure_kind
from dlops.bench.network import encoded, measure_endpoint, prepare
from dlops.bench.oip import encode_request, find_endpoint
from dlops.bench.oip_rest import decode_outputs
from dlops.bench.run import MeasureInterrupted, Offered, measure
from dlops.bench.sender import _why_not_open
from dlops.bench.transport import Answer
from dlops.cli import run
from dlops.errors import MachineError, UsageError
from dlops.report import SERVICE, STARTS


def after_calls_of_a_row(server, calls: int, act: Callable[[], None]) -> None:
    """Have the server call `act` once that many calls of the first row are answered, those of its warm-up left out."""
    asked = itertools.count(1)
    nothing = {part: {"count": 0, "ns": 0} for part in ("success", "queue", "compute_infer")}
    ends: list[int] = []

    def statistics() -> dict[str, object]:
        # Asked for by the first look at the server, before the row, and when its warm-up has ended.
        if next(asked) == 3:
            ends.append(server.requests + calls)
        return {"model_stats": [{"inference_stats": nothing, "inference_count": 0, "execution_count": 0}]}

    def behave(count: int) -> None:
        if ends and count >= ends[0]:
            ends[0] = sys.maxsize
            act()

    server.statistics, server.behave = statistics, behave


class SlowToAccept(HttpTransport):
    """Accepts the first connection, and the others after an hour."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def connect(self, host: str, port: int):
        self.asked += 1
        if self.asked > 1:
            await asyncio.sleep(3600)
        return await super().connect(host, port)


def test_a_connection_that_is_not_there_by_the_end_is_not_waited_for(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    endpoint = find_endpoint(server.url, model=artifact.name)
    request = encode_request(endpoint, artifact.samples().inputs)
    transport = SlowToAccept()
    began = time.monotonic()
    loaded = closed_loop(
        "127.0.0.1", server.port, [request], concurrency=3, duration_s=0.3, max_warmup_s=0.3, transport=transport
    )
    # An answer is waited for 30 s; twice the duration is the most that the run itself takes.
    assert time.monotonic() - began < 15
    assert transport.asked == 3
    assert len(loaded.latencies_ns) > 0
    assert loaded.errors == {}


class WithoutEnd(HttpTransport):
    """Its connections never answer and keep no time-out."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[_Endless] = []

    async def connect(self, host: str, port: int):
        self.made.append(_Endless())
        return self.made[-1]


class _Endless:
    is_open = True

    async def send(self, request: bytes, *, timeout_s: float):
        await asyncio.sleep(60)

    async def aclose(self) -> None:
        self.is_open = False


def test_calls_that_outlast_their_time_out_end_the_run_with_a_line() -> None:
    transport = WithoutEnd()
    with pytest.raises(MachineError, match=r"calls went on for over 0\.2 s, which is the time-out of each"):
        closed_loop(
            "127.0.0.1", 1, [b"x"], concurrency=2, duration_s=0.1, max_warmup_s=0.1, timeout_s=0.2,
            transport=transport,
        )  # fmt: skip
    assert [one.is_open for one in transport.made] == [False, False]


class Kept(HttpTransport):
    """Keeps the connections that were made, also those that nobody was given."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.made: list[Connection] = []
        made, note = Connection.connection_made, self.made.append

        def noted(connection: Connection, transport: asyncio.BaseTransport) -> None:
            note(connection)
            made(connection, transport)

        monkeypatch.setattr(Connection, "connection_made", noted)


def test_every_connection_is_closed_when_the_run_ends(monkeypatch) -> None:
    transport = Kept(monkeypatch)
    # A server that closes after each answer, so that some connection is just being made whenever a run ends.
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), OneAnswer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for _ in range(20):
            closed_loop(
                "127.0.0.1", server.server_address[1], [b"GET / HTTP/1.1\r\n\r\n"], concurrency=8, duration_s=0.05,
                max_warmup_s=0.01, transport=transport,
            )  # fmt: skip
        server.shutdown()
    assert len(transport.made) > 100
    assert [one for one in transport.made if one.is_open] == []


class OneAnswer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")


def test_every_call_is_answered_and_measured(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    endpoint = find_endpoint(server.url, model=artifact.name)
    payload = prepare(endpoint, artifact, batch=4)
    asked_before = server.requests
    row, _, loaded = measure_endpoint(endpoint, payload, batch=4, concurrency=3, duration_s=0.5, key="row00")
    answered = server.requests - asked_before
    assert row.error_count == 0
    # All that the server answered are measured, but for the calls that straddle the end of the warm-up.
    assert 0 <= answered - loaded.warmup_calls - len(loaded.latencies_ns) <= 3
    seconds = row.duration_ns / 1e9
    # The server's own count over the run, warm-up left out by its calls.
    assert row.throughput.value == pytest.approx(4 * (answered - loaded.warmup_calls) / seconds, rel=0.05)
    assert (row.artifact, row.accuracy, row.boundary) == ("onnx-fp32", 0.98, "network")
    # Little's law: calls in flight = rate × time in the system.
    in_flight = row.throughput.value / 4 * row.latency.mean_ns / 1e9
    assert in_flight == pytest.approx(3, rel=0.15)


def test_the_throughput_of_a_slow_server_is_its_true_rate(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    endpoint = find_endpoint(server.url, model=artifact.name)
    payload = prepare(endpoint, artifact, batch=1)
    asked_before, delay_s, calls = server.requests, 0.5, 8

    def slow(count: int) -> None:
        # The first of each connection wait longer and longer, so that answers come evenly and not eight at once.
        first = max(0, calls - (count - asked_before)) if count - asked_before <= calls else 0
        time.sleep(delay_s + first * delay_s / calls)

    server.behave = slow
    row, samples, loaded = measure_endpoint(endpoint, payload, batch=1, concurrency=calls, duration_s=1.0, key="row00")
    # Eight in flight, half a second each: 16 a second, one answer more or less at either end of two seconds.
    assert row.throughput.value == pytest.approx(calls / delay_s, rel=0.1)
    assert len(loaded.starts_ns) == len(loaded.latencies_ns)
    assert loaded.starts_ns.min() >= 0
    # Those that were in flight when the warm-up ended are answered in the run.
    assert 1 <= len(samples["row00.earlier"]) <= calls
    assert samples["row00.earlier"].min() >= 0


def test_errors_are_counted_by_kind_and_have_the_worst_latency(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    endpoint = find_endpoint(server.url, model=artifact.name)
    payload = prepare(endpoint, artifact, batch=1)
    server.behave = lambda count: (503, b'{"error": "busy"}') if count % 4 == 0 else None
    row, samples, loaded = measure_endpoint(endpoint, payload, batch=1, concurrency=2, duration_s=0.5, key="row00")
    assert set(row.errors) == {"HTTP 503"}
    calls = row.latency.samples
    assert row.error_count / calls == pytest.approx(0.25, abs=0.02)
    assert not row.verdict.steady
    assert f"{row.error_count} of {calls} calls failed: HTTP 503" in row.verdict.reasons[0]
    assert len(loaded.latencies_ns) == calls - row.error_count
    assert (np.diff(samples["row00" + STARTS]) >= 0).all()
    failed = samples["row00" + SERVICE] < 0
    assert failed.sum() == row.error_count
    assert set(samples["row00"][failed].tolist()) == {round(TIMEOUT_S * 1e9)} == {row.latency.max_ns}
    # What failed is no answer.
    assert row.throughput.value == pytest.approx((calls - row.error_count) / row.duration_ns * 1e9, rel=0.05)


@pytest.mark.usefixtures("soon_given_up")
def test_a_flood_of_errors_is_one_clear_error(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    endpoint = find_endpoint(server.url, model=artifact.name)
    payload = prepare(endpoint, artifact, batch=1)
    server.behave = lambda count: (500, b"{}")
    with pytest.raises(MachineError, match=r"no call succeeded at 2 in flight \(HTTP 500 ×\d+\)"):
        measure_endpoint(endpoint, payload, batch=1, concurrency=2, duration_s=0.3, key="row00")


@pytest.mark.usefixtures("soon_given_up")
def test_a_slow_server_with_one_failure_is_not_gone(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)

    def slow(count: int):
        time.sleep(0.6)  # longer than it takes to give a server up
        return (503, b"{}") if count == asked + 1 else None

    endpoint = find_endpoint(server.url, model=artifact.name)
    requests = encoded(endpoint, prepare(endpoint, artifact, batch=1))
    asked = server.requests
    server.behave = slow
    loaded = closed_loop("127.0.0.1", server.port, requests, concurrency=1, duration_s=1.5, max_warmup_s=0.3)
    assert loaded.stopped is None
    assert len(loaded.latencies_ns) >= 2


@pytest.mark.usefixtures("soon_given_up")
def test_a_server_that_dies_half_way_keeps_what_was_measured(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    dying = threading.Thread(target=server.close)
    after_calls_of_a_row(server, 200, dying.start)
    measured = measure([server.url], payload=artifact, concurrency=(1, 2), duration_s=8.0)
    dying.join()
    assert measured.partial
    (row,) = measured.measurements
    assert row.latency.samples > 100
    assert not row.verdict.steady
    assert "connection refused" in row.errors or "connection lost" in row.errors
    assert any("the server is gone" in reason for reason in row.verdict.reasons), row.verdict.reasons
    assert any("no call succeeded at 2 in flight (connection" in note for note in measured.report.notes)


def test_a_slow_answer_times_out_and_its_late_bytes_are_not_taken_for_the_next() -> None:
    async def scenario() -> tuple[str, bool]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while await reader.readuntil(b"\r\n\r\n"):
                    await asyncio.sleep(0.2)
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate")
                    await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()
                gone.set()

        gone = asyncio.Event()
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = await Connection.open("127.0.0.1", port)
        try:
            await connection.send(b"GET / HTTP/1.1\r\n\r\n", timeout_s=0.05)
        except TimeoutError as error:
            said = str(error)
        closed = not connection.is_open
        server.close()
        await asyncio.wait_for(gone.wait(), 10)
        return said, closed

    assert asyncio.run(scenario()) == ("no answer in time", True)


@pytest.mark.parametrize(
    ("expected", "head", "body", "other"),
    [
        (8, b"4", b"{  }8 bytes!", False),
        (8, b"3", b"{ }8 bytes!", False),
        (8, b"4", b"{  }7 bytes", True),
        (8, None, b"{  }8 bytes!", True),
        (8, None, b"", True),
        (0, None, b"{}", False),
        (0, None, b"", True),
        (None, None, b"", False),
    ],
)
def test_a_success_of_another_length_is_another_answer(expected, head, body, other) -> None:
    length = b"" if head is None else b"Inference-Header-Content-Length: " + head + b"\r\n"
    text = b"HTTP/1.1 200 OK\r\n" + length + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = AnswerParser(expected).feed(text)
    assert answer is not None
    assert answer.status == (pacing.OTHER if other else 200)


@pytest.mark.parametrize("binary", [True, False])
def test_an_answer_without_its_tensors_is_a_failed_call(make_artifact, serve, binary: bool) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    server.binary = binary
    # The first requests are questions.
    server.behave = lambda count: (200, b"") if count > 40 and count % 10 == 0 else None
    offered = Offered(rates=(200.0,))
    measured = measure([server.url], payload=artifact, concurrency=(2,), offered=offered, duration_s=0.3)
    for row in measured.measurements:
        assert list(row.errors) == ["another answer than the first"]
        assert not row.verdict.steady
    # Numbers in JSON take more or fewer digits, and a tensor takes its bytes.
    asked = server.requests + 40
    server.behave = lambda count: (200, b'{"outputs": []}') if count > asked and count % 10 == 0 else None
    (row,) = measure([server.url], payload=artifact, concurrency=(2,), duration_s=0.3).measurements
    assert list(row.errors) == (["another answer than the first"] if binary else [])


@pytest.mark.parametrize("size", [b"-5", b"+5", b"1_0", b"", b"0x5", b"f" * 17, b"7fffffff"])
def test_a_chunk_of_no_size_is_no_answer(size) -> None:
    with pytest.raises(ValueError, match="chunk"):
        AnswerParser().feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\nhello")


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"], b"hello"),
        ([b"HTTP/1.1 200 O", b"K\r\ncontent-length: 5\r\n\r", b"\nhe", b"llo"], b"hello"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r", b"\n2;x=1\r\nlo\r\n0\r\n\r\n"], b"hello"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"], b""),
    ],
)
def test_answers_are_read_however_they_are_cut(pieces, body) -> None:
    async def scenario() -> bytes:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            await reader.read()
            writer.close()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        connection = await Connection.open("127.0.0.1", server.sockets[0].getsockname()[1])
        answer = await connection.send(b"GET / HTTP/1.1\r\n\r\n", timeout_s=5)
        connection.close()
        server.close()
        await asyncio.sleep(0.1)  # the handler sees the end and closes its side
        return answer.body

    assert asyncio.run(scenario()) == body


def test_what_is_no_http_is_counted_as_such() -> None:
    class Greeter(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        port = server.server_address[1]
        request = [b"GET / HTTP/1.1\r\n\r\n"]
        loaded = closed_loop("127.0.0.1", port, request, concurrency=1, duration_s=0.3, max_warmup_s=0.3)
        server.shutdown()
        thread.join()
    assert set(loaded.errors) == {"not an HTTP answer"}
    assert len(loaded.latencies_ns) == 0


def test_requests_are_what_the_protocol_says(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    endpoint = find_endpoint(f"{server.url}/v2/models/{artifact.name}", model=None)
    feed = {"input": np.arange(32, dtype=np.float32).reshape(2, 16)}
    head, _, rest = encode_request(endpoint, feed).partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    length = int(headers["Inference-Header-Content-Length"])
    (entry,) = json.loads(rest[:length])["inputs"]
    assert entry == {
        "name": "input", "datatype": "FP32", "shape": [2, 16], "parameters": {"binary_data_size": 128}
    }  # fmt: skip
    assert rest[length:] == feed["input"].tobytes()
    assert len(rest) == int(headers["Content-Length"])
    response = httpx.post(f"{server.url}/v2/models/{artifact.name}/infer", content=rest, headers=headers)
    outputs = decode_outputs(response.content, int(response.headers["inference-header-content-length"]))
    assert outputs["logits"].shape == (2, 10)


def test_a_service_of_another_model_is_not_credited_with_the_artifacts_accuracy(make_artifact, serve) -> None:
    served, named = make_artifact(hidden=8), make_artifact("onnx-int8", hidden=16)
    measured = measure([serve(served).url], payload=named, duration_s=0.3)
    (row,) = measured.measurements
    assert (row.artifact, row.accuracy) == (None, None)
    assert "does not answer as toy/onnx-int8 does" in measured.report.notes[0]


def test_without_samples_random_numbers_are_sent_and_the_report_says_so(make_artifact, serve) -> None:
    artifact = make_artifact()
    url = f"{serve(artifact).url}/v2/models/{artifact.name}"
    measured = measure([url], duration_s=0.3)
    assert "was sent random numbers" in measured.report.notes[0]
    assert measured.measurements[0].accuracy is None


def test_a_server_without_that_model_is_refused_with_its_answer(make_artifact, serve) -> None:
    server = serve(make_artifact())
    with pytest.raises(UsageError, match=r"GET /v2/models/other answered 404: .*no such model"):
        measure([server.url], payload=make_artifact(name="other"))


def test_a_server_that_does_not_list_its_models_needs_a_name(make_artifact, serve) -> None:
    with pytest.raises(UsageError, match="lists no models") as caught:
        measure([serve(make_artifact()).url])
    assert "--payload" in str(caught.value)


def test_ctrl_c_under_load_keeps_what_was_measured(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    # Python's own handler, whatever tests before this one in the same process have left.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        after_calls_of_a_row(server, 100, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt) as caught:
            measure([server.url], payload=artifact, concurrency=(1, 2), duration_s=20.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(caught.value, MeasureInterrupted)
    assert caught.value.measured.partial
    (row,) = caught.value.measured.measurements
    assert row.latency.samples > 20
    assert "interrupted" in row.verdict.reasons


def test_a_second_ctrl_c_does_not_wait_for_a_server_that_hangs(make_artifact, serve, capsys) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    hang = threading.Event()

    def press() -> None:
        """Twice, once a call hangs; the second after it was said that answers are waited for."""
        answers = server.behave
        server.behave = lambda count: hang.wait(60) and None
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2.0)
        os.kill(os.getpid(), signal.SIGINT)
        server.behave = answers

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        after_calls_of_a_row(server, 100, lambda: threading.Thread(target=press).start())
        began = time.monotonic()
        with pytest.raises(MeasureInterrupted) as caught:
            measure([server.url], payload=artifact, concurrency=(2,), duration_s=20.0)
        assert time.monotonic() - began < 20
    finally:
        hang.set()
        signal.signal(signal.SIGINT, before)
    (row,) = caught.value.measured.measurements
    assert row.errors == {"not waited for after Ctrl-C": 2}
    assert row.latency.max_ns == TIMEOUT_S * 1e9
    assert "Ctrl-C again goes without them" in " ".join(capsys.readouterr().err.split())


def test_a_server_that_knows_no_binary_tensors_is_sent_numbers(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    server.binary = False
    measured = measure([f"oip+{server.url}"], payload=artifact, duration_s=0.2)
    assert measured.measurements[0].errors == {}
    assert any("numbers in JSON" in note for note in measured.report.notes)
    client = find_endpoint(f"oip+{server.url}", model=artifact.name).client
    feed = {"input": np.array([[0.1, -2.0]], np.float32)}
    head, body = client.encode(feed).split(b"\r\n\r\n")
    assert b"Inference-Header" not in head
    assert np.array_equal(np.array(json.loads(body)["inputs"][0]["data"], np.float32), feed["input"].ravel())


_FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from dlops.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_more_connections_than_this_process_may_open_are_no_fault_of_the_server(make_artifact, serve, tmp_path) -> None:
    artifact = make_artifact()
    command = [
        "bench", serve(artifact).url, "--payload", str(artifact.directory), "--concurrency", "250", "--duration", "0.2",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    child = subprocess.run([sys.executable, "-c", _FEW_FILES, *command], capture_output=True, text=True, check=False)
    assert child.returncode == 4, child.stderr
    assert "250 connections at once: this process may have 200 files open" in child.stderr
    assert "ulimit -n 314" in child.stderr
    assert (
        failure_kind(OSError(errno.EMFILE, "Too many open files")) == "not sent: too many open files here (ulimit -n)"
    )
    assert _why_not_open(OSError(errno.EMFILE, "Too many open files")) == pacing.NO_FILES


def test_a_soft_limit_of_files_is_raised_to_what_is_allowed() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 2000)); "
        "from dlops.bench.kernel import open_more_files; open_more_files(500); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "(2000, 2000)"


def test_the_time_to_connect_anew_is_in_the_latency(make_artifact, serve, monkeypatch) -> None:
    artifact = make_artifact()
    endpoint = find_endpoint(serve(artifact).url, model=artifact.name)
    payload, connect, send = prepare(endpoint, artifact, batch=1), HttpTransport.connect, Connection.send

    async def slowly(self: HttpTransport, host: str, port: int) -> Connection:
        await asyncio.sleep(0.05)
        return await connect(self, host, port)

    async def once(self: Connection, request: bytes, *, timeout_s: float) -> Answer:
        answer = await send(self, request, timeout_s=timeout_s)
        # As with a server that closes after each answer.
        await self.aclose()
        return answer

    monkeypatch.setattr(HttpTransport, "connect", slowly)
    monkeypatch.setattr(Connection, "send", once)
    row, samples, _ = measure_endpoint(endpoint, payload, batch=1, concurrency=1, duration_s=0.5, key="row00")
    assert row.latency.samples
    assert samples["row00"].min() >= 50e6


@pytest.mark.parametrize("options", [["--boundary", "device"], ["--trust"], ["--threads", "1"], ["--device", "cpu"]])
def test_what_is_for_this_machine_is_refused_where_only_urls_are_named(options, make_artifact, serve, capsys) -> None:
    server = serve(make_artifact())
    assert run(["bench", server.url, *options, "--duration", "0.1"]) == 2
    assert "are for targets on this machine, and only URLs are named" in capsys.readouterr().err


def test_an_address_without_its_scheme_is_told_what_it_lacks(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "127.0.0.1:3000"]) == 2
    assert "a server is named http://127.0.0.1:3000" in capsys.readouterr().err
    assert run(["bench", "nothing/here"]) == 2
    assert "dlops list" in capsys.readouterr().err


def test_calls_longer_than_the_run_are_measured_all_the_same(make_artifact, serve, monkeypatch) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    monkeypatch.setattr("dlops.bench.load._WINDOW_S", 0.05)
    server.behave = lambda count: time.sleep(1.0)
    requests = [encode_request(find_endpoint(server.url, model=artifact.name), artifact.samples().inputs)]
    loaded = closed_loop("127.0.0.1", server.port, requests, concurrency=2, duration_s=0.2, max_warmup_s=0.2)
    assert loaded.errors == {}
    # The run ends once one of its own calls is sent; the other's turn may come a moment later.
    assert 1 <= len(loaded.latencies_ns) <= 2
    assert (loaded.latencies_ns > 0.9e9).all()
    assert len(loaded.earlier_ns) == 2


def test_a_slow_service_is_measured_at_a_rate(make_artifact, serve) -> None:
    artifact = make_artifact()
    server = serve(artifact)
    server.behave = lambda count: time.sleep(0.4)
    measured = measure([server.url], payload=artifact, offered=Offered(rates=(2.0,)), duration_s=2.0)
    (row,) = measured.measurements
    assert row.error_count == 0
    assert row.latency.min_ns > 0.35e9
