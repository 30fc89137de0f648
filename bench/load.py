"""A fixed number of calls kept in flight against a server: each latency from the send, failures counted by kind."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from dlops import signals
from dlops.bench import pacing
from dlops.bench.http import HttpTransport
from dlops.bench.kernel import NO_MORE_FILES, open_more_files
from dlops.bench.transport import Connection, Transport
from dlops.console import say
from dlops.errors import MachineError
from dlops.timing import steady

TIMEOUT_S = 30.0
_WINDOW_S = 0.25
_MIN_WINDOW_CALLS = 5
# Over the network medians move more than in process; under this they may still be quoted.
_WARMUP_TOLERANCE = 0.05
_RECONNECT_PAUSE_S = 0.05
# A server that has not answered one call for this long while others fail is gone.
_DEAD_AFTER_S = 2.0
# After Ctrl-C, how long answers may take to come before that is said.
_SOON_S = 0.5
_MIN_SAMPLES = 368
_STRETCH = 2.0

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The run lasts from the end of the warm-up for duration_s; all times are counted from its begin.

    latencies_ns, starts_ns: (n,), the successful calls that began in the run, by start, the last of which end after it.
    failed_ns: (k,), when those began that failed, ascending. timeout_s: of a call. earlier_ns: (m,), when calls
    succeeded in the run that began in the warm-up: they count in the throughput. errors: those by kind; where nothing
    ever succeeded, of the warm-up too. attempts, answered: all calls ever sent, and those that succeeded, the warm-up's
    included. stopped: why it ended early, or None. interrupted: by Ctrl-C. began_ns: when the run began, on the
    system's clock.
    """

    latencies_ns: Integers
    starts_ns: Integers
    earlier_ns: Integers
    errors: dict[str, int]
    attempts: int
    answered: int
    duration_ns: int
    warmup_calls: int
    warmed_up: bool
    stopped: str | None
    interrupted: bool
    failed_ns: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    timeout_s: float = TIMEOUT_S
    began_ns: int = 0

    @property
    def worst_ns(self) -> int:
        """What a failed call counts as: the time-out, or the slowest answer where that took longer."""
        return max(round(self.timeout_s * 1e9), int(self.latencies_ns.max(initial=0)))


@dataclass(slots=True)
class _Recorder:
    """Written by the workers. began_ns is None during the warm-up."""

    # Calls that began in the run, whatever became of them.
    begun: int = 0
    # When each began, and its latency: one append, which no Ctrl-C can fall into.
    calls: list[tuple[int, int]] = field(default_factory=list)
    earlier: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    warmup_calls: int = 0
    warmup_errors: Counter[str] = field(default_factory=Counter)
    warmed_up: bool = False
    began_ns: int | None = None
    ended_ns: int | None = None
    # The first and the last failure since anything succeeded.
    failing_ns: tuple[int, int] | None = None
    stopped: str | None = None
    window: list[int] = field(default_factory=list)

    def success(self, start: int, arrived: int) -> None:
        self.failing_ns = None
        # An answer may have been read just before the run began and be told of just after.
        if self.began_ns is None or arrived < self.began_ns:
            self.warmup_calls += 1
            self.window.append(arrived - start)
            return
        if start >= self.began_ns:
            self.calls.append((start - self.began_ns, arrived - start))
        else:
            # Where calls are long, as many end in the run that began before it as begin in it and end after it.
            self.earlier.append(arrived - self.began_ns)

    def failure(self, start: int, kind: str) -> None:
        now = time.perf_counter_ns()
        self.failing_ns = (now if self.failing_ns is None else self.failing_ns[0], now)
        if self.began_ns is not None and start >= self.began_ns:
            self.errors[kind] += 1
            self.failed.append(start - self.began_ns)
        else:
            self.warmup_errors[kind] += 1


def closed_loop(
    host: str,
    port: int,
    requests: Sequence[bytes],
    *,
    concurrency: int,
    duration_s: float,
    max_warmup_s: float = 3.0,
    timeout_s: float = TIMEOUT_S,
    transport: Transport | None = None,
    on_warm: Callable[[], None] | None = None,
) -> Loaded:
    """Keep `concurrency` calls in flight for `duration_s` after a warm-up that ends when latency has settled.

    requests: whole, as `transport` sends them (HTTP where it is None), in turn. on_warm: called in a thread when the
    warm-up has ended; the calls meanwhile still belong to it. It goes on to twice the time where there are fewer than
    368 answers, and in any case until one of its own calls is sent. Any status but success, a broken connection and a
    time-out are errors; the call is not repeated. Ctrl-C ends it and keeps what was measured. Raises MachineError where
    this process may not open so many connections.
    """
    open_more_files(concurrency)
    recorder = _Recorder()
    interrupted = False
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        caller = _Caller(transport=transport or HttpTransport(), host=host, port=port, timeout_s=timeout_s)
        with _asyncios_ctrl_c():
            asyncio.run(_drive(caller, requests, recorder, concurrency, duration_s, max_warmup_s, on_warm))
    except KeyboardInterrupt:
        signals.pass_over()
        interrupted = True
    finally:
        if was_on:
            gc.enable()
    began = recorder.began_ns or time.perf_counter_ns()
    ended = recorder.ended_ns or time.perf_counter_ns()
    answered = recorder.warmup_calls + len(recorder.earlier) + len(recorder.calls)
    starts, latencies = np.array(recorder.calls, np.int64).reshape(-1, 2).T
    order = np.argsort(starts, kind="stable")
    # Where nothing ever succeeded, the failures of the warm-up are what there is to say.
    errors = recorder.errors if recorder.calls else recorder.errors + recorder.warmup_errors
    return Loaded(
        latencies_ns=latencies[order],
        starts_ns=starts[order],
        earlier_ns=np.array(recorder.earlier, np.int64),
        errors=dict(errors),
        attempts=answered + sum(recorder.errors.values()) + sum(recorder.warmup_errors.values()),
        answered=answered,
        duration_ns=ended - began,
        warmup_calls=recorder.warmup_calls,
        warmed_up=recorder.warmed_up,
        stopped=recorder.stopped,
        interrupted=interrupted,
        failed_ns=np.sort(np.array(recorder.failed, np.int64)),
        timeout_s=timeout_s,
        began_ns=began,
    )


@contextmanager
def _asyncios_ctrl_c() -> Iterator[None]:
    """The first Ctrl-C cancels the main task, which then waits for what is in flight; the second ends everything.

    asyncio does so where Python's own handler is in place, and nobody else's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(slots=True, kw_only=True)
class _Caller:
    transport: Transport
    host: str
    port: int
    timeout_s: float
    stopped: bool = False
    connecting: set[asyncio.Timeout] = field(default_factory=set)

    async def connect(self, *, instead_of: Connection | None) -> Connection | None:
        """None where the run ends first: else a server that takes long to accept would outlive it."""
        if instead_of is not None:
            await instead_of.aclose()
        if self.stopped:
            return None
        try:
            # Not wait_for: what it cancels just when the connection is made is lost, and never closed.
            async with asyncio.timeout(self.timeout_s) as limit:
                self.connecting.add(limit)
                try:
                    return await self.transport.connect(self.host, self.port)
                finally:
                    self.connecting.discard(limit)
        except TimeoutError:
            if self.stopped:
                return None
            raise

    def stop(self) -> None:
        """Send no more, and connect no more; what is in flight is waited for."""
        self.stopped = True
        for limit in self.connecting:
            limit.reschedule(asyncio.get_running_loop().time())


async def _drive(
    caller: _Caller, requests: Sequence[bytes], recorder: _Recorder, concurrency: int, duration_s: float,
    max_warmup_s: float, on_warm: Callable[[], None] | None,
) -> None:  # fmt: skip
    workers = []
    for index in range(concurrency):
        # Each worker begins elsewhere in the list, so that not all send the same at the same time.
        own = [requests[(index + offset) % len(requests)] for offset in range(len(requests))]
        workers.append(asyncio.create_task(_worker(caller, own, recorder)))
    try:
        await _warm_up(recorder, max_warmup_s)
        if on_warm is not None:
            await asyncio.to_thread(on_warm)
        recorder.began_ns = time.perf_counter_ns()
        # Where calls take longer than the run, its first begins when the last of the warm-up is answered.
        latest_ns = recorder.began_ns + (duration_s + caller.timeout_s) * 1e9
        while recorder.stopped is None and not (
            _enough(recorder, duration_s) and (recorder.begun or time.perf_counter_ns() > latest_ns)
        ):
            await asyncio.sleep(min(_WINDOW_S, duration_s / 10))
            _notice_death(recorder)
    finally:
        recorder.ended_ns = time.perf_counter_ns()
        caller.stop()
        task = asyncio.current_task()
        await _end(workers, caller.timeout_s, interrupted=task is not None and task.cancelling() > 0)


async def _end(workers: Sequence[asyncio.Task[None]], timeout_s: float, *, interrupted: bool) -> None:
    """Wait for the calls in flight: they began within the run, and are counted."""
    waiting = f"waiting for the answers in flight, at most {timeout_s:g} s; Ctrl-C again goes without them"
    saying = asyncio.get_running_loop().call_later(_SOON_S, say, waiting) if interrupted else None
    try:
        for worker in asyncio.as_completed(workers, timeout=timeout_s + 1):
            await worker
    except TimeoutError:
        raise MachineError(
            f"calls went on for over {timeout_s:g} s, which is the time-out of each",
            hint="the machine may be short of processor time: end what else runs, and measure again",
        ) from None
    finally:
        if saying is not None:
            saying.cancel()


async def _worker(caller: _Caller, requests: Sequence[bytes], recorder: _Recorder) -> None:
    connection: Connection | None = None
    try:
        for request in cycle(requests):
            if caller.stopped:
                break
            start = time.perf_counter_ns()
            try:
                if connection is None or not connection.is_open:
                    connection = await caller.connect(instead_of=connection)
                    # What is sent now would be no call of the run.
                    if connection is None or caller.stopped:
                        break
                recorder.begun += recorder.began_ns is not None
                # The time to connect anew is in the latency: where the server closes, every client has to.
                answer = await connection.send(request, timeout_s=caller.timeout_s)
            except asyncio.CancelledError:
                # By a second Ctrl-C: what hangs is not to be missing from the latencies.
                recorder.failure(start, pacing.outcome_name(pacing.ABANDONED))
                raise
            except (OSError, ValueError) as error:
                recorder.failure(start, failure_kind(error))
                await asyncio.sleep(_RECONNECT_PAUSE_S)
                continue
            if answer.status == pacing.ANSWERED:
                recorder.success(start, answer.arrived_ns)
            else:
                recorder.failure(start, pacing.outcome_name(answer.status))
    finally:
        if connection is not None:
            await connection.aclose()


async def _warm_up(recorder: _Recorder, limit_s: float) -> None:
    began = time.perf_counter_ns()
    windows: list[Integers] = []
    while not recorder.warmed_up and recorder.stopped is None and (time.perf_counter_ns() - began) / 1e9 < limit_s:
        await asyncio.sleep(_WINDOW_S)
        if len(recorder.window) >= _MIN_WINDOW_CALLS:
            windows.append(np.array(recorder.window, np.int64))
            recorder.window.clear()
        recorder.warmed_up = steady(windows, tolerance=_WARMUP_TOLERANCE)
        _notice_death(recorder)


def _notice_death(recorder: _Recorder) -> None:
    first, last = recorder.failing_ns or (0, 0)
    failing_s = (last - first) / 1e9
    if failing_s > _DEAD_AFTER_S:
        recorder.stopped = (
            f"calls failed for {failing_s:.1f} s and none succeeded: the server is gone or refuses everything"
        )


def _enough(recorder: _Recorder, duration_s: float) -> bool:
    assert recorder.began_ns is not None
    elapsed = (time.perf_counter_ns() - recorder.began_ns) / 1e9
    if elapsed < duration_s:
        return False
    return len(recorder.calls) >= _MIN_SAMPLES or elapsed >= _STRETCH * duration_s


def failure_kind(error: BaseException) -> str:
    """What became of a call that got no answer, in words."""
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ValueError):
        return "not an HTTP answer"
    if isinstance(error, OSError) and error.errno in NO_MORE_FILES:
        return pacing.outcome_name(pacing.NO_FILES)
    return "connection lost"
