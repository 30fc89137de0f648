"""A bounded queue in front of one session: rows wait here, one thread takes them in batches.

The thread takes whatever waits when it frees, up to a number of rows, so batches grow with load and an idle server
answers at once. Rows are counted, not requests. What its client no longer wants is dropped before it costs anything.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlops.errors import DlopsError, MachineError
from dlops.runtimes.session import Session
from dlops.signature import Array, Feed


class OverloadedError(MachineError):
    """The queue is full; the request was not taken. Trying again later may work."""


class DeadlineError(DlopsError):
    """The request's deadline passed while it waited; it was not run."""


class ClosedError(MachineError):
    """The queue takes no more requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """outputs: this request's rows. queue_ns, compute_ns: waiting, running. batch_rows: of the run it was part of."""

    outputs: Feed
    queue_ns: int
    compute_ns: int
    batch_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDone:
    """One run of the session: its rows and how long it took."""

    rows: int
    compute_ns: int


@dataclass(slots=True, kw_only=True)
class _Entry:
    feed: Feed
    rows: int
    deadline_ns: int | None
    submitted_ns: int
    future: asyncio.Future[Answer]
    key: tuple[object, ...]


class InferenceQueue:
    """One session, one thread. Feeds must fit the session's signature: check them before they come here.

    batching: join requests of equal shape along the first axis. on_batch is called on the event loop after each run.
    """

    def __init__(
        self, session: Session, *, max_rows: int, max_batch: int, batching: bool = True,
        on_batch: Callable[[BatchDone], None] = lambda done: None, name: str = "dlops-instance-0",
    ) -> None:  # fmt: skip
        self._session = session
        self._max_rows = max_rows
        self._max_batch = max_batch
        self._batching = batching and _has_batch_axes(session)
        self._on_batch = on_batch
        self._waiting: deque[_Entry] = deque()
        self._rows = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def rows_waiting(self) -> int:
        return self._rows

    @property
    def batching(self) -> bool:
        """Whether requests are joined: not where a tensor has no batch axis, nor where the caller said no."""
        return self._batching

    @property
    def is_full(self) -> bool:
        """Whether not even one more row would be taken."""
        return self._rows >= self._max_rows

    def submit(self, feed: Feed, *, rows: int, deadline_ns: int | None = None) -> asyncio.Future[Answer]:
        """Queue one request; call on the event loop. Cancelling the future drops the request if it has not run.

        deadline_ns: on time.perf_counter_ns's clock. Raises OverloadedError where the rows do not fit and ClosedError
        after `close`; the future raises DeadlineError, or what the session raised.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        entry = _Entry(
            feed=feed, rows=rows, deadline_ns=deadline_ns, submitted_ns=time.perf_counter_ns(), future=future,
            key=_shape_key(feed) if self._batching else (),
        )  # fmt: skip
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down", hint="send the request elsewhere")
            # An empty queue takes any request, so that one larger than the bound is slow and not impossible.
            if self._waiting and self._rows + rows > self._max_rows:
                raise OverloadedError(f"{self._rows} rows wait already, at most {self._max_rows}", hint="try again")
            self._waiting.append(entry)
            self._rows += rows
            self._changed.notify()
        return future

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those that wait, end the thread. Returns whether it ended in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                batch, expired = self._take(time.perf_counter_ns())
            for entry in expired:
                _deliver(entry.future, DeadlineError("the deadline passed while the request waited"))
            if batch:
                self._run(batch)

    def _take(self, now_ns: int) -> tuple[list[_Entry], list[_Entry]]:
        """The next batch, and what expired on the way. Others keep their order; a row too many ends the batch."""
        batch: list[_Entry] = []
        expired: list[_Entry] = []
        passed: list[_Entry] = []
        rows = 0
        while self._waiting:
            entry = self._waiting[0]
            if entry.future.cancelled():
                pass
            elif entry.deadline_ns is not None and now_ns > entry.deadline_ns:
                expired.append(entry)
            elif not batch:
                batch.append(entry)
                rows = entry.rows
            elif not self._batching or rows >= self._max_batch:
                break
            elif entry.key != batch[0].key:
                passed.append(entry)
            elif rows + entry.rows <= self._max_batch:
                batch.append(entry)
                rows += entry.rows
            else:
                break
            self._waiting.popleft()
            self._rows -= entry.rows
        self._waiting.extendleft(reversed(passed))
        self._rows += sum(entry.rows for entry in passed)
        return batch, expired

    def _run(self, batch: list[_Entry]) -> None:
        started_ns = time.perf_counter_ns()
        try:
            outputs = self._session.run(_joined([entry.feed for entry in batch]))
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises belongs to the requests, not the thread
            if len(batch) == 1:
                _deliver(batch[0].future, error)
                return
            # One of them may have broken the run for its neighbours: alone, only that one fails.
            for entry in batch:
                self._run([entry])
            return
        compute_ns = time.perf_counter_ns() - started_ns
        rows = sum(entry.rows for entry in batch)
        done = BatchDone(rows=rows, compute_ns=compute_ns)
        _on_loop(batch[0].future, lambda: self._on_batch(done))
        offset = 0
        for entry in batch:
            own = outputs
            if len(batch) > 1:
                own = {name: array[offset : offset + entry.rows] for name, array in outputs.items()}
                offset += entry.rows
            answer = Answer(
                outputs=own, queue_ns=started_ns - entry.submitted_ns, compute_ns=compute_ns, batch_rows=rows
            )
            _deliver(entry.future, answer)


def _has_batch_axes(session: Session) -> bool:
    return all(spec.is_batched for spec in (*session.signature.inputs, *session.signature.outputs))


def _shape_key(feed: Feed) -> tuple[object, ...]:
    return tuple((name, array.shape[1:]) for name, array in sorted(feed.items()))


def _joined(feeds: list[Feed]) -> Feed:
    if len(feeds) == 1:
        return feeds[0]
    joined: dict[str, Array] = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    return joined


def _deliver(future: asyncio.Future[Answer], result: Answer | Exception) -> None:
    def settle() -> None:
        if future.done():  # its client left meanwhile
            return
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    _on_loop(future, settle)


def _on_loop(future: asyncio.Future[Answer], call: Callable[[], None]) -> None:
    loop = future.get_loop()
    if not loop.is_closed():  # else nobody is left to be told
        loop.call_soon_threadsafe(call)
