"""What circus, which `bentoml serve` starts its workers with, does too late or not at all.

It looks for workers that have ended every ten seconds; with one worker that is how long nobody answers. And a SIGTERM
that comes while it does something else, starting a worker say, is refused like a command from outside and so lost.
`install` makes it look as soon as a worker has ended, and end as soon as it can.
"""

from __future__ import annotations

import asyncio
import math
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from circus.controller import Controller
from circus.exc import ConflictError

from dlops.console import say

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

# Between two looks: a worker that ends as soon as it has begun is not all that the machine does.
_BETWEEN_LOOKS_S = 1.0
# Until what is in the way has been done.
_AGAIN_S = 0.05


def install() -> None:
    """Call once, in the process that is about to start the workers."""
    start = Controller.start

    def start_and_watch(self: Any) -> None:
        start(self)
        # BentoML can run it in a thread, where no signal can be had; then it is as slow as ever.
        if threading.current_thread() is threading.main_thread():
            Watch(self).begin()

    Controller.start = start_and_watch


class Watch:
    """Over the children of this process, on the event loop of circus' controller."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._loop: IOLoop = controller.loop
        self._due: object | None = None
        self._looked_at = -math.inf
        self._is_ending = False
        self._tasks: set[asyncio.Future[None]] = set()

    def begin(self) -> None:
        """Take SIGCHLD, and what ends the server."""
        signal.signal(signal.SIGCHLD, lambda *_: self._loop.add_callback_from_signal(self.child_ended))
        # Its handlers of SIGINT, SIGTERM and SIGQUIT call this.
        self._controller.sys_hdl.quit = lambda: self._loop.add_callback_from_signal(self.quit)

    def child_ended(self) -> None:
        """Look soon, once for all that end meanwhile."""
        if self._due is None:
            delay_s = max(0.0, self._looked_at + _BETWEEN_LOOKS_S - time.monotonic())
            self._due = self._loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        task = asyncio.ensure_future(self._replace_ended())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace_ended(self) -> None:
        self._due, self._looked_at = None, time.monotonic()
        try:
            if not self._is_ending:
                await self._controller.arbiter.manage_watchers()
        except ConflictError:
            self._due = self._loop.call_later(_AGAIN_S, self._look)

    def quit(self) -> None:
        """End all workers and then this process; later, where something else has to be done first."""
        if self._is_ending:
            return
        try:
            stopped = self._controller.arbiter.stop()
        except ConflictError:
            self._loop.call_later(_AGAIN_S, self.quit)
            return
        self._is_ending = True
        stopped.add_done_callback(_say_if_failed)


def _say_if_failed(stopped: asyncio.Future[None]) -> None:
    error = None if stopped.cancelled() else stopped.exception()
    if error is not None:
        say(f"ending the workers: {type(error).__name__}: {error}")
