"""How a worker goes on SIGTERM: first it says that it is no longer ready, and only then it stops to accept.

Whoever sends requests here, a load balancer say, needs some time to notice. Until then they are answered as ever, each
with `Connection: close`, so that clients come back by another way.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from types import FrameType

from dlops.console import say


def drain_on_sigterm(begin: Callable[[], None], *, delay_s: float) -> None:
    """Call in the main thread, on its running event loop, after the server has set its own signal handlers.

    On the first SIGTERM `begin` is called, on the event loop, and `delay_s` later the handler that was there before; on
    a second one that handler at once.
    """
    loop = asyncio.get_running_loop()
    stop = signal.getsignal(signal.SIGTERM)
    if not callable(stop):
        raise RuntimeError("nothing handles SIGTERM yet: call this once the server runs")
    received: list[int] = []

    def finish() -> None:
        if len(received) == 1:
            stop(signal.SIGTERM, None)

    def drain() -> None:
        begin()
        if delay_s:
            say(f"shutting down in {delay_s:g} s: no longer ready, and still answering")
        loop.call_later(delay_s, finish)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            loop.call_soon_threadsafe(drain)
        else:
            stop(number, frame)

    signal.signal(signal.SIGTERM, handle)
