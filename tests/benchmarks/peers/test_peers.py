"""Our service beside its peers: the same ONNX model, the same load, in turns within one run.

DLOPS_PEERS_ONLY=dlops,tritonserver takes some of the servers, DLOPS_PEERS_QUICK=1 few short rounds; both print the
table and leave the page alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlops.bench.cputime import Trees, ticks_a_second
from dlops.bench.stats import ratio_interval
from dlops.report import Interval

from .environments import UnavailableError
from .mlp import make_artifact
from .running import STARTS, Server, awake, check_answers

CONNECTIONS = (8, 64)
ONLY = [name for name in os.environ.get("DLOPS_PEERS_ONLY", "").split(",") if name]
QUICK = bool(os.environ.get("DLOPS_PEERS_QUICK"))
ROUNDS, SECONDS, WARMUP_S = (6, 1.5, 0.5) if QUICK else (10, 3.0, 1.0)
FIRST_S = 1.0
# What is wanted of ours, as a factor on the other's requests a second, and what is too little.
WANTED = {"tritonserver": (1.0, 0.9), "bentoml": (8.0, 8.0)}
SAYS = """One model, 784 → 128 → 10 in float32, served by each as one ONNX file through ONNX Runtime with one thread. \
All servers run on this machine from begin to end; in {rounds} rounds each has its turns, {seconds:g} s after a \
warm-up with 8 connections and with 64, in an order drawn at random, and the others are idle. A connection sends its \
next request when the last one is answered (closed loop), over the loopback, from one process in Python which shares \
the cores with the server: an empty answer shows what that process and a server that computes nothing reach. Requests \
are made beforehand, 32 different ones, and every server answered all of them as ONNX Runtime in the test's own \
process does. Each figure is the median of the rounds'. Ours: dlops over this server, the median of the rounds' \
ratios with its 95 % interval. CPU a request: of the server with all its processes. Load average when it began, other \
programs' work: {load:.1f}.

What was wanted, and what came out:

{targets}

The servers, each in an environment of its own with the versions that `tests/benchmarks/peers/requirements` pins; the \
code is beside that, a file each:

- dlops: `dlops serve` with `--threads 1`, tensors in the Open Inference Protocol's binary form.
- tritonserver: 2.51, from nvidia-pytriton 0.7.0, python backend, dynamic batching of up to 64 without delay, the \
same binary requests. Its own ONNX backend is not in that package. One instance of the model and two.
- BentoML: what `pip install bentoml` brings (so neither uvloop nor httptools), an API that is `batchable` and takes \
`np.ndarray`, all defaults, its log of requests too.
- LitServe: JSON, batches of up to 64 of what comes within 1 ms, no log of requests. It looks for requests all the \
time, so it is stopped (SIGSTOP) while it is others' turn.
- FastAPI: JSON checked by pydantic, under uvicorn with uvloop and httptools, one process, no batches, no log.
- MLServer: a runtime of one's own, JSON in the Open Inference Protocol's form (its HTTP side knows no binary one), \
in one process (`parallel_workers` 0, which is faster here), no batches, no debug log.

JSON requests hold the same numbers in as few digits as say a float32: 9 kB, where the binary ones have 3 \
kB.{missing}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float | None


Turns = dict[tuple[str, int], list[Turn]]


@contextmanager
def sender() -> Iterator[Callable[..., dict[str, Any]]]:
    """Gives an order to the process that makes the load and waits for what it found."""
    command = [sys.executable, str(Path(__file__).with_name("sender.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def give(server: Server, **order: float) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            order |= {"port": server.port, "requests": [one.decode("latin-1") for one in server.requests]}
            print(json.dumps(order), file=process.stdin, flush=True)
            found: dict[str, Any] = json.loads(process.stdout.readline())
            assert not found["errors"], f"{server.name}: {found}"
            return found

        try:
            yield give
        finally:
            process.stdin.close()
            process.wait()


def take_turn(give: Callable[..., dict[str, Any]], server: Server, connections: int, seconds: float) -> Turn:
    with awake(server):
        watched = None if server.pid is None else Trees([server.pid])
        found = give(server, connections=connections, seconds=seconds, warmup_s=WARMUP_S)
    used = None if watched is None else watched.used() / ticks_a_second() / found["answered"] * 1e6
    return Turn(rate=found["rate"], p50_ms=found["p50_ms"], p99_ms=found["p99_ms"], cpu_us=used)


def compare(servers: Sequence[Server]) -> Turns:
    """All servers live throughout; those whose turn it is not are idle."""
    turns: Turns = {(server.name, connections): [] for server in servers for connections in CONNECTIONS}
    order = random.Random(0)
    with sender() as give:
        for server in servers:
            for connections in CONNECTIONS:
                take_turn(give, server, connections, FIRST_S)
        for number in range(ROUNDS):
            for connections in order.sample(CONNECTIONS, len(CONNECTIONS)):
                for server in order.sample(servers, len(servers)):
                    turns[server.name, connections].append(take_turn(give, server, connections, SECONDS))
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
    return turns


def ratio(turns: Turns, ours: str, theirs: str, connections: int, of: Callable[[Turn], float]) -> Interval:
    """Ours over theirs: the median of the rounds' ratios with its order-statistic interval."""
    found = ratio_interval(*([np.array([of(turn)]) for turn in turns[name, connections]] for name in (ours, theirs)))
    assert found is not None, "six rounds have an interval"
    return found


def median(turns: Turns, name: str, connections: int, of: Callable[[Turn], float]) -> float:
    return float(np.median([of(turn) for turn in turns[name, connections]]))


def rate(turn: Turn) -> float:
    return turn.rate


def p99(turn: Turn) -> float:
    return turn.p99_ms


def written(found: Interval) -> str:
    assert found.low is not None
    assert found.high is not None
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def table(turns: Turns, servers: Sequence[Server], ours: str | None) -> list[list[str]]:
    """The fastest first, at each number of connections."""
    rows = []
    for connections in CONNECTIONS:
        for server in sorted(servers, key=lambda server: -median(turns, server.name, connections, rate)):
            own = turns[server.name, connections]
            compared = ours is not None and server.name != ours and server.decode is not None
            rows.append(
                [str(connections), server.name, server.form, f"{median(turns, server.name, connections, rate):,.0f}",
                 f"{np.median([turn.p50_ms for turn in own]):.2f} ms",
                 f"{median(turns, server.name, connections, p99):.2f} ms",
                 *(written(ratio(turns, ours, server.name, connections, of)) if compared and ours else "–"
                   for of in (rate, p99)),
                 "–" if server.pid is None else f"{np.median([turn.cpu_us or 0 for turn in own]):,.0f} µs"]
            )  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """says: the target, what was found, and whether that is it. done: or near enough."""

    says: str
    done: bool


def verdicts(turns: Turns, by_kind: Mapping[str, Sequence[Server]]) -> Iterator[Verdict]:
    """Of tritonserver the number of instances that is the faster one counts."""
    if "dlops" not in by_kind:
        return
    ours = by_kind["dlops"][0].name
    for connections in CONNECTIONS:
        for kind, (wanted, least) in WANTED.items():
            if kind not in by_kind:
                continue
            theirs = max(
                (server.name for server in by_kind[kind]), key=lambda name: median(turns, name, connections, rate)
            )
            found = ratio(turns, ours, theirs, connections, rate)
            yield Verdict(
                says=f"{connections} connections: requests/s at least {wanted:g} × {theirs}: {written(found)}, "
                f"{'yes' if found.value >= wanted else 'no'}",
                done=found.value >= least,
            )
            if kind == "tritonserver":
                found = ratio(turns, ours, theirs, connections, p99)
                met = found.value <= 1
                yield Verdict(
                    says=f"{connections} connections: p99 at most that of {theirs}: {written(found)} × that, "
                    f"{'yes' if met else 'no'}",
                    done=met,
                )


def test_our_service_beside_its_peers(write_page: Callable[..., Path], tmp_path: Path) -> None:
    chosen = ONLY or list(STARTS)
    assert set(chosen) <= set(STARTS), f"DLOPS_PEERS_ONLY: of {', '.join(STARTS)}"
    artifact = make_artifact(tmp_path)
    load = os.getloadavg()[0]
    left_out, by_kind = [], {}
    with ExitStack() as stack:
        for kind in chosen:
            folder = tmp_path / kind
            folder.mkdir()
            try:
                by_kind[kind] = stack.enter_context(STARTS[kind](artifact, folder))
            except UnavailableError as error:
                left_out.append(f"{kind}: {error}")
                print(f"left out, {left_out[-1]}", file=sys.stderr, flush=True)
                continue
            for server in by_kind[kind]:
                check_answers(server, artifact)
        servers = [server for some in by_kind.values() for server in some]
        turns = compare(servers)
    header = [
        "connections", "server", "tensors", "requests/s", "p50", "p99", "ours: requests/s", "ours: p99",
        "CPU a request",
    ]  # fmt: skip
    rows = table(turns, servers, by_kind["dlops"][0].name if "dlops" in by_kind else None)
    found = list(verdicts(turns, by_kind))
    for line in [*(" | ".join(row) for row in [header, *rows]), *(verdict.says for verdict in found)]:
        print(line)
    if ONLY or QUICK:
        return
    targets = "\n".join(f"- {verdict.says}" for verdict in found)
    missing = "".join(f" Left out: {why.splitlines()[0]}." for why in left_out)
    write_page(
        "peers",
        title="Our service beside its peers",
        says=SAYS.format(rounds=ROUNDS, seconds=SECONDS, load=load, targets=targets, missing=missing),
        header=header,
        rows=rows,
    )
    assert all(verdict.done for verdict in found), targets
