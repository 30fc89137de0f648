"""The harness measured by itself: on a virtual clock, against a real null server, and what a report makes of it."""

from __future__ import annotations

import errno
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dlops.bench import calibrate as module
from dlops.bench.arrivals import constant
from dlops.bench.calibrate import (
    FULL,
    Effort,
    calibrate,
    clock_cost,
    judge_lag,
    oversleep,
    sending_cost,
    this_machine,
    timing_cost,
)
from dlops.bench.calibrated import attach
from dlops.bench.calibration_text import facts, line
from dlops.bench.kept import keep, kept
from dlops.bench.load import closed_loop
from dlops.bench.nullserver import ANSWER, complete_requests, null_server
from dlops.bench.openloop import OpenLoaded, open_loop
from dlops.bench.results import Measured
from dlops.bench.table import to_markdown
from dlops.cli import run
from dlops.errors import CorruptError, MachineError
from dlops.report import Calibration, Measurement, SendingCost, read_report
from dlops.workflows import calibration as workflow
from dlops.workflows.calibration import calibrated

MS = 1_000_000
REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"


class CostlyClock:
    """Time passes in calls, sleeps and readings; read_ns: what the harness's reading costs, late_ns: a sleep too."""

    def __init__(self, *, read_ns: int = 0, late_ns: int = 0) -> None:
        self.now = 0
        self.read_ns, self.late_ns = read_ns, late_ns

    def now_ns(self) -> int:
        self.now += self.read_ns
        return self.now

    def busy_ns(self) -> int:
        return 0

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9) + self.late_ns

    def passes(self, duration_ns: int) -> Callable[[], None]:
        def call() -> None:
            self.now += duration_ns

        return call


@pytest.mark.parametrize("read_ns", [50, 400])
def test_what_timing_adds_is_the_latency_beyond_the_bare_loops(read_ns: int) -> None:
    clock = CostlyClock(read_ns=read_ns)
    # The bare loop's own clock is free: all that is found is the harness's.
    cost = timing_cost(
        budget_s=0.05, clock=clock, now=lambda: ticking(clock), no_op=clock.passes(30), wait=clock.passes(MS)
    )
    assert cost.added_ns.value == pytest.approx(read_ns, abs=1)
    assert cost.share_of_1_ms.value == pytest.approx(read_ns / MS)
    assert cost.added_ns.low is not None
    assert cost.share_of_1_ms.high is not None


def ticking(clock: CostlyClock) -> int:
    clock.now += 1
    return clock.now


def test_a_call_that_costs_something_itself_is_not_counted_for_the_harness() -> None:
    added = [
        timing_cost(
            budget_s=0.05, clock=clock, now=lambda clock=clock: ticking(clock), no_op=clock.passes(no_op_ns),
            wait=clock.passes(MS),
        ).added_ns.value
        for no_op_ns in (20, 2000)
        for clock in [CostlyClock(read_ns=100)]
    ]  # fmt: skip
    assert added == pytest.approx([100, 100], abs=1)


def test_the_clocks_step_is_the_smallest_that_it_takes_and_its_cost_the_mean() -> None:
    # Two readings in three fall on the same tick of 60 ns.
    readings = iter(range(10**6))
    step_ns, cost_ns = clock_cost(lambda: next(readings) // 3 * 60)
    assert step_ns == 60
    assert cost_ns == pytest.approx(20, rel=0.02)


def test_oversleep_is_how_much_longer_than_asked() -> None:
    assert set(oversleep(count=20, clock=CostlyClock(late_ns=70_000)).tolist()) == {70_000}


def loaded(lag_ns: np.ndarray, *, failed: np.ndarray | None = None) -> OpenLoaded:
    due = np.arange(len(lag_ns)) * MS
    bad = np.zeros(len(lag_ns), bool) if failed is None else failed
    return OpenLoaded(
        due_ns=due, sent_ns=np.where(bad, -1, due + lag_ns), arrived_ns=np.where(bad, -1, due + lag_ns + MS),
        outcome=np.where(bad, -5, 200), timeout_s=30.0, connections=8, stopped=None, interrupted=False,
    )  # fmt: skip


def test_a_rate_is_kept_where_certainly_few_requests_leave_late() -> None:
    def late(n: int, count: int) -> np.ndarray:
        lags = np.full(n, MS // 10)
        lags[np.linspace(0, n - 1, count).astype(int)] = 2 * MS
        return lags

    assert judge_lag(loaded(late(2000, 5))) == "met"
    assert judge_lag(loaded(late(2000, 20))) == "unsure"
    assert judge_lag(loaded(late(2000, 60))) == "missed"
    assert judge_lag(loaded(late(100, 0))) == "unsure", "too few to rule out one in a hundred"


def test_a_request_that_never_left_is_a_late_one() -> None:
    failed = np.arange(2000) % 20 == 0
    assert judge_lag(loaded(np.zeros(2000, np.int64), failed=failed)) == "missed"


def test_requests_are_counted_however_they_are_cut() -> None:
    buffer = bytearray()
    counts = []
    for byte in REQUEST * 2 + b"GET / HTTP/1.1\r\n\r\n":
        buffer.append(byte)
        counts.append(complete_requests(buffer))
    assert sum(counts) == 3
    assert [place + 1 for place, count in enumerate(counts) if count] == [len(REQUEST), 2 * len(REQUEST), len(counts)]
    assert complete_requests(bytearray(REQUEST * 3)) == 3


def test_the_null_server_answers_each_whole_request_once_and_outlives_a_broken_connection() -> None:
    with null_server() as port:
        with socket.create_connection(("127.0.0.1", port)) as rude:
            rude.sendall(REQUEST[:-1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
            big = b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1_000_000
            one.sendall(big + REQUEST)
            answered = b""
            while len(answered) < 2 * len(ANSWER):
                answered += one.recv(1 << 16)
            one.shutdown(socket.SHUT_WR)
            assert one.recv(1) == b""
            assert answered == ANSWER * 2
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_both_load_generators_take_its_answers() -> None:
    with null_server() as port:
        closed = closed_loop("127.0.0.1", port, [REQUEST], concurrency=2, duration_s=0.1, max_warmup_s=0.1)
        opened = open_loop("127.0.0.1", port, [REQUEST], constant(200, duration_s=0.2), senders=1)
    assert closed.errors == opened.errors == {}
    assert len(closed.latencies_ns) > 0
    assert opened.succeeded.all()


def test_a_null_server_that_does_not_start_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlops.bench.nullserver.sys.executable", "/bin/false")
    with pytest.raises(MachineError, match="null server did not start"), null_server():
        pass


def test_a_quick_calibration_is_whole_and_says_what_it_leaves_out() -> None:
    found = calibrate(quick=True)
    assert found.quick
    assert found.machine == this_machine()
    assert found.timing.added_ns.low is not None
    assert found.network is not None
    assert found.network.capacity is None
    assert found.network.closed_rate is not None
    assert found.network.closed_rate.value > 500
    assert "what a sender keeps was not looked for" in found.reasons[-1]
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_what_a_busy_machine_does_to_a_calibration_is_said(calibration) -> None:
    def against(cost: SendingCost) -> list[str]:
        return module._against_sending(cost, FULL, settled=True)

    timing, network = calibration.timing, calibration.network
    assert module._against_timing(timing) == against(network) == []
    wide = timing.share_of_1_ms.model_copy(update={"high": 0.127})
    (said,) = module._against_timing(timing.model_copy(update={"share_of_1_ms": wide}))
    assert said.startswith("a wait of 1 ms may be recorded over 1% too long")
    wide = network.closed_rate.model_copy(update={"value": 218.0, "low": 1.0, "high": 436.0})
    (said,) = against(network.model_copy(update={"closed_rate": wide}))
    assert said.startswith("the closed loop's rate varied")
    assert len(against(network.model_copy(update={"floor_ns": None, "lag_p99_ns": None}))) == 2
    assert "latency was still moving" in module._against_sending(network, FULL, settled=False)[0]


def simulated(capacity: float) -> Callable[..., OpenLoaded]:
    """open_loop's stand-in: a sender that takes 1/capacity seconds for each request, and one to a server at once."""

    def open_loop(host: str, port: int, requests: list[bytes], due_ns: np.ndarray, **_: object) -> OpenLoaded:
        step = round(1e9 / capacity)
        order = np.arange(len(due_ns)) * step
        sent = np.maximum.accumulate(due_ns - order) + order
        return OpenLoaded(
            due_ns=due_ns, sent_ns=sent, arrived_ns=sent + MS, outcome=np.full(len(due_ns), 200), timeout_s=30.0,
            connections=8, stopped=None, interrupted=False,
        )  # fmt: skip

    return open_loop


SHORT = Effort(timing_s=0.1, closed_s=0.1, warmup_s=0.1, lag_s=1.0, sleeps=10, probe_s=2.0)


def test_a_full_one_finds_the_highest_rate_that_a_sender_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_loop", simulated(6000.0))
    cost, _ = sending_cost(SHORT)
    assert cost.capacity is not None
    assert cost.missed is not None
    # Poisson arrivals make a queue before a sender that is busy nine tenths of the time.
    assert 3000 < cost.capacity < cost.missed < 6000
    assert cost.missed < cost.capacity * 1.11
    assert cost.closed_rate is not None
    assert cost.closed_rate.value > 0
    assert cost.lag_p50_ns is not None
    assert cost.lag_p50_ns.value == 0


def test_a_machine_that_keeps_no_rate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "open_loop", simulated(400.0))
    cost, against = sending_cost(SHORT)
    assert cost.capacity is None
    assert cost.missed == 500
    assert any(reason.startswith("no rate was kept: even at 500 requests a second") for reason in against)


def row_of(example: Callable[..., Measured], boundary: str, **changes: object) -> Measurement:
    row = next(row for row in example().measurements if row.boundary == boundary)
    return row.model_copy(update={"verdict": row.verdict.model_copy(update={"steady": True, "reasons": ()}), **changes})


def reasons(
    example: Callable[..., Measured], row: Measurement, calibration: Calibration, *, senders: int | None = None
) -> tuple[bool, str]:
    measured = example()
    report = measured.report.model_copy(update={"measurements": (row,)})
    attached = attach(Measured(report=report, samples=measured.samples), calibration, senders=senders)
    assert attached.report.calibration == calibration
    (judged,) = attached.measurements
    return judged.verdict.steady, "; ".join(judged.verdict.reasons)


def median(row: Measurement, p50_ns: float) -> Measurement:
    interval = row.latency.p50_ns.model_copy(update={"value": p50_ns})
    return row.model_copy(update={"latency": row.latency.model_copy(update={"p50_ns": interval})})


def test_a_call_so_short_that_timing_shows_in_it_says_so_and_may_be_quoted(example, calibration) -> None:
    row = row_of(example, "host")
    assert reasons(example, median(row, 5_000), calibration) == (
        True, "a short call: 2.0% of the median is what timing adds (calibration)",
    )  # fmt: skip
    assert reasons(example, median(row, 11_000), calibration) == (True, "")


def test_a_service_near_the_floor_says_so_and_may_be_quoted(example, calibration) -> None:
    row = row_of(example, "network")
    assert reasons(example, median(row, 290_000), calibration) == (
        True,
        "near the floor: client and loopback alone take 0.100 ms of a median of 0.290 ms (calibration)",
    )
    assert reasons(example, median(row, 310_000), calibration) == (True, "")


def test_a_rate_beyond_what_the_senders_keep_is_client_bound(example, calibration) -> None:
    row = row_of(example, "network", lag_p99_ns=3e6)

    def at(rate: float, **changes: object) -> Measurement:
        load = row.load.model_copy(update={"scenario": "server", "concurrency": 1, "rate": rate})
        return row.model_copy(update={"load": load, **changes})

    slow = calibration.model_copy(
        update={"network": calibration.network.model_copy(update={"capacity": 1500.0, "missed": 1600.0})}
    )
    steady, said = reasons(example, at(2000.0), slow)
    assert not steady
    assert said == "client-bound: offered more than the 1,500 a second that one sender keeps (calibration)"
    assert reasons(example, at(1400.0), slow) == (True, "")
    # More processes keep more; by default there is one for every 4,000 a second.
    assert reasons(example, at(2000.0), slow, senders=2) == (True, "")
    assert "3,000 a second that 2 senders keep" in reasons(example, at(6000.0), slow)[1]
    # What left on time in this very run is no fault of the client's.
    steady, said = reasons(example, at(2000.0, lag_p99_ns=4e5), slow)
    assert steady
    assert said.endswith("99% left within 0.4 ms all the same")


def test_a_closed_loop_near_what_the_client_can_do_is_client_bound(example, calibration) -> None:
    row = row_of(example, "network")
    assert row.load.concurrency == 8

    def with_rate(items: float, batch: int) -> Measurement:
        load = row.load.model_copy(update={"batch": batch})
        throughput = row.throughput.model_copy(update={"value": items})
        return row.model_copy(update={"load": load, "throughput": throughput})

    steady, said = reasons(example, with_rate(9000.0, 1), calibration)
    assert not steady
    assert said.startswith("client-bound: 9,000 calls a second, and the client reaches 10,000")
    assert reasons(example, with_rate(9000.0, 4), calibration) == (True, "")
    # Whoever exceeds what was found possible was not held back by it.
    steady, said = reasons(example, with_rate(12_000.0, 1), calibration)
    assert steady
    assert "more than the 10,000 of the calibration" in said


def test_over_grpc_it_is_said_that_the_client_may_be_what_bounds_the_row(example, calibration) -> None:
    row = row_of(example, "network")
    assert row.load.concurrency == 8
    over_grpc = row.model_copy(update={"target": "oip+grpc://127.0.0.1:8001"})
    steady, said = reasons(example, over_grpc, calibration)
    assert steady
    assert said == "whether the client bounded it is not known: the calibration speaks HTTP"
    alone = over_grpc.model_copy(update={"load": row.load.model_copy(update={"concurrency": 1})})
    assert reasons(example, alone, calibration) == (True, "")


def test_without_a_network_part_nothing_is_held_against_a_service(example, calibration) -> None:
    row = median(row_of(example, "network"), 1_000)
    assert reasons(example, row, calibration.model_copy(update={"network": None})) == (True, "")


def test_every_number_is_in_the_table_and_the_line(calibration) -> None:
    told = dict(facts(calibration))
    assert (
        told["Timing a call"] == "adds 0.100 (0.0900 to 0.110) µs; 1 ms is recorded 0.050% (0.040% to 0.060%) too long"
    )
    assert told["Client and loopback"].startswith("take 0.100 (0.0900 to 0.110) ms of a request")
    assert told["Closed loop"] == "at most 10,000 (9,000 to 11,000) requests a second with 8 calls in flight"
    assert told["One sender"] == "keeps its schedule up to 4,000 requests a second, no longer 4,400"
    assert "0.240" in told["Requests at 500 a second"]
    assert "To be read with care" not in told
    doubtful = calibration.model_copy(update={"reasons": ("one", "another")})
    assert dict(facts(doubtful))["To be read with care"] == "one; another"
    assert line(calibration) == (
        "harness (20 November 2026): timing adds 0.100 µs to a call, client and loopback take 0.100 ms of a request, "
        "one sender keeps 4,000 requests a second"
    )


def test_the_markdown_has_the_line(example, calibration) -> None:
    report = example().report
    assert "harness (" not in to_markdown(report.model_copy(update={"calibration": None}))
    text = to_markdown(report)
    assert text.endswith(f"- {line(calibration)}\n")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def of_here(calibration: Calibration) -> Calibration:
    return calibration.model_copy(update={"machine": this_machine()})


def test_a_calibration_is_kept_for_its_machine_alone(calibration, empty_cache) -> None:
    assert kept() is None
    keep(calibration)
    assert kept() is None, "another machine's"
    path = keep(of_here(calibration))
    assert kept() == of_here(calibration)
    assert path.is_relative_to(empty_cache / "dlops")
    assert [one.name for one in path.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-40], "truncated"),
        (lambda text: text.replace("75.0", "76.0"), "altered"),
        (lambda text: json.dumps(json.loads(text) | {"schema": 9, "dlops_version": "9.1"}), "schema 9 is newer"),
        (lambda text: "[]", "not a JSON object"),
    ],
    ids=["truncated", "altered", "newer", "foreign"],
)
def test_a_kept_one_that_is_damaged_is_named_and_made_anew(
    damage, said, calibration, example, empty_cache, monkeypatch, capfd
) -> None:
    path = keep(of_here(calibration))
    path.write_text(damage(path.read_text()))
    with pytest.raises(CorruptError, match=said):
        kept()
    monkeypatch.setattr(workflow, "calibrate", lambda **_: calibration)
    report = calibrated(example()).report
    assert report.calibration == calibration
    errors = capfd.readouterr().err
    assert said in errors
    assert str(path) in errors
    assert "calibrating in short" in errors


def test_a_cache_that_may_not_be_read_costs_no_report(calibration, example, empty_cache, monkeypatch, capfd) -> None:
    exists = Path.exists

    def refused(path: Path, **options: bool) -> bool:
        if path.name == "calibration.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refused)
    monkeypatch.setattr(workflow, "calibrate", lambda **_: calibration)
    assert calibrated(example()).report.calibration == calibration
    assert "permission denied" in capfd.readouterr().err


def test_a_cache_below_a_file_is_said_and_the_run_goes_on(calibration, tmp_path, monkeypatch, capfd) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(workflow, "calibrate", lambda **_: calibration)
    assert kept() is None
    assert workflow.calibrate_fully() == calibration
    assert "not kept: " in capfd.readouterr().err
    with pytest.raises(MachineError, match="file"):
        keep(calibration)


def test_another_machines_file_in_this_ones_place_is_not_taken(calibration, empty_cache) -> None:
    path = keep(of_here(calibration))
    path.write_text(keep(calibration).read_text())
    with pytest.raises(CorruptError, match="made on another machine"):
        kept()


def test_a_relative_cache_home_is_ignored_and_home_taken(calibration, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keep(calibration).is_relative_to(tmp_path / ".cache" / "dlops")


def test_a_report_takes_the_kept_one_and_measures_nothing(
    calibration, example, empty_cache, monkeypatch, capfd
) -> None:
    keep(of_here(calibration))
    monkeypatch.setattr(workflow, "calibrate", lambda **_: pytest.fail("measured"))
    assert calibrated(example()).report.calibration == of_here(calibration)
    assert capfd.readouterr().err == ""


def test_a_run_that_was_cut_short_does_not_wait_for_one(example, empty_cache, monkeypatch) -> None:
    monkeypatch.setattr(workflow, "calibrate", lambda **_: pytest.fail("measured"))
    measured = example()
    assert calibrated(measured, may_measure=False) is measured


@pytest.mark.parametrize(("boundary", "network"), [("host", False), ("network", True)])
def test_sending_is_calibrated_only_for_services(
    boundary, network, example, calibration, empty_cache, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(workflow, "calibrate", lambda **options: asked.append(options) or calibration)
    measured = example()
    rows = tuple(row for row in measured.measurements if row.boundary == boundary)
    calibrated(Measured(report=measured.report.model_copy(update={"measurements": rows}), samples=measured.samples))
    assert asked == [{"quick": True, "network": network}]


def test_where_one_cannot_be_made_the_report_is_written_and_says_so(example, empty_cache, monkeypatch) -> None:
    def fail(**_: object) -> Calibration:
        raise MachineError("the null server did not start")

    monkeypatch.setattr(workflow, "calibrate", fail)
    measured = example()
    bare = measured.report.model_copy(update={"calibration": None})
    report = calibrated(Measured(report=bare, samples=measured.samples)).report
    assert report.calibration is None
    assert report.notes[-1] == "the harness was not calibrated: the null server did not start"


def test_alone_it_is_printed_and_kept(calibration, empty_cache, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(workflow, "calibrate", lambda: of_here(calibration))
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "--calibrate"]) == 0
    output, errors = capfd.readouterr()
    assert re.search(r"One sender +keeps its schedule up to 4,000", output)
    assert "kept: " in errors
    assert kept() == of_here(calibration)
    assert run(["bench", "--calibrate", "--json", "-"]) == 0
    assert Calibration.model_validate_json(capfd.readouterr().out) == of_here(calibration)


def test_alone_it_is_kept_whatever_becomes_of_its_copy(calibration, empty_cache, tmp_path, monkeypatch, capfd) -> None:
    asked: list[int] = []
    monkeypatch.setattr(workflow, "calibrate", lambda: asked.append(1) or of_here(calibration))
    (tmp_path / "file").write_text("mine")
    assert run(["bench", "--calibrate", "--json", str(tmp_path / "file" / "copy.json")]) == 2
    assert not asked
    assert "is no folder" in capfd.readouterr().err

    def full(path, text) -> None:
        raise MachineError("no space left")

    monkeypatch.setattr(workflow, "write_copy", full)
    assert run(["bench", "--calibrate", "--json", str(tmp_path / "copy.json")]) == 4
    assert kept() == of_here(calibration)


def test_alone_it_is_printed_and_copied_where_it_cannot_be_kept(calibration, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(workflow, "calibrate", lambda: of_here(calibration))
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    copy = tmp_path / "copy.json"
    assert run(["bench", "--calibrate", "--json", str(copy)]) == 4
    output, errors = capfd.readouterr()
    assert re.search(r"One sender +keeps its schedule", output)
    assert "set XDG_CACHE_HOME" in errors
    assert Calibration.model_validate_json(copy.read_text()) == of_here(calibration)


def test_alone_it_takes_no_options_that_are_for_targets(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "--calibrate", "--rate", "100", "--html", "page.html"]) == 2
    assert "--rate, --html: for targets" in capfd.readouterr().err


def test_with_a_target_it_comes_last_and_the_report_carries_it(
    make_artifact, calibration, empty_cache, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(workflow, "calibrate", lambda: of_here(calibration))
    artifact = make_artifact()
    out = tmp_path / "report"
    status = run(["bench", str(artifact.directory), "--calibrate", "--duration", "0.1", "--out", str(out)])
    assert status in (0, 3)
    errors = capfd.readouterr().err
    # A target that is not there is told of before half a minute has gone.
    assert errors.index("timing") < errors.index("calibrating")
    assert read_report(out).calibration == of_here(calibration)
    assert "<h2>Calibration</h2>" in (out / "report.html").read_text()


def test_ctrl_c_while_one_is_made_keeps_the_measurements(make_artifact, empty_cache, tmp_path, monkeypatch) -> None:
    def ctrl_c(**_: object) -> Calibration:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "calibrate", ctrl_c)
    out = tmp_path / "report"
    assert run(["bench", str(make_artifact().directory), "--duration", "0.1", "--out", str(out)]) == 130
    report = read_report(out)
    assert len(report.measurements) == 1
    assert report.calibration is None
