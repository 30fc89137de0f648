"""A bounded queue in front of the instances of one model: requests wait here until an instance takes them in batches.

An instance takes whatever waits when it frees, up to a number of rows, so batches grow with load and an idle server
answers at once. Rows are counted, not requests, and bytes beside them. What its client no longer wants is dropped
before it costs anything.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from dlops.serve.instance import Instance, Ran
from dlops.serve.outcome import Answer, BatchDone, ClosedError, OverloadedError, Reason
from dlops.serve.pace import Pace
from dlops.serve.ticket import Deliver, Ticket, late
from dlops.signature import Feed, Signature

# A request is taken where it would be done in this part of the time that it has: what was waited for and comes too late
# is work for nothing, and the pace of the next runs is known only roughly.
_SURE = 2 / 3

Results = list[tuple[Ticket, Answer | Exception]]


class InferenceQueue:
    """Feeds must fit the instances' signature: check them before they come here.

    Every instance has a thread of its own; or, `inline`, the one instance runs on the event loop, at the end of the
    turn in which requests came: for a model that is done before a thread would have begun. batching: join requests of
    equal shape along the first axis. max_bytes: of the tensors that wait. max_wait_ns: by the pace of the last runs,
    above which requests are turned away that have no deadline; those that have one are where they would miss it.
    delay_ns: that an instance waits for more rows after the first. on_batch is called on the event loop after each run.
    """

    def __init__(
        self, instances: Sequence[Instance], *, max_rows: int, max_batch: int, max_bytes: int = 2**62,
        max_wait_ns: int = 2**62, batching: bool = True, delay_ns: int = 0, inline: bool = False,
        on_batch: Callable[[BatchDone], None] = lambda done: None, name: str = "dlops",
    ) -> None:  # fmt: skip
        if inline and (len(instances) > 1 or delay_ns):
            raise ValueError("on the event loop there is one instance, and it waits for nothing")
        self._instances = tuple(instances)
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_wait_ns = max_wait_ns
        self._max_batch = max_batch
        self._batching = batching and _has_batch_axes(instances[0].session.signature)
        self._fixed = not any(len(dims) for dims in _other_dims(instances[0].session.signature))
        self._delay_ns = delay_ns
        self._inline = inline
        self._on_batch = on_batch
        self._waiting: deque[Ticket] = deque()
        self._rows = 0
        self._bytes = 0
        self._pace = Pace(len(instances))
        self._running = 0
        self._expected = 0
        self._busy = [False] * len(instances)
        self._closing = False
        self._turn_is_due = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"{name}-instance-{number}", daemon=True)
            for number in range(0 if inline else len(instances))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def rows_waiting(self) -> int:
        return self._rows

    @property
    def busy_instances(self) -> int:
        """Instances that run a batch at this moment."""
        return sum(self._busy)

    @property
    def is_broken(self) -> bool:
        """Whether no instance runs any more: what comes is told so at once."""
        return all(instance.is_broken for instance in self._instances)

    def examine(self) -> None:
        """Try broken instances again. Takes as long as opening a model does; not on the event loop."""
        for instance in self._instances:
            if instance.is_broken:
                instance.examine()
        with self._changed:
            self._changed.notify_all()

    @property
    def batching(self) -> bool:
        """Whether requests are joined: not where a tensor has no batch axis, nor where the caller said no."""
        return self._batching

    def refusal(self, *, rows: int = 1, size: int = 1, deadline_ns: int | None = None) -> OverloadedError | None:
        """Why a request of so many rows and bytes would not be taken now; None where it would be."""
        # An empty queue takes any request, so that one larger than the bounds is slow and not impossible.
        if self._waiting and self._rows + rows > self._max_rows:
            return OverloadedError(f"{self._rows} rows wait already, at most {self._max_rows}", hint="try again")
        if self._waiting and self._bytes + size > self._max_bytes:
            return OverloadedError(f"{self._bytes} bytes wait already, at most {self._max_bytes}", hint="try again")
        # An idle model as well: what its last runs took may have been the machine's fault.
        if not (self._waiting or self._running or self._expected):
            return None
        wait_ns = self._pace.ns_for(self._rows + self._running + self._expected + rows)
        has_ns: float = self._max_wait_ns
        if deadline_ns is not None:
            has_ns = _SURE * (deadline_ns - time.perf_counter_ns())
        # One whose deadline has passed already is told that.
        if wait_ns <= has_ns or has_ns <= 0:
            return None
        error = OverloadedError(
            f"the answer would take {wait_ns / 1e9:.2g} s, and has {has_ns / 1e9:.2g} s", hint="try again"
        )
        error.retry_after_s = (wait_ns - has_ns) / 1e9
        return error

    @contextmanager
    def expecting(self, rows: int) -> Iterator[None]:
        """While a request of so many rows is read and decoded: what comes later must not take its place, as the work on
        it would be for nothing. On the event loop."""
        self._expected += rows
        try:
            yield
        finally:
            self._expected -= rows

    def submit(self, feed: Feed, *, rows: int, deadline_ns: int | None = None) -> asyncio.Future[Answer]:
        """Queue one request; call on the event loop. Cancelling the future drops the request if it has not run.

        deadline_ns: on time.perf_counter_ns's clock. Raises OverloadedError where the rows do not fit and ClosedError
        after `close`; the future raises DeadlineError, or what the session raised.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def settle(result: Answer | Exception) -> None:
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        ticket = self.put(feed, rows=rows, deadline_ns=deadline_ns, deliver=settle)
        ticket.future = future
        future.add_done_callback(lambda future: ticket.cancel() if future.cancelled() else None)
        return future

    def put(self, feed: Feed, *, rows: int, deliver: Deliver, deadline_ns: int | None = None) -> Ticket:
        """As `submit`, for callers without a coroutine: `deliver` is called on the event loop, and never from here."""
        size = sum(array.nbytes for array in feed.values())
        key = () if self._fixed or not self._batching else _shape_key(feed)
        ticket = Ticket(self, feed, rows, size, deadline_ns, deliver, key, asyncio.get_running_loop())
        with self._changed:
            if self._closing:
                raise ClosedError("the server is shutting down", hint="send the request elsewhere")
            refusal = self.refusal(rows=rows, size=size, deadline_ns=deadline_ns)
            if refusal is not None:
                raise refusal
            self._waiting.append(ticket)
            self._rows += rows
            self._bytes += size
            if not self._inline:
                self._wake()
            elif not self._turn_is_due:
                self._turn_is_due = True
                # Requests that the loop has read in this turn come before it, and so into the same batch.
                ticket.loop.call_soon(self._turn)
        if deadline_ns is not None:
            ticket.timer = ticket.loop.call_later((deadline_ns - ticket.submitted_ns) / 1e9, ticket.expire)
        return ticket

    def _wake(self) -> None:
        """Some instance that takes what waits; one that stands aside would not pass it on."""
        if any(instance.is_broken for instance in self._instances):
            self._changed.notify_all()
        else:
            self._changed.notify()

    def leave(self, ticket: Ticket) -> bool:
        """Take a request out that still waits; whether it did."""
        with self._changed:
            try:
                self._waiting.remove(ticket)
            except ValueError:
                return False
            self._rows -= ticket.rows
            self._bytes -= ticket.bytes
            return True

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those that wait, end the threads. Returns whether that was done in time.

        Not on the event loop: that is where answers are delivered.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if self._inline:
                # A loop that has ended runs nothing any more, and nobody is left to be told.
                return self._changed.wait_for(
                    lambda: not (self._busy[0] or (self._waiting and self._waiting[0].loop.is_running())), timeout_s
                )
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self, number: int) -> None:
        while True:
            with self._changed:
                while (not self._waiting or self._stands_aside(number)) and not self._closing:
                    self._changed.wait()
                if self._delay_ns:
                    self._gather()
                if not self._waiting:
                    if self._closing:
                        return
                    continue
                batch, expired, reason = self._take(time.perf_counter_ns())
                self._begin(number, batch)
                if self._waiting:
                    self._wake()
            if expired:
                _on_loop(expired[0].loop, partial(self._deliver, _expired(expired), []))
            if batch:
                results, done = self._run(number, batch, reason)
                with self._changed:
                    self._end(number, batch, done)
                _on_loop(batch[0].loop, partial(self._deliver, results, done))

    def _stands_aside(self, number: int) -> bool:
        """Whether others are to take what waits: a broken instance would be quick to fail it."""
        return self._instances[number].is_broken and not self.is_broken

    def _gather(self) -> None:
        """Wait, with the lock given up meanwhile, until a whole batch waits or the first of it has waited enough."""
        while self._waiting and not self._closing and self._rows < self._max_batch:
            left_ns = self._waiting[0].submitted_ns + self._delay_ns - time.perf_counter_ns()
            if left_ns <= 0:
                return
            self._changed.wait(left_ns / 1e9)

    def _turn(self) -> None:
        """One batch on the event loop; the next one in its next turn, so that reading and writing go on between."""
        with self._changed:
            batch, expired, reason = self._take(time.perf_counter_ns())
            self._turn_is_due = bool(self._waiting)
            if self._turn_is_due:
                self._waiting[0].loop.call_soon(self._turn)
            self._begin(0, batch)
        if expired:
            self._deliver(_expired(expired), [])
        if batch:
            results, done = self._run(0, batch, reason)
            with self._changed:
                self._end(0, batch, done)
            self._deliver(results, done)
        if self._closing:
            with self._changed:
                self._changed.notify_all()

    def _begin(self, number: int, batch: list[Ticket]) -> None:
        self._busy[number] = bool(batch)
        self._running += sum([ticket.rows for ticket in batch])

    def _end(self, number: int, batch: list[Ticket], done: list[BatchDone]) -> None:
        self._busy[number] = False
        self._running -= sum([ticket.rows for ticket in batch])
        for one in done:
            self._pace.add(rows=one.rows, ns=one.copy_ns + one.compute_ns)

    def _take(self, now_ns: int) -> tuple[list[Ticket], list[Ticket], Reason]:
        """The next batch, what expired on the way, and why the batch ends. Others keep their order."""
        batch: list[Ticket] = []
        expired: list[Ticket] = []
        passed: list[Ticket] = []
        rows = 0
        reason: Reason = "closing" if self._closing else "nothing_more"
        waiting = self._waiting
        while waiting:
            ticket = waiting[0]
            if not ticket.is_wanted:
                pass
            elif ticket.deadline_ns is not None and now_ns > ticket.deadline_ns:
                expired.append(ticket)
            elif not batch:
                batch.append(ticket)
                rows = ticket.rows
            elif not self._batching or rows >= self._max_batch:
                reason = "full"
                break
            elif ticket.key != batch[0].key:
                passed.append(waiting.popleft())
                continue
            elif rows + ticket.rows <= self._max_batch:
                batch.append(ticket)
                rows += ticket.rows
            else:
                reason = "next_too_large"
                break
            waiting.popleft()
            self._rows -= ticket.rows
            self._bytes -= ticket.bytes
        waiting.extendleft(reversed(passed))
        return batch, expired, "full" if rows >= self._max_batch else reason

    def _run(self, number: int, batch: list[Ticket], reason: Reason) -> tuple[Results, list[BatchDone]]:
        started_ns = time.perf_counter_ns()
        rows = sum([ticket.rows for ticket in batch])
        try:
            ran = self._instances[number].run([ticket.feed for ticket in batch], rows)
            results = _answers(batch, ran, rows=rows, started_ns=started_ns)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises belongs to the requests, not the thread
            if len(batch) == 1:
                return [(batch[0], error)], []
            # One of them may have broken the run for its neighbours: alone, only that one fails.
            each = [self._run(number, [ticket], reason) for ticket in batch]
            return [result for results, _ in each for result in results], [one for _, done in each for one in done]
        done = BatchDone(
            rows=rows, padded_rows=ran.padded_rows, copy_ns=ran.copy_ns, compute_ns=ran.compute_ns, reason=reason,
            instance=number,
        )  # fmt: skip
        return results, [done]

    def _deliver(self, results: Results, runs: list[BatchDone]) -> None:
        """All answers of a run in one call on the event loop: waking it costs more than an answer."""
        for done in runs:
            try:
                self._on_batch(done)
            except Exception as error:  # noqa: BLE001 - who asked is answered, whoever cannot count it
                asyncio.get_running_loop().call_exception_handler(
                    {"message": "a run could not be counted", "exception": error}
                )
        for ticket, result in results:
            if ticket.timer is not None:
                ticket.timer.cancel()
            if ticket.is_wanted:
                try:
                    ticket.deliver(result)
                except Exception as error:  # noqa: BLE001 - one that cannot be told must not cost the others theirs
                    ticket.loop.call_exception_handler(
                        {"message": "an answer could not be delivered", "exception": error}
                    )


def _answers(batch: list[Ticket], ran: Ran, *, rows: int, started_ns: int) -> Results:
    results: Results = []
    alone = len(batch) == 1
    offset = 0
    for ticket in batch:
        outputs = ran.outputs
        if not alone:
            end = offset + ticket.rows
            outputs = {name: array[offset:end] for name, array in outputs.items()}
            offset = end
        answer = Answer(
            outputs=outputs, queue_ns=started_ns - ticket.submitted_ns, copy_ns=ran.copy_ns,
            compute_ns=ran.compute_ns, batch_rows=rows,
        )  # fmt: skip
        results.append((ticket, answer))
    return results


def _other_dims(signature: Signature) -> list[list[str]]:
    return [[dim for dim in spec.shape if isinstance(dim, str) and dim != "batch"] for spec in signature.inputs]


def _has_batch_axes(signature: Signature) -> bool:
    return all(spec.is_batched for spec in (*signature.inputs, *signature.outputs))


def _shape_key(feed: Feed) -> tuple[object, ...]:
    return tuple((name, array.shape[1:]) for name, array in sorted(feed.items()))


def _expired(tickets: list[Ticket]) -> Results:
    return [(ticket, late()) for ticket in tickets]


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():  # else nobody is left to be told
        loop.call_soon_threadsafe(call)
