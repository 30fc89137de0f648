"""Calls over buffers that lie where the model runs, so that copies, enqueueing and the device can be told apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from dlops.cudart import Stopwatch
from dlops.report import COPY_IN, COPY_OUT, DEVICE, ENQUEUE, Boundary
from dlops.runtimes.session import Bound, Session
from dlops.signature import Feed
from dlops.timing import Local


class DeviceClock(Protocol):
    """Times what is put on a stream between start and stop (see dlops.cudart.Stopwatch)."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def elapsed_ns(self) -> int: ...


def bound_arm(
    target: str, session: Session, feed: Callable[[], Feed], *, boundary: Boundary,
    device_clock: Callable[[int], DeviceClock] = Stopwatch,
) -> Local:  # fmt: skip
    """The arm of a session's bound calls. feed: makes the feed of each call, of the same shapes each time.

    From "device" on the inputs are in place before a call, else both copies are in it. On a CUDA stream the parts of a
    call are timed too, but for "preprocessing", where making the feed is none of them. device_clock: of that stream.
    """
    bound = session.bind(feed())
    copies = boundary != "device"
    if bound.stream is None or boundary == "preprocessing":
        call = BoundCall(bound, feed, copies=copies)
        return Local(target, call, before=None if copies else call.copy_in)
    clocked = ClockedCall(bound, feed, copies=copies, device_clock=device_clock(bound.stream))
    return Local(target, clocked, before=None if copies else clocked.copy_in, parts=clocked.parts)


class BoundCall:
    """One inference, waited for, with both copies or without. `copy_in` puts the next feed in place."""

    def __init__(self, bound: Bound, feed: Callable[[], Feed], *, copies: bool) -> None:
        self._bound, self._feed, self._copies = bound, feed, copies

    def copy_in(self) -> None:
        self._bound.copy_in(self._feed())

    def __call__(self) -> None:
        if self._copies:
            self.copy_in()
        self._bound.run()
        self._bound.synchronize()
        if self._copies:
            self._bound.copy_out()


class ClockedCall(BoundCall):
    """The same with its parts timed: copies and enqueueing on the host's clock, the inference on the device's."""

    def __init__(self, bound: Bound, feed: Callable[[], Feed], *, copies: bool, device_clock: DeviceClock) -> None:
        super().__init__(bound, feed, copies=copies)
        self._device_clock = device_clock
        self._spent = {COPY_IN: 0, ENQUEUE: 0, COPY_OUT: 0}

    def __call__(self) -> None:
        now, bound, clock = time.perf_counter_ns, self._bound, self._device_clock
        began = now()
        if self._copies:
            self.copy_in()
        copied = now()
        clock.start()
        started = now()
        bound.run()
        enqueued = now()
        clock.stop()
        bound.synchronize()
        done = now()
        if self._copies:
            bound.copy_out()
        self._spent = {COPY_IN: copied - began, ENQUEUE: enqueued - started, COPY_OUT: now() - done}

    def parts(self) -> dict[str, int]:
        """Of the last call, in nanoseconds, by the suffix of its samples; what it does not have is left out."""
        kept = {DEVICE: self._device_clock.elapsed_ns()}
        if self._bound.enqueues:
            kept[ENQUEUE] = self._spent[ENQUEUE]
        if self._copies:
            kept |= {name: self._spent[name] for name in (COPY_IN, COPY_OUT)}
        return kept
