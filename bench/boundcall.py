"""Calls over buffers that lie where the model runs, so that copies can be told from inference."""

from __future__ import annotations

from collections.abc import Callable

from dlops.runtimes.session import Session
from dlops.signature import Feed


class BoundCall:
    """One inference on inputs that are in place, waited for. `copy_in` puts the next feed there."""

    def __init__(self, session: Session, feed: Callable[[], Feed]) -> None:
        """feed: gives a feed of the same shapes each time."""
        self._feed = feed
        self._bound = session.bind(feed())

    def copy_in(self) -> None:
        self._bound.copy_in(self._feed())

    def __call__(self) -> None:
        self._bound.run()
        self._bound.synchronize()
