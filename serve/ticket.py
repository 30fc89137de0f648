"""A request from when it comes into the queue until it is answered or nobody waits for it any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dlops.serve.outcome import Answer, DeadlineError
from dlops.signature import Feed

if TYPE_CHECKING:
    from dlops.serve.queue import InferenceQueue

Deliver = Callable[[Answer | Exception], None]


class Ticket:
    """A request in the queue."""

    __slots__ = (
        "_queue", "bytes", "deadline_ns", "deliver", "feed", "future", "is_dropped", "key", "loop", "rows",
        "submitted_ns", "timer",
    )  # fmt: skip

    def __init__(
        self, queue: InferenceQueue, feed: Feed, rows: int, size: int, deadline_ns: int | None, deliver: Deliver,
        key: tuple[object, ...], loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        self._queue = queue
        self.feed = feed
        self.rows = rows
        self.bytes = size
        self.deadline_ns = deadline_ns
        self.deliver = deliver
        self.key = key
        self.loop = loop
        self.submitted_ns = time.perf_counter_ns()
        self.is_dropped = False
        self.future: asyncio.Future[Answer] | None = None
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for the answer. A cancelled future says so at once, its callbacks a turn later."""
        return not (self.is_dropped or (self.future is not None and self.future.cancelled()))

    def cancel(self) -> None:
        """Drop the request, and give its place in the queue to others where it has not run; its answer goes nowhere."""
        self.is_dropped = True
        self._queue.leave(self)
        # It would hold the request, and its tensors, until the deadline.
        if self.timer is not None:
            self.timer.cancel()

    def expire(self) -> None:
        """Its deadline has passed: where it still waits, say so now and not when an instance frees."""
        if self._queue.leave(self) and self.is_wanted:
            self.is_dropped = True
            self.deliver(late())


def late() -> DeadlineError:
    """What a request is told whose deadline passed before it ran."""
    return DeadlineError("the deadline passed while the request waited")
