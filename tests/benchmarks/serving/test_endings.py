"""10,000 requests each while a server is told to end, loses a worker, and swaps a version."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from dlops.bench.http import Connection
from dlops.bench.oip_rest import RestClient
from dlops.serve.launch import ServerProcess
from tests.benchmarks.peers.mlp import NAME, make_artifact

REQUESTS = 10_000
CONNECTIONS = 16
WORKERS = 2
HOST = "127.0.0.1"
# In which any answer or error must have come: nothing hangs.
WITHIN_S = 10.0
# Enough for most of the requests to come after SIGTERM, each on a connection of its own.
DELAY_S = 15.0


@dataclass
class Told:
    """What became of the requests. closed: told by the answer before that the connection ends."""

    answered: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    lost_at: list[float] = field(default_factory=list)
    hung: int = 0
    refused: int = 0
    slowest_s: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.answered.values()) + len(self.lost) + self.hung


async def ask(server: ServerProcess, request: bytes, told: Told, *, go_on: Callable[[], bool]) -> None:
    """One request after the other's answer, on a connection for as long as the server keeps it.

    Once there were enough it opens no other one on a server that is not ready, as a load balancer does; until then it
    has not noticed yet.
    """
    connection: Connection | None = None
    try:
        while go_on():
            if connection is None or not connection.is_open:
                try:
                    if told.count >= REQUESTS and not await is_ready(server):
                        return
                    connection = await Connection.open(HOST, server.port)
                except OSError:
                    told.refused += 1
                    await asyncio.sleep(0.02)
                    continue
            began = time.perf_counter()
            try:
                answer = await connection.send(request, timeout_s=WITHIN_S)
            except TimeoutError:
                told.hung += 1
            except (OSError, ValueError) as error:
                told.lost.append(repr(error))
                told.lost_at.append(time.perf_counter())
            else:
                told.answered[answer.status] += 1
                told.slowest_s = max(told.slowest_s, time.perf_counter() - began)
                continue
            connection = None
    finally:
        if connection is not None:
            connection.close()


async def is_ready(server: ServerProcess) -> bool:
    asking = await Connection.open(HOST, server.port)
    try:
        answer = await asking.send(b"GET /v2/health/ready HTTP/1.1\r\nHost: h\r\n\r\n", timeout_s=WITHIN_S)
    finally:
        asking.close()
    return answer.status == 200


def driven(server: ServerProcess, artifact_input, happens: Callable[[Told], Coroutine[Any, Any, None]]) -> Told:
    client = RestClient(base=server.url, path=f"/v2/models/{NAME}")
    request = client.encode({"x": artifact_input})
    told = Told()

    async def scenario() -> None:
        done = asyncio.Event()

        def go_on() -> bool:
            return not (done.is_set() and told.count >= REQUESTS)

        clients = [asyncio.ensure_future(ask(server, request, told, go_on=go_on)) for _ in range(CONNECTIONS)]
        while told.count < REQUESTS // 3:
            await asyncio.sleep(0.01)
        await happens(told)
        done.set()
        await asyncio.gather(*clients)

    asyncio.run(scenario())
    return told


def test_what_is_asked_while_servers_end_fail_and_change_is_answered(
    write_page: Callable[..., Path], tmp_path: Path
) -> None:
    made = make_artifact(tmp_path / "mlp")
    x = made.samples().inputs["x"][:1]
    shutil.copytree(made.directory, tmp_path / "models" / NAME / "1")
    rows: list[list[str]] = []

    def add(what: str, told: Told) -> None:
        statuses = ", ".join(f"{count} × {status}" for status, count in sorted(told.answered.items()))
        rows.append([what, statuses, str(len(told.lost)), str(told.hung), f"{told.slowest_s * 1000:.0f} ms"])

    swaps = {"DLOPS_MODEL_CONTROL": "explicit", "DLOPS_DRAIN_DELAY_S": f"{DELAY_S:g}"}
    with ServerProcess(tmp_path / "models", workers=WORKERS, threads=1, env=swaps) as server:

        async def swap(told: Told) -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                for version in ("2", "3"):
                    shutil.copytree(made.directory, tmp_path / "models" / NAME / version)
                    response = await client.post(f"/v2/repository/models/{NAME}/load")
                    assert response.status_code == 200, response.text
                    assert (await client.get(f"/v2/models/{NAME}")).json()["versions"] == [version]

        swapped = driven(server, x, swap)
        add("a version takes the place of another, twice", swapped)

        async def kill(told: Told) -> None:
            # The one that answers most of them: which worker takes a connection is the kernel's affair.
            busiest = max(psutil.Process(server.pid).children(), key=lambda one: len(one.net_connections()))
            os.kill(busiest.pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                while len([one for one in psutil.Process(server.pid).children() if one.status() != "zombie"]) < WORKERS:
                    await asyncio.sleep(0.05)

        began = time.perf_counter()
        killed = driven(server, x, kill)
        add("`kill -9` of one of two workers", killed)
        spread_s = max(killed.lost_at, default=began) - min(killed.lost_at, default=began)

        before: list[int] = []

        async def end(told: Told) -> None:
            os.kill(server.pid, signal.SIGTERM)
            before.append(told.count)

        ended = driven(server, x, end)
        add(f"SIGTERM, with a drain delay of {DELAY_S:g} s; {ended.count - before[0]} of them after it", ended)
    write_page(
        "serving-endings",
        title="Requests while a server ends, fails and changes",
        says=f"{CONNECTIONS} connections in a closed loop over {WORKERS} workers, binary tensors, at least "
        f"{REQUESTS:,} requests in each row. After SIGTERM each answer ends its connection; the clients open others "
        f"until there were as many, and then go on until they have seen that the server is not ready. Lost: the "
        f"connection ended without an answer. Hung: nothing within {WITHIN_S:g} s.",
        header=["while", "answered", "lost", "hung", "slowest"],
        rows=rows,
    )
    assert (swapped.lost, swapped.hung, set(swapped.answered)) == ([], 0, {200})
    # In flight in the killed worker: at most one a connection, all at the same moment.
    assert len(killed.lost) <= CONNECTIONS
    assert (killed.hung, set(killed.answered)) == (0, {200})
    assert spread_s < 1.0
    assert (ended.lost, ended.hung, ended.refused, set(ended.answered)) == ([], 0, 0, {200})
    assert ended.count >= REQUESTS
