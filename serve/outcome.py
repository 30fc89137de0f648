"""What becomes of a request in the queue, and of the run that it was part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlops.errors import DlopsError, MachineError
from dlops.signature import Feed

# Why a batch was taken when it was: it had all the rows that a run may have, the next request did not fit, nothing
# else waited (or not of that shape), or the queue is closing.
Reason = Literal["full", "next_too_large", "nothing_more", "closing"]


class OverloadedError(MachineError):
    """The queue is full; the request was not taken. Trying again in `retry_after_s` may work."""

    retry_after_s = 1.0


class DeadlineError(DlopsError):
    """The request's deadline passed while it waited, so that it was not run; or its answer did not begin in time."""


class BrokenError(MachineError):
    """No session of the model runs any more, and none could be opened anew yet."""


class ClosedError(MachineError):
    """The queue takes no more requests."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """outputs: this request's rows. queue_ns, copy_ns, compute_ns: waiting, joining, running. batch_rows: of the run
    it was part of."""

    outputs: Feed
    queue_ns: int
    copy_ns: int
    compute_ns: int
    batch_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDone:
    """One run of an instance: its rows, how long it took, and why it began with no more of them."""

    rows: int
    padded_rows: int
    copy_ns: int
    compute_ns: int
    reason: Reason
    instance: int
