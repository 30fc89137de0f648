"""Requests at a rate, whether or not earlier ones are answered: response time from the schedule, service time from the
send.

A closed loop waits for an answer before it sends the next request, so a server that stands still is asked nothing
meanwhile, and its stall is one slow call among thousands. Here requests stay due, and each is late by its own clock.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlops import signals
from dlops.bench import pacing
from dlops.bench.http import HttpTransport
from dlops.bench.load import TIMEOUT_S
from dlops.bench.sender import ABANDON, MAX_CONNECTIONS, STOP
from dlops.bench.transport import Transport
from dlops.console import progress_bar, say
from dlops.errors import MachineError

Integers = NDArray[np.int64]

_MAX_SENDERS = 8
# Senders have this long to see the start line before the schedule begins.
_START_NS = 50_000_000
# After Ctrl-C, how long answers may take to come before that is said.
_SOON_NS = 500_000_000
_STARTING_S = 30.0
_STEPS = 100
# Connections that broke at the end: from so many on, and from that share of all, nobody was there.
_MANY_LOST, _LOST_SHARE = 10, 0.02


def senders_for(rate: float, rate_a_sender: float = HttpTransport.rate_a_sender) -> int:
    """One process for every `rate_a_sender` requests a second, at most eight."""
    return min(_MAX_SENDERS, max(1, math.ceil(rate / rate_a_sender)))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoaded:
    """Every request of a schedule, in the order they came due; times in nanoseconds from its start.

    due_ns, sent_ns, arrived_ns, outcome: (n,). sent_ns and arrived_ns are -1 where it was not; outcome is as
    `pacing` has it. timeout_s: how long a request was waited for. stopped: why it ended early. began_ns: that start, on
    the system's clock.
    """

    due_ns: Integers
    sent_ns: Integers
    arrived_ns: Integers
    outcome: Integers
    timeout_s: float
    connections: int
    stopped: str | None
    interrupted: bool
    began_ns: int = 0

    @property
    def succeeded(self) -> NDArray[np.bool_]:
        return np.asarray(self.outcome == pacing.ANSWERED, np.bool_)

    @property
    def response_ns(self) -> Integers:
        """(n,): from when a request was due to its answer; one that failed counts as the worst: the time-out, or the
        slowest answer where that took longer."""
        times = self.arrived_ns - self.due_ns
        good = self.succeeded
        worst = max(round(self.timeout_s * 1e9), int(times[good].max(initial=0)))
        return np.where(good, times, worst)

    @property
    def service_ns(self) -> Integers:
        """(successes,): from the send of a request to its answer, what a closed loop would have called its latency."""
        good = self.succeeded
        return np.asarray(self.arrived_ns[good] - self.sent_ns[good], np.int64)

    @property
    def lag_ns(self) -> Integers:
        """(sent,): how much later than due each request left: our own fault, or that no connection was free."""
        sent = self.sent_ns >= 0
        return np.asarray(self.sent_ns[sent] - self.due_ns[sent], np.int64)

    @property
    def errors(self) -> dict[str, int]:
        """Failed requests by kind."""
        failed = Counter(self.outcome[~self.succeeded].tolist())
        return {pacing.outcome_name(code): count for code, count in failed.most_common()}

    @property
    def ends_without_server(self) -> bool:
        """Whether from some request on all were lost or refused: one of them refused, which a server that is only too
        slow does not do, or so many lost that it is no one connection that broke."""
        there = np.flatnonzero(~np.isin(self.outcome, (pacing.REFUSED, pacing.LOST, pacing.NOT_SENT)))
        tail = self.outcome[there[-1] + 1 :] if len(there) else self.outcome
        return bool((tail == pacing.REFUSED).any()) or len(tail) >= max(_MANY_LOST, _LOST_SHARE * len(self.outcome))

    def between(self, begin_ns: int, end_ns: int) -> OpenLoaded:
        """The requests that came due in [begin, end), their times counted from the begin."""
        kept = (self.due_ns >= begin_ns) & (self.due_ns < end_ns)

        def moved(times: Integers) -> Integers:
            return np.where(times[kept] >= 0, times[kept] - begin_ns, -1)

        return OpenLoaded(
            due_ns=self.due_ns[kept] - begin_ns,
            sent_ns=moved(self.sent_ns),
            arrived_ns=moved(self.arrived_ns),
            outcome=self.outcome[kept],
            timeout_s=self.timeout_s,
            connections=self.connections,
            stopped=self.stopped,
            interrupted=self.interrupted,
            began_ns=self.began_ns + begin_ns,
        )


def open_loop(
    host: str,
    port: int,
    requests: Sequence[bytes],
    due_ns: Integers,
    *,
    senders: int | None = None,
    timeout_s: float = TIMEOUT_S,
    title: str = "",
    transport: Transport | None = None,
    connections: int = MAX_CONNECTIONS,
) -> OpenLoaded:
    """Send `requests` in turn as `due_ns` says, from `senders` processes, and wait for all answers.

    requests: whole, as `transport` sends them; HTTP where it is None. due_ns: (n,), ascending, from the start. senders:
    as many as the rate needs where it is None. title: of the progress bar. connections: the most that each sender has;
    what is due while none is free waits, which is in its response time and not in its service time.

    Any status but success, a broken connection and a time-out are failures; nothing is repeated. Where the server is
    gone for two seconds the rest is not sent. Ctrl-C ends it and keeps what was done, once what is in flight is
    answered or Ctrl-C comes again. Raises MachineError where a sender does not start or ends before its time.
    """
    transport = transport or HttpTransport()
    count = senders or _senders_for(due_ns, transport.rate_a_sender)
    where: dict[str, object] = {
        "transport": transport.name,
        "tensor_bytes": transport.tensor_bytes,
        "host": host,
        "port": port,
        "timeout_s": timeout_s,
        "connections": connections,
    }
    shares = [np.arange(first, len(due_ns), count) for first in range(count)]
    interrupted = False
    with _started(where, requests, [due_ns[share] for share in shares]) as processes:
        start_ns = time.perf_counter_ns() + _START_NS
        for one in processes:
            one.begin(start_ns)
        try:
            _watch(processes, int(due_ns[-1]), start_ns, title)
        except KeyboardInterrupt:
            interrupted = True
            _wind_up(processes, timeout_s)
        outcomes = [one.outcome(timeout_s) for one in processes]
    sent, arrived, outcome = (np.empty(len(due_ns), np.int64) for _ in range(3))
    for share, kept in zip(shares, outcomes, strict=True):
        sent[share], arrived[share], outcome[share] = kept.arrays
    gone = any(kept.stopped for kept in outcomes)
    return OpenLoaded(
        due_ns=due_ns,
        sent_ns=sent,
        arrived_ns=arrived,
        outcome=outcome,
        timeout_s=timeout_s,
        connections=sum(kept.connections for kept in outcomes),
        stopped=pacing.GONE if gone else None,
        interrupted=interrupted,
        began_ns=start_ns,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    arrays: list[Integers]
    stopped: bool
    connections: int


class _Process:
    """A running `dlops.bench.sender`."""

    def __init__(self, where: dict[str, object], requests: Sequence[bytes], due_ns: Integers) -> None:
        self._count = len(due_ns)
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "dlops.bench.sender"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            # A signal for the whole group, as a service manager sends it, is for the run, which then asks for what
            # there is.
            start_new_session=True,
        )  # fmt: skip
        self._answer = b""
        # It reads while this process waits: what a sender has to say is more than a pipe holds.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._ready = threading.Event()
        self._reader.start()
        task = where | {"due_bytes": due_ns.nbytes, "request_bytes": [len(request) for request in requests]}
        self._say(json.dumps(task).encode() + b"\n" + due_ns.tobytes() + b"".join(requests))

    def wait_until_ready(self) -> None:
        if not self._ready.wait(_STARTING_S) or self._popen.poll() is not None:
            raise MachineError("a sender process did not start", hint="its log is above")

    def begin(self, start_ns: int) -> None:
        self._say(b"%d\n" % start_ns)

    def stop(self) -> None:
        self._say(STOP)

    def abandon(self) -> None:
        self._say(ABANDON)

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def outcome(self, timeout_s: float) -> _Outcome:
        """What it printed at its end. Raises MachineError where that is not whole."""
        self._reader.join(timeout_s + _STARTING_S)
        head, _, rest = self._answer.partition(b"\n")
        if self._popen.poll() is None or self._popen.returncode or len(rest) != 3 * 8 * self._count:
            raise MachineError(
                "a sender process ended before its time", hint="its log is above; the machine may be out of memory"
            )
        said = json.loads(head)
        return _Outcome(
            arrays=list(np.frombuffer(rest, np.int64).reshape(3, self._count)),
            stopped=bool(said["stopped"]),
            connections=int(said["connections"]),
        )

    def end(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait()
        self._reader.join()
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:  # it ended with something unread: nothing is left to say to it
                    continue

    def _say(self, data: bytes) -> None:
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(data)
            self._popen.stdin.flush()
        except BrokenPipeError:  # it has ended: `outcome` says so
            return

    def _read(self) -> None:
        assert self._popen.stdout is not None
        self._popen.stdout.readline()
        self._ready.set()
        self._answer = self._popen.stdout.read()
        self._popen.wait()


@contextmanager
def _started(
    where: dict[str, object], requests: Sequence[bytes], shares: Sequence[Integers]
) -> Iterator[list[_Process]]:
    processes: list[_Process] = []
    try:
        for share in shares:
            processes.append(_Process(where, requests, share))
        for one in processes:
            one.wait_until_ready()
        yield processes
    finally:
        for one in processes:
            one.end()


def _watch(processes: Sequence[_Process], last_due_ns: int, start_ns: int, title: str) -> None:
    """Wait until all have ended, with progress along the schedule."""
    with progress_bar(title or "requests on schedule", total=_STEPS) as bar:
        done = 0
        while any(one.is_running for one in processes):
            time.sleep(0.05)
            share = (time.perf_counter_ns() - start_ns) / max(1, last_due_ns)
            steps = min(_STEPS, max(0, round(share * _STEPS))) - done
            done += steps
            bar.advance(steps)


def _wind_up(processes: Sequence[_Process], timeout_s: float) -> None:
    """After Ctrl-C: send no more, and wait for what is in flight until it is there or Ctrl-C comes again."""
    try:
        for one in processes:
            one.stop()
        asked = time.perf_counter_ns()
        told = False
        while any(one.is_running for one in processes):
            time.sleep(0.05)
            if not told and time.perf_counter_ns() - asked > _SOON_NS:
                # Before it is said: whoever reads it may be quick.
                signals.listen_again()
                say(f"waiting for the answers in flight, at most {timeout_s:g} s; Ctrl-C again goes without them")
                told = True
    except KeyboardInterrupt:
        for one in processes:
            one.abandon()


def _senders_for(due_ns: Integers, rate_a_sender: float) -> int:
    """As many as the schedule's busiest second needs."""
    busiest = int(np.bincount(due_ns // 1_000_000_000).max()) if len(due_ns) else 0
    return senders_for(busiest, rate_a_sender)
