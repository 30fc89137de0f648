"""An instance, in Triton's word: one session, and the buffers in which requests become a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dlops.console import say
from dlops.cudart import HostBuffer
from dlops.errors import InputError
from dlops.runtimes.refusal import refusal
from dlops.runtimes.session import Bound, Session
from dlops.serve.outcome import BrokenError
from dlops.signature import Array, Feed, Signature

Renew = Callable[[Session], Session]
# So many requests in a row may be at fault themselves.
_PATIENCE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """outputs: of all rows, in the order of the feeds. copy_ns: joining them and bringing them to where the model
    runs. padded_rows: that no request asked for."""

    outputs: Feed
    copy_ns: int
    compute_ns: int
    padded_rows: int = 0


class Instance:
    """Runs several requests as one batch. Used by one thread at a time.

    buckets: batch sizes, rising, that are bound once and padded to, for runtimes that want fixed shapes (CUDA graphs);
    none for a session that takes any. Needs a signature whose only named dim is the batch where there are buckets.
    renew: given a session of which run after run failed, the same where it works, or else another one, that one closed;
    raises where none does. `is_broken` from then on until `examine` finds one.
    """

    def __init__(self, session: Session, *, buckets: Sequence[int] = (), renew: Renew | None = None) -> None:
        self._renew = renew
        self._sizes = tuple(buckets)
        self._failures = 0
        self.is_broken = False
        self._joined: dict[str, Array] = {}
        self._buckets: tuple[_Bucket, ...] = ()
        self._use(session)

    def _use(self, session: Session) -> None:
        for bucket in self._buckets:
            bucket.close()
        self.session = session
        self._buckets = tuple(_Bucket(session, rows) for rows in self._sizes)

    def run(self, feeds: Sequence[Feed], rows: int) -> Ran:
        """One run over the rows of all feeds, `rows` in all.

        Raises BrokenError, InputError where the model refuses what is in one of them, and what else the session raises.
        """
        if self.is_broken:
            raise BrokenError("the model's session has failed and is opened anew", hint="try again")
        try:
            ran = self._ran(feeds, rows)
        except Exception as error:
            # Of a batch only one may be at fault; alone it is known which. A refusal counts too: a session may have
            # come to refuse everything.
            if len(feeds) == 1:
                self._failures += 1
                if self._failures >= _PATIENCE:
                    self.examine()
            reason = refusal(error)
            if reason is None:
                raise
            raise InputError(f"the model refuses what is in its input: {reason}") from error
        self._failures = 0
        return ran

    def examine(self) -> None:
        """See whether the session still runs, and where it does not take another one."""
        self._failures = 0
        if self._renew is None:
            return
        try:
            session = self._renew(self.session)
            if session is not self.session:
                self._use(session)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises: it does not run
            if not self.is_broken:
                say(f"an instance is broken and is tried again: {type(error).__name__}: {error}")
            self.is_broken = True
        else:
            self.is_broken = False

    def _ran(self, feeds: Sequence[Feed], rows: int) -> Ran:
        bucket = next((bucket for bucket in self._buckets if bucket.rows >= rows), None)
        if bucket is not None:
            return bucket.run(feeds, rows)
        started_ns = time.perf_counter_ns()
        feed = feeds[0] if len(feeds) == 1 else self._join(feeds, rows)
        joined_ns = time.perf_counter_ns()
        outputs = self.session.run(feed)
        if len(feeds) > 1:
            outputs = {name: self._own(array) for name, array in outputs.items()}
        return Ran(outputs=outputs, copy_ns=joined_ns - started_ns, compute_ns=time.perf_counter_ns() - joined_ns)

    def _join(self, feeds: Sequence[Feed], rows: int) -> Feed:
        """The feeds under one another, in buffers that are kept: the memory of a large batch is not asked for anew."""
        joined = {}
        for name, first in feeds[0].items():
            buffer = self._joined.get(name)
            if buffer is None or len(buffer) < rows or buffer.shape[1:] != first.shape[1:]:
                buffer = self._joined[name] = np.empty((rows, *first.shape[1:]), first.dtype)
            joined[name] = np.concatenate([feed[name] for feed in feeds], out=buffer[:rows])
        return joined

    def _own(self, output: Array) -> Array:
        """The output where no later batch is written: a model may hand on what it was given."""
        mine = any(np.may_share_memory(output, buffer) for buffer in self._joined.values())
        return output.copy() if mine else output

    def close(self) -> None:
        """Free the session."""
        for bucket in self._buckets:
            bucket.close()
        self._buckets = ()
        if not self.is_broken:  # else it is closed already
            self.session.close()


class _Bucket:
    """A batch size with a bound call of its own, and the rows of the host from which that call copies: where it runs
    on a GPU, these lie where that copies from by itself."""

    def __init__(self, session: Session, rows: int) -> None:
        self.rows = rows
        feed = zeros(session.signature, rows)
        self._bound: Bound = session.bind(feed)
        self._locked: dict[str, HostBuffer] = {}
        if session.placement.device.startswith("cuda"):
            self._locked = {name: HostBuffer(array.shape, array.dtype) for name, array in feed.items()}
        self._feed = feed | {name: buffer.array for name, buffer in self._locked.items()}

    def run(self, feeds: Sequence[Feed], rows: int) -> Ran:
        started_ns = time.perf_counter_ns()
        for name, buffer in self._feed.items():
            np.concatenate([feed[name] for feed in feeds], out=buffer[:rows])
            # What an earlier batch left there could be a number that makes this run slow, or fail.
            buffer[rows:] = 0
        self._bound.copy_in(self._feed)
        copied_ns = time.perf_counter_ns()
        self._bound.run()
        self._bound.synchronize()
        ran_ns = time.perf_counter_ns()
        outputs = {name: array[:rows] for name, array in self._bound.copy_out().items()}
        copy_ns = copied_ns - started_ns + time.perf_counter_ns() - ran_ns
        return Ran(outputs=outputs, copy_ns=copy_ns, compute_ns=ran_ns - copied_ns, padded_rows=self.rows - rows)

    def close(self) -> None:
        self._feed = {}
        for buffer in self._locked.values():
            buffer.close()


def zeros(signature: Signature, rows: int) -> dict[str, Array]:
    """A feed of zeros with so many rows, every other named dim as small as it may be."""
    sizes = {name: limits.min for name, limits in signature.dims.items()} | {"batch": rows}
    return {
        spec.name: np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape], spec.dtype)
        for spec in signature.inputs
    }


def bucket_sizes(largest: int) -> tuple[int, ...]:
    """Powers of two up to `largest`, and that one: at most half of a batch is padding."""
    powers = [1]
    while powers[-1] * 2 < largest:
        powers.append(powers[-1] * 2)
    return tuple(sorted({*powers, largest}))
