"""The process in which LoadGen loads a service: `python -m dlops.bench.loadgen_url JOB`.

LoadGen issues queries from a thread of its own; another sends them over connections that are kept open.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from dlops.bench import pacing
from dlops.bench.channel import Channel, telling
from dlops.bench.load import failure_kind
from dlops.bench.loadgen import Call, Settings, completer
from dlops.bench.loadgen_child import drive_for
from dlops.bench.transport import Connection, Transport, TransportName, open_transport
from dlops.errors import UsageError
from dlops.manifest import Record

# A server that is gone refuses at once: not thousands of times a second.
_AFTER_FAILURE_S = 0.05


class UrlJob(Record):
    """Where the requests go, at most `connections` at once, and the test. request_bytes: of each, sent later.
    tensor_bytes: as `Transport.expecting` has it."""

    url: str
    transport: TransportName
    tensor_bytes: int | None
    host: str
    port: int
    connections: int
    timeout_s: float
    request_bytes: tuple[int, ...]
    settings: Settings


class Remote:
    """A service as LoadGen's system under test. requests: sent in turn, one for each batch of samples."""

    keeps_loadgen = False

    def __init__(self, transport: Transport, job: UrlJob, requests: Sequence[bytes]) -> None:
        self._transport, self._job, self._requests = transport, job, requests
        self.calls: list[Call] = []
        self._complete = completer()
        self._idle: list[Connection] = []
        self._open = 0
        self._waiting: deque[tuple[Call, list[Any], bytes]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def issue(self, samples: list[Any]) -> None:
        for first in range(0, len(samples), self._job.settings.batch):
            some = samples[first : first + self._job.settings.batch]
            request = self._requests[len(self.calls) % len(self._requests)]
            call = Call(begin_ns=-1, end_ns=-1, items=len(some))
            self.calls.append(call)
            self._loop.call_soon_threadsafe(self._take, call, some, request)

    def halt(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.failure is not None:
            raise self.failure

    def _take(self, call: Call, samples: list[Any], request: bytes) -> None:
        self._waiting.append((call, samples, request))
        if len(self._tasks) < self._job.connections:
            task = self._loop.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if (error := task.exception()) is not None:
            self.failure = error
        # One may have come while the last worker was ending.
        if self._waiting and len(self._tasks) < self._job.connections:
            self._take(*self._waiting.pop())

    async def _work(self) -> None:
        """Send what waits, one after the other, over one connection."""
        connection = self._idle.pop() if self._idle else None
        while self._waiting:
            call, samples, request = self._waiting.popleft()
            try:
                connection = await self._send(call, request, connection)
            finally:
                self._complete(samples)
        if connection is not None:
            self._idle.append(connection)

    async def _send(self, call: Call, request: bytes, connection: Connection | None) -> Connection | None:
        call.begin_ns = time.perf_counter_ns()
        try:
            if connection is None or not connection.is_open:
                if connection is not None:
                    await connection.aclose()
                async with asyncio.timeout(self._job.timeout_s):
                    connection = await self._transport.connect(self._job.host, self._job.port)
            answer = await connection.send(request, timeout_s=self._job.timeout_s)
        except (OSError, ValueError) as error:
            call.failed, call.end_ns = failure_kind(error), time.perf_counter_ns()
            await asyncio.sleep(_AFTER_FAILURE_S)
            return connection
        call.end_ns = answer.arrived_ns
        if answer.status != pacing.ANSWERED:
            call.failed = pacing.outcome_name(answer.status)
        return connection

    async def _end(self) -> None:
        for connection in self._idle:
            await connection.aclose()
        await self._transport.aclose()


def main(argument: str) -> None:
    # Ctrl-C is for the run that started this process, which then ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel.of_child()
    job = UrlJob.model_validate_json(argument)
    with telling(channel, job.url):
        message = channel.receive()
        if message is None:
            return
        body = memoryview(message[1])
        ends = [sum(job.request_bytes[: index + 1]) for index in range(len(job.request_bytes))]
        requests = [bytes(body[end - size : end]) for end, size in zip(ends, job.request_bytes, strict=True)]
        transport = open_transport(job.transport).expecting(job.tensor_bytes)
        drive_for(channel, Remote(transport, job, requests), job.settings)
        # Ctrl-C may come just now, and the run then still has something to say.
        channel.receive()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise UsageError("python -m dlops.bench.loadgen_url JOB")
    main(sys.argv[1])
