"""A process that sends prepared requests on a schedule: `python -m dlops.bench.sender`.

`dlops.bench.openloop` starts it. It reads one line of JSON and the bytes that it announces, connects, prints `ready`,
is told when the schedule begins, and prints what became of each request. All clocks are perf_counter_ns, which the
processes of one machine share.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import selectors
import signal
import sys
import time
from typing import BinaryIO

import numpy as np

from dlops.bench import pacing
from dlops.bench.kernel import NO_MORE_FILES, open_more_files, wake_on_time
from dlops.bench.pacing import Pacer
from dlops.bench.transport import Transport, Wire, open_transport

# select(2) takes no descriptor above 1023.
MAX_CONNECTIONS = 900
_FIRST_CONNECTIONS = 8
_SWEEP_S = 0.02
# A server is gone where requests fail over this long and none succeeds in between.
_DEAD_AFTER_NS = 2_000_000_000
STOP, ABANDON = b"stop\n", b"abandon\n"


class Sender:
    """Keeps a schedule, over so many connections at most. start_ns: when it begins, on perf_counter_ns; set before
    `run`."""

    def __init__(
        self, transport: Transport, host: str, port: int, requests: list[bytes], due_ns: list[int], *,
        timeout_s: float, connections: int = MAX_CONNECTIONS,
    ) -> None:  # fmt: skip
        self._transport, self._host, self._port, self._requests = transport, host, port, requests
        self._timeout_s, self._connections = timeout_s, connections
        self.pacer = Pacer(due_ns)
        self._wires: dict[int, Wire] = {}
        self._numbers = 0
        self._opening = 0
        self._start_ns = 0
        # The first and the last failure since anything succeeded, None where that was the last thing that happened.
        self._failing_ns: tuple[int, int] | None = None
        self.most_connections = 0
        self.stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._done = asyncio.Event()
        # The loop holds its tasks weakly.
        self._tasks: set[asyncio.Future[None]] = set()

    async def connect(self) -> None:
        """The first connections, made before the schedule begins; more are made when they are needed."""
        first = min(_FIRST_CONNECTIONS, self._connections)
        self._opening += first
        await asyncio.gather(*(self._open() for _ in range(first)))

    async def run(self, start_ns: int) -> None:
        """Until everything is answered, has failed or `stop` was called."""
        self._start_ns = start_ns
        self._pump()
        while not self.pacer.is_done:
            try:
                await asyncio.wait_for(self._done.wait(), _SWEEP_S)
            except TimeoutError:
                self._sweep()
        for wire in list(self._wires.values()):
            wire.abort()
        await self._transport.aclose()

    def stop(self) -> None:
        """Send no more; what is in flight is waited for."""
        self.pacer.give_up()
        self._after_one()

    def abandon(self) -> None:
        """Wait for nothing more."""
        self.pacer.abandon()
        self._after_one()

    def answered(self, wire: Wire, arrived_ns: int, status: int, *, keep: bool) -> None:
        if not self.pacer.is_asked(wire.number):
            # A server that closes an idle connection may say so, as with HTTP's status 408.
            self.pacer.failed(wire.number, pacing.LOST)
            self._drop(wire)
            return
        self.pacer.answered(wire.number, arrived_ns - self._start_ns, status)
        if status == pacing.ANSWERED:
            self._failing_ns = None
        else:
            self._note_failure()
        if keep:
            self.pacer.add(wire.number)
        else:
            self._drop(wire)
        self._after_one()

    def lost(self, wire: Wire, outcome: int) -> None:
        if wire.number in self._wires:
            self._note_failure()
            self.pacer.failed(wire.number, outcome)
            self._drop(wire)
            self._after_one()

    def _after_one(self) -> None:
        if self.pacer.is_done:
            self._done.set()
        elif self._start_ns:
            self._pump()

    def _pump(self) -> None:
        """Send what is due, open connections where they are short, and come back when the next request is due."""
        now = time.perf_counter_ns() - self._start_ns
        while (taken := self.pacer.take(now)) is not None:
            connection, request = taken
            self._wires[connection].send(self._requests[request % len(self._requests)])
            now = time.perf_counter_ns() - self._start_ns
        room = self._connections - len(self._wires) - self._opening
        short = self.pacer.waiting(now, at_most=self._opening + room) - self._opening
        for _ in range(short):
            self._opening += 1
            opening = asyncio.ensure_future(self._open())
            self._tasks.add(opening)
            opening.add_done_callback(self._tasks.discard)
        due = self.pacer.next_due_ns
        if due is not None and due > now and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later((due - now) / 1e9, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._pump()

    async def _open(self) -> None:
        self._numbers += 1
        number = self._numbers
        try:
            async with asyncio.timeout(self._timeout_s):
                wire = await self._transport.open_wire(
                    self._host, self._port, number=number, listener=self, timeout_s=self._timeout_s
                )
        except OSError as error:
            self._note_failure()
            if self._start_ns:
                self.pacer.refused(time.perf_counter_ns() - self._start_ns, _why_not_open(error))
        else:
            self._wires[number] = wire
            self.most_connections = max(self.most_connections, len(self._wires))
            self.pacer.add(number)
        finally:
            self._opening -= 1
        self._after_one()

    def _drop(self, wire: Wire) -> None:
        self._wires.pop(wire.number, None)
        wire.abort()

    def _sweep(self) -> None:
        now = time.perf_counter_ns()
        for number in self.pacer.overdue(now - self._start_ns - round(self._timeout_s * 1e9)):
            wire = self._wires[number]
            self.lost(wire, wire.timed_out)
        first, last = self._failing_ns or (0, 0)
        if last - first > _DEAD_AFTER_NS and not self.stopped:
            self.stopped = True
            self.pacer.give_up()

    def _note_failure(self) -> None:
        now = time.perf_counter_ns()
        self._failing_ns = (now if self._failing_ns is None else self._failing_ns[0], now)


def _why_not_open(error: OSError) -> int:
    if isinstance(error, ConnectionRefusedError):
        return pacing.REFUSED
    if error.errno in NO_MORE_FILES:
        return pacing.NO_FILES
    return pacing.TIMED_OUT if isinstance(error, TimeoutError) else pacing.LOST


def main() -> None:
    """Read the task from stdin, keep the schedule, write the outcome to stdout."""
    # Ctrl-C reaches the whole group of the terminal: whoever started this process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake_on_time()
    open_more_files()
    task = json.loads(sys.stdin.buffer.readline())
    due_ns = np.frombuffer(_exactly(sys.stdin.buffer, task["due_bytes"]), np.int64)
    requests = [_exactly(sys.stdin.buffer, size) for size in task["request_bytes"]]
    # epoll's timeouts are whole milliseconds; select's are microseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    asyncio.set_event_loop(loop)
    sender = loop.run_until_complete(_keep(task, requests, due_ns.tolist()))
    pacer = sender.pacer
    head = {"stopped": sender.stopped, "connections": sender.most_connections}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n")
    for values in (pacer.sent_ns, pacer.arrived_ns, pacer.outcome):
        sys.stdout.buffer.write(np.array(values, np.int64).tobytes())
    sys.stdout.buffer.flush()


async def _keep(task: dict[str, object], requests: list[bytes], due_ns: list[int]) -> Sender:
    expected = None if task["tensor_bytes"] is None else int(str(task["tensor_bytes"]))
    transport = open_transport("gRPC" if task["transport"] == "gRPC" else "HTTP").expecting(expected)
    host, port, timeout_s = str(task["host"]), int(str(task["port"])), float(str(task["timeout_s"]))
    connections = int(str(task["connections"]))
    sender = Sender(transport, host, port, requests, due_ns, timeout_s=timeout_s, connections=connections)
    await sender.connect()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    line = _line(sys.stdin.fileno())
    if not line:
        sender.stop()
        return sender
    # The first that comes on stdin after the start, its end included, means: send no more; the second: do not wait.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _on_stdin, sender)
    gc.collect()
    gc.disable()
    await sender.run(int(line))
    return sender


def _on_stdin(sender: Sender) -> None:
    word = _line(sys.stdin.fileno())
    if not word:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    if word == ABANDON:
        sender.abandon()
    else:
        sender.stop()


def _line(descriptor: int) -> bytes:
    """The next line, without a buffer that would keep the one after it from `select`; empty at the end."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(descriptor, 1)):
        line += byte
    return line


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"{size} bytes announced, {len(data)} came")
    return data


if __name__ == "__main__":
    main()
