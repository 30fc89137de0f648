"""The open loop against servers whose behaviour is known: a stall, a queue, and nothing at all to wait for."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dlops.bench.arrivals import poisson
from dlops.bench.dependence import STRETCHES
from dlops.bench.grpc import GrpcTransport
from dlops.bench.load import closed_loop
from dlops.bench.nullserver import null_server
from dlops.bench.openloop import open_loop
from dlops.bench.stats import rate_interval
from dlops.report import Interval

BODY = b"x" * 256
REQUEST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 256\r\n\r\n" + BODY
S = 1_000_000_000


@contextmanager
def running(*arguments: str) -> Iterator[int]:
    """The port of one of the servers, which ends with the block."""
    command = [sys.executable, str(Path(__file__).with_name("servers.py")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def quantile_ms(times_ns: np.ndarray, q: float) -> float:
    return float(np.quantile(times_ns, q, method="higher")) / 1e6


def test_a_stall_of_one_second_in_thirty(write_page: Callable[..., Path]) -> None:
    with running("frozen", "0.001", "10", "1") as port:
        loaded = open_loop("127.0.0.1", port, [REQUEST], poisson(100, duration_s=30))
    with running("frozen", "0.001", "10", "1") as port:
        closed = closed_loop("127.0.0.1", port, [REQUEST], concurrency=1, duration_s=30, max_warmup_s=0.5)
    with running("frozen", "0.001", "10", "1") as port:
        few = open_loop("127.0.0.1", port, [REQUEST], poisson(50, duration_s=30), connections=1)
    response = quantile_ms(loaded.response_ns, 0.99)
    # A thousand calls a second, of which the stall is one: it is not among the slowest hundredth.
    hidden = quantile_ms(closed.latencies_ns, 0.99)
    one_response, one_service = (quantile_ms(times, 0.99) for times in (few.response_ns, few.service_ns))
    write_page(
        "stall",
        title="A stall of one second in thirty",
        says="A server that answers every request after 1 ms stands still once for 1 s, in a run of 30 s. The 99th "
        "percentile of what users wait is then 1 − 0.01 × 30 = 0.70 s. Response time counts from when a request was "
        "due, service time from its send. Where requests may be in flight at once, each is sent when it is due, into "
        "the stall, and both show it. Over one connection the requests wait at the client for the one before them, and "
        "service time hides what they waited; so does a closed loop, which asks nothing meanwhile.",
        header=["how", "requests", "p50", "p99"],
        rows=[
            ["`--rate 100`, response time", f"{len(loaded.due_ns):,}",
             f"{quantile_ms(loaded.response_ns, 0.5):.2f} ms", f"{response:.0f} ms"],
            ["the same requests, service time", f"{len(loaded.due_ns):,}",
             f"{quantile_ms(loaded.service_ns, 0.5):.2f} ms", f"{quantile_ms(loaded.service_ns, 0.99):.0f} ms"],
            ["`--rate 50` over one connection, response time", f"{len(few.due_ns):,}",
             f"{quantile_ms(few.response_ns, 0.5):.2f} ms", f"{one_response:.0f} ms"],
            ["the same requests, service time", f"{len(few.due_ns):,}",
             f"{quantile_ms(few.service_ns, 0.5):.2f} ms", f"{one_service:.2f} ms"],
            ["one call in flight", f"{len(closed.latencies_ns):,}",
             f"{quantile_ms(closed.latencies_ns, 0.5):.2f} ms", f"{hidden:.2f} ms"],
        ],
    )  # fmt: skip
    assert loaded.errors == {}
    assert abs(response - 700) < 70
    assert hidden < 20
    # Where the client waits, service time hides the stall.
    assert few.errors == {}
    assert abs(one_response - 700) < 70
    assert one_service < 20


def lindley(came_ns: np.ndarray, service_ns: float) -> np.ndarray:
    """The wait of each request in a queue of equal service times, from when they came: Lindley 1952."""
    waits, free = np.empty(len(came_ns)), -np.inf
    for place, came in enumerate(came_ns):
        waits[place] = max(0.0, free - came)
        free = max(free, came) + service_ns
    return waits


def mean_wait(waits_ns: np.ndarray, due_ns: np.ndarray) -> Interval:
    """The mean with the interval that dlops gives a mean over stretches of a run, which may resemble one another."""
    span = float(np.ptp(due_ns)) / STRETCHES
    stretch = np.minimum((due_ns - due_ns[0]) // span, STRETCHES - 1).astype(np.int64)
    return rate_interval(np.bincount(stretch, weights=waits_ns), np.bincount(stretch).astype(np.float64))


def test_a_queue_with_equal_service_times(write_page: Callable[..., Path]) -> None:
    # Shorter runs of so skewed a wait would have intervals that hold in nine of ten, on any machine.
    service_s, runs, lasts_s = 0.004, 20, 100.0
    service_ns = service_s * S
    rows, inside = [], {}
    for load in (0.5, 0.8):
        expected = load * service_s / (2 * (1 - load)) * S
        waits, ideal, ways, held = [], [], [], 0
        for seed in range(runs):
            with running("queue", str(service_s)) as port:
                due = poisson(load / service_s, duration_s=lasts_s, seed=seed)
                loaded = open_loop("127.0.0.1", port, [REQUEST], due)
            in_theory = lindley(loaded.due_ns.astype(np.float64), service_ns)
            settled = loaded.due_ns > S  # it begins empty
            # What a request that met an empty queue took beyond its service is the way there and back, in every other
            # response too. Those that came just behind another may have met it all the same.
            gap = np.diff(loaded.due_ns, prepend=-S) - service_ns
            alone = settled & (in_theory == 0) & (gap > service_ns)
            way_ns = float(np.median(loaded.response_ns[alone])) - service_ns
            wait = loaded.response_ns[settled] - service_ns - way_ns
            found = mean_wait(wait, loaded.due_ns[settled])
            assert found.low is not None
            assert found.high is not None
            held += found.low <= expected <= found.high
            waits.append(found.value)
            ideal.append(float(np.mean(in_theory[settled])))
            ways.append(way_ns)
        inside[load] = held
        off = np.array(waits) - np.array(ideal)
        rows.append(
            [f"{load}", f"{expected / 1e6:.1f} ms", f"{np.mean(waits) / 1e6:.2f} ms", f"{held} of {runs}",
             f"{np.mean(off) / 1e6:+.3f} ms ({off.min() / 1e6:+.3f} to {off.max() / 1e6:+.3f})",
             f"{np.median(ways) / 1e6:.2f} ms"]
        )  # fmt: skip
    write_page(
        "queue",
        title="A queue whose wait is known",
        says=f"A server that takes {service_s * 1e3:g} ms for each request, one at a time, under Poisson arrivals "
        f"(M/D/1): the mean wait is ρD/(2(1−ρ)). {runs} runs of {lasts_s:g} s at each load; the interval is "
        "made as reports make that of throughput. The way there and back, the median of the requests that met an empty "
        "queue, is taken off. "
        "From Lindley: what was measured less what Lindley's recursion gives for the very same arrivals, the mean of "
        "the runs and the outermost of them, which is what this machine and the generator add.",
        header=["load ρ", "mean wait expected", "mean wait measured", "in its 95 % interval", "from Lindley", "way"],
        rows=rows,
    )  # fmt: skip
    assert all(held >= 18 for held in inside.values()), inside


def server_inside(port: int) -> float:
    """The mean number of requests that a server had inside it, from the first to the last answer, by its own count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/inside") as answer:
        counted = json.load(answer)
    return float(counted["sum_s"] / counted["span_s"])


def test_what_the_server_counts_inside_is_the_rate_times_the_time_in_it(write_page: Callable[..., Path]) -> None:
    # Little's law between two clocks: the server's count of what it has not answered, and the client's rate and times.
    # Long enough that what the way there and back varies by, on a busy machine, is little of it.
    service_s, lasts_s = 0.05, 60.0
    rows, off = [], []
    for load in (0.5, 0.8):
        due = poisson(load / service_s, duration_s=lasts_s, seed=3)
        with running("parallel", "0") as port:
            way_ns = float(np.mean(open_loop("127.0.0.1", port, [REQUEST], due[due < 10 * S]).service_ns))
        with running("queue", str(service_s)) as port:
            loaded = open_loop("127.0.0.1", port, [REQUEST], due)
            counted = server_inside(port)
        assert loaded.errors == {}
        spent_s = float(loaded.arrived_ns.max() - loaded.sent_ns[0]) / S
        expected = len(due) / spent_s * (float(np.mean(loaded.service_ns)) - way_ns) / S
        off.append(expected / counted - 1)
        rows.append(
            [f"{load}", f"{len(due):,}", f"{counted:.4f}", f"{expected:.4f}", f"{off[-1]:+.2%}",
             f"{way_ns / 1e6:.2f} ms"]
        )  # fmt: skip
    write_page(
        "little",
        title="What a server has inside it, by its own count",
        says=f"A server that takes {service_s * 1e3:g} ms for each request, one at a time, under Poisson arrivals for "
        f"{lasts_s:g} s counts what has come and is not answered, over time and by its own clock. By Little's law that "
        "is the rate times the time in the server, which is here the client's: its requests a second, and the mean "
        "from send to answer without the way there and back (the mean against a server that answers at once).",
        header=["load ρ", "requests", "inside, by the server", "rate × time, by the client", "apart", "way"],
        rows=rows,
    )
    assert max(map(abs, off)) < 0.02


def test_what_one_sender_can_send(write_page: Callable[..., Path]) -> None:
    rows, lags = [], {}
    for rate in (1000, 2000, 4000, 5000, 6000):
        with null_server() as port:
            loaded = open_loop("127.0.0.1", port, [REQUEST], poisson(rate, duration_s=10), senders=1)
        lags[rate] = quantile_ms(loaded.lag_ns, 0.99)
        sent = len(loaded.due_ns) / (float(loaded.sent_ns.max()) / S)
        rows.append(
            [f"{rate:,}", f"{sent:,.0f}", f"{quantile_ms(loaded.lag_ns, 0.5):.3f} ms", f"{lags[rate]:.3f} ms",
             f"{quantile_ms(loaded.service_ns, 0.5):.3f} ms", f"{loaded.connections}"]
        )  # fmt: skip
        assert loaded.errors == {}
    write_page(
        "sender",
        title="What one sender can send",
        says="One process offers Poisson arrivals to a server that answers at once (256 bytes there, 2 back), 10 s at "
        "each rate. The server is a process in Python on the other core. Lag: how much later than due requests left.",
        header=["offered /s", "sent /s", "lag p50", "lag p99", "service p50", "connections"],
        rows=rows,
    )
    assert lags[5000] <= 1.0


def test_what_one_sender_can_send_over_grpc(write_page: Callable[..., Path]) -> None:
    rows, lags = [], {}
    for rate in (250, 500, 1000, 1500, 2000):
        with running("grpc") as port:
            due = poisson(rate, duration_s=10)
            loaded = open_loop("127.0.0.1", port, [BODY], due, senders=1, transport=GrpcTransport())
        lags[rate] = quantile_ms(loaded.lag_ns, 0.99)
        sent = len(loaded.due_ns) / (float(loaded.sent_ns.max()) / S)
        rows.append(
            [f"{rate:,}", f"{sent:,.0f}", f"{quantile_ms(loaded.lag_ns, 0.5):.3f} ms", f"{lags[rate]:.3f} ms",
             f"{quantile_ms(loaded.service_ns, 0.5):.3f} ms", f"{loaded.connections}"]
        )  # fmt: skip
        assert loaded.errors == {}
    write_page(
        "sender-grpc",
        title="What one sender can send over gRPC",
        says="One process offers Poisson arrivals to a server that answers at once with the 256 bytes it was sent, 10 "
        "s at each rate. The server is a process in Python on the other core, and as slow at gRPC as the sender. Lag: "
        "how much later than due requests left. Calls at once: on eight connections.",
        header=["offered /s", "sent /s", "lag p50", "lag p99", "service p50", "calls at once"],
        rows=rows,
    )
