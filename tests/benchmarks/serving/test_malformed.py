"""100,000 malformed requests: no answer but declared ones, no restart, no growth."""

from __future__ import annotations

import select
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import grpc
import httpx
import psutil
from hypothesis import HealthCheck, Phase, given, settings

from dlops.artifact import Artifact
from dlops.serve.launch import ServerProcess
from tests.benchmarks.peers.environments import environment
from tests.serve import malformed_grpc
from tests.serve.malformed import ALLOWED, UNENDED, binary_requests, good, requests, status_of
from tests.serve.malformed_rows import RIGHT, Row, answers_of, fault_of, row

BEFORE, BEFORE_EACH, BEFORE_ROWS = 80_000, 2_000, 1_000
RAW, MESSAGES, ROWS, CALLS, SLOW, OF_THE_PAGE = 60_000, 30_000, 5_000, 20_000, 200, 150
GENERATED: dict[str, Any] = {
    "deadline": None, "database": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck),
}  # fmt: skip
THREADS = 8
WORKERS = 1


def test_a_hundred_thousand_malformed_requests(
    write_page: Callable[..., Path], digits_artifact: Artifact, tmp_path: Path
) -> None:
    counts: dict[str, Counter[str]] = {}
    lock = threading.Lock()
    bad: list[str] = []
    limits = {"DLOPS_MAX_BODY_BYTES": "200000", "DLOPS_RECEIVE_TIMEOUT_S": "2"}

    def send(port: int, kind: str, request: bytes) -> None:
        try:
            status = status_of(port, request, ends=kind in UNENDED)
        except TimeoutError:
            status = -1
        with lock:
            counts.setdefault(kind, Counter())[str(status)] += 1
            if status not in ALLOWED | {200, None}:
                bad.append(f"{kind}: {status} for {request[:200]!r}")

    def send_row(port: int, made: Row) -> None:
        try:
            answers = answers_of(port, made)
            fault = fault_of(made, answers)
        except (TimeoutError, ValueError) as error:
            answers, fault = [], str(error) or "no end"
        with lock:
            kinds = counts.setdefault("in a row on one connection", Counter())
            kinds.update(str(one.status) for one in answers)
            kinds["None"] += max(0, made.length - len(answers))
            if fault is not None:
                bad.append(f"a row: {fault}: {made.sent[:2000]!r}")

    with (
        ServerProcess(digits_artifact, grpc_port=0, env=limits) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
        ThreadPoolExecutor(THREADS) as threads,
    ):
        workers = psutil.Process(server.pid).children()

        def memory_mb() -> float:
            return sum(one.memory_info().rss for one in workers) / 1e6

        def send_messages(count: int) -> None:
            @settings(max_examples=count, **GENERATED)
            @given(request=binary_requests())
            def messages(request: bytes) -> None:
                send(server.port, "messages of the protocol (hypothesis)", request)

            messages()

        def send_rows(count: int, *, seed: int) -> int:
            draw = Random(seed)
            rows = [row(draw) for _ in range(count)]
            list(threads.map(lambda one: send_row(server.port, one), rows))
            return sum(one.sent.count(RIGHT) for one in rows)

        def send_calls(count: int) -> None:
            @settings(max_examples=count, **GENERATED)
            @given(call=malformed_grpc.calls())
            def calls(call: tuple[str, bytes]) -> None:
                status = malformed_grpc.status_of(channel, *call)
                counts.setdefault("calls of gRPC (hypothesis)", Counter())[status] += 1
                if status not in malformed_grpc.ALLOWED | {"OK"}:
                    bad.append(f"gRPC {call[0]}: {status} for {call[1][:200]!r}")

            calls()

        # What grows once: decoders of every format, and what each thread's part of malloc keeps for its next work, as
        # much as ever was in use there at a time. Of the largest images there are few.
        list(threads.map(lambda one: send(server.port, *one), islice(requests(seed=99), BEFORE)))
        send_messages(BEFORE_EACH)
        right = send_rows(BEFORE_ROWS, seed=99)
        send_calls(BEFORE_EACH)
        before = sum(sum(of.values()) for of in counts.values())
        memory = [memory_mb()]
        for part in range(6):
            each = islice(requests(seed=part), RAW // 6)
            list(threads.map(lambda one: send(server.port, *one), each))
            assert status_of(server.port, good()) == 200
            memory.append(memory_mb())

        send_messages(MESSAGES)
        memory.append(memory_mb())
        right += send_rows(ROWS, seed=0)
        assert status_of(server.port, good()) == 200
        memory.append(memory_mb())
        send_calls(CALLS)
        assert malformed_grpc.status_of(channel, "ModelInfer", malformed_grpc.good()) == "OK"
        memory.append(memory_mb())
        slow(server.port, counts.setdefault("slow senders", Counter()))
        found = of_the_page(server, tmp_path)
        counts["routes of the OpenAPI page (schemathesis)"] = Counter(found)
        memory.append(memory_mb())
        assert status_of(server.port, good()) == 200
        assert psutil.Process(server.pid).children() == workers
        log = server.log_path.read_text()
    total = sum(sum(of.values()) for of in counts.values())
    write_page(
        "serving-malformed",
        title="Malformed requests",
        says=f"{total:,} requests, all but {right:,} of them such as no client should send, to one worker with a "
        f"body limit of 200 kB, each on a connection of its own, but those of gRPC on one and the rows: each "
        f"two to twelve at once, right and wrong ones, of which all right ones before the first wrong one were "
        f"answered, in order. None stands for a request without an answer: its connection had ended, or it was cut "
        f"off. Answers were "
        f"{', '.join(sorted({status for of in counts.values() for status in of}))}; the worker was never restarted, "
        f"and had {', '.join(f'{one:.0f}' for one in memory)} MB after the first {before:,} of all kinds, after "
        f"each sixth of {RAW:,} more, and after each of the rest.",
        header=["kind", "requests", "answers"],
        rows=[
            [kind, f"{sum(of.values()):,}", ", ".join(f"{count:,} × {status}" for status, count in sorted(of.items()))]
            for kind, of in counts.items()
        ],
    )
    assert not bad, bad[:5]
    assert "a bug in dlops" not in log
    assert "Traceback" not in log
    # What is freed goes back to the system late and in parts: what grows is where it ends, not how high it was.
    alike = memory[:7]
    assert max(alike[4:]) <= 1.1 * max(alike[:4]) + 20
    assert memory[-1] <= 1.1 * max(alike) + 20
    assert total - right >= 100_000


def slow(port: int, counts: Counter[str]) -> None:
    """A byte now and then, from many at once; good ones are answered meanwhile."""
    clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(SLOW)]
    request = good()
    for place in range(8):
        for client in clients:
            try:
                if not select.select([client], [], [], 0)[0]:  # else it has been answered
                    client.sendall(request[place : place + 1])
            except ConnectionError:
                continue
        began = time.perf_counter()
        assert status_of(port, good()) == 200
        assert time.perf_counter() - began < 5
        time.sleep(0.5)
    for client in clients:
        try:
            answer = client.recv(100)
        except ConnectionError:
            answer = b""
        client.close()
        counts[answer.split(b" ")[1].decode() if answer else "None"] += 1
    assert set(counts) <= {"408", "None"}


def of_the_page(server: ServerProcess, folder: Path) -> dict[str, int]:
    """What schemathesis makes of our OpenAPI document; raises AssertionError where it finds an undeclared answer."""
    home = environment("schemathesis")
    before = answers(server)
    ran = subprocess.run(
        [
            str(home / "bin" / "schemathesis"), "run", f"{server.url}/docs.json", "--max-examples", str(OF_THE_PAGE),
            "--checks", "not_a_server_error,response_schema_conformance,content_type_conformance", "--seed", "0",
            "--phases", "examples,coverage,fuzzing", "--no-color",
            # Which answer 501 here, as the document says.
            "--exclude-path-regex", "^/v2/repository/models/",
        ],
        cwd=folder, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    counted = {status: count - before.get(status, 0) for status, count in answers(server).items()}
    return {status: count for status, count in counted.items() if count}


def answers(server: ServerProcess) -> dict[str, int]:
    """By status, as the server counts them."""
    counts: Counter[str] = Counter()
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("dlops_requests_total{"):
            counts[line.partition('status="')[2].partition('"')[0]] += int(float(line.rpartition(" ")[2]))
    return dict(counts)
