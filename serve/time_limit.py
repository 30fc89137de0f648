"""How long a request that goes through BentoML may wait for its answer to begin.

BentoML's own middleware for this sets a timer for every request and never takes it back. A timer keeps the context that
it was set in, and with it the request and its connection: of everything that was answered in the last minute. `install`
puts `TimeLimit` in its place, where BentoML finds it and gives it the seconds of its own setting (`traffic.timeout`);
`GuardMiddleware` keeps to them.
"""

from __future__ import annotations

import bentoml
from bentoml._internal.server.http import traffic
from starlette.types import ASGIApp, Receive, Scope, Send

from dlops.console import say

# In a request's scope: the seconds within which its answer has to begin.
WITHIN_S = "dlops.within_s"


class TimeLimit:
    """Tells those whom it calls how long a request may take."""

    def __init__(self, app: ASGIApp, timeout: float) -> None:
        self._app = app
        self._timeout_s = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[WITHIN_S] = self._timeout_s
        await self._app(scope, receive, send)


def install() -> bool:
    """Call before BentoML makes its application. Returns whether it will find this one.

    A BentoML that has its own elsewhere serves all the same; that is said, as it takes memory for every request.
    """
    if not hasattr(traffic, "TimeoutMiddleware"):
        say(f"bentoml {bentoml.__version__}: no place to put a time limit of our own; all is held for a minute")
        return False
    traffic.TimeoutMiddleware = TimeLimit  # type: ignore[assignment,misc]
    return True
