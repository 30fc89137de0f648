"""Who may ask, and what every answer tells a browser."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dlops.errors import DlopsError
from dlops.serve.outcome import DeadlineError
from dlops.serve.time_limit import WITHIN_S

# A browser must not take an answer for anything else than it says it is.
SECURITY_HEADERS: Mapping[str, str] = {"x-content-type-options": "nosniff"}
# Pages besides: they load nothing from elsewhere, are in nobody's frame, and tell nobody where the reader came from.
# Swagger UI sets styles in its elements, and its icons are data.
PAGE_HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "referrer-policy": "no-referrer",
}
# Whoever starts the server again or sends it requests must be able to ask how it does without a secret.
_OPEN = frozenset(("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"))
# What a browser asks a person for, and then sends: any name, and the token as password.
_SCHEME, _BROWSERS = "bearer", "basic"
# By which no page of another site can change anything: browsers say so of every request of theirs.
_HARMLESS = frozenset(("GET", "HEAD", "OPTIONS"))
# Of this very server, or a person's own doing: a page of another port of this host is another's.
_OWN = frozenset(("same-origin", "none"))
REQUEST_ID = "x-request-id"


def request_id(text: str | None) -> str | None:
    """What a client calls its request, where that can stand in a header and a log; it comes back with the answer."""
    return text if text is not None and 0 < len(text) <= 128 and text.isascii() and text.isprintable() else None


class UnauthorizedError(DlopsError):
    """The request has no token, or a wrong one: status 401."""


class CrossSiteError(DlopsError):
    """A browser sent it for a page of another site: status 403."""


class Guard:
    """token: what requests must bear in `Authorization: Bearer ...`; None where anybody may ask."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return self._token is None

    def check(self, authorization: str | None) -> None:
        """Raise UnauthorizedError unless this header's value has the token."""
        if self._token is None:
            return
        if authorization is None:
            raise UnauthorizedError("no token", hint="send Authorization: Bearer TOKEN")
        scheme, _, given = authorization.partition(" ")
        token = given.strip().encode() if scheme.lower() == _SCHEME else _password(given)
        # Compared in a time that does not say how much of it was right.
        if scheme.lower() not in (_SCHEME, _BROWSERS) or not hmac.compare_digest(token, self._token):
            raise UnauthorizedError("wrong token", hint="send Authorization: Bearer TOKEN")


def _password(given: str) -> bytes:
    """Of what follows "Basic"; empty where it is none."""
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


class GuardMiddleware:
    """Around the whole ASGI application, BentoML's own routes too."""

    def __init__(self, app: ASGIApp, guard: Guard, refuse: ASGIApp) -> None:
        """refuse: answers a request whose scope has the error under "dlops.error"."""
        self._app = app
        self._guard = guard
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        asked = Headers(scope=scope)
        identity = request_id(asked.get(REQUEST_ID))

        has_begun = False
        within_s: float | None = scope.get(WITHIN_S)
        limit = asyncio.timeout(within_s)

        wrong: HTTPException | None = None

        async def unless_plain(message: Message) -> None:
            """BentoML's own routes say in plain text what is wrong, and nobody counts it: that is left unsent."""
            nonlocal wrong
            if message["type"] == "http.response.start" and _is_plain_error(message):
                wrong = _asked_wrongly(scope, message)
            if wrong is None and not limit.expired():
                limit.reschedule(None)
                await secured(message)

        async def secured(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if headers.get("content-type", "").startswith("text/html"):
                    for name, value in PAGE_HEADERS.items():
                        headers.setdefault(name, value)
                if identity is not None:
                    headers[REQUEST_ID] = identity
            await send(message)

        try:
            if scope["method"] not in _HARMLESS and _is_another_sites(asked):
                raise CrossSiteError(
                    "a page of another site may not ask this server to do anything",
                    hint="a proxy in front of it has to pass the Host header on as it came",
                )
            if scope["path"] not in _OPEN:
                self._guard.check(asked.get("authorization"))
        except (CrossSiteError, UnauthorizedError) as error:
            await self._refuse({**scope, "dlops.error": error}, receive, secured)
            return
        problem: Exception | None = None
        try:
            async with limit:
                await self._app(scope, receive, unless_plain)
        except Exception as error:
            # Raised outside of all that handles a route's errors: without an answer the client would wait for nothing.
            if has_begun:
                raise
            problem = error
        if limit.expired():
            problem = DeadlineError(f"no answer within {within_s:g} s")
        problem = problem or wrong
        if problem is not None:
            await self._refuse({**scope, "dlops.error": problem}, receive, secured)


def _is_another_sites(asked: Headers) -> bool:
    """Whether a browser says that another page than one of ours sent it; what is no browser says nothing of that."""
    site = asked.get("sec-fetch-site")
    if site is not None:
        return site not in _OWN
    # That header comes over TLS and on this machine alone; this one from everywhere.
    origin = asked.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != asked.get("host", "").lower()


def _is_plain_error(start: Message) -> bool:
    return start["status"] >= 400 and Headers(raw=start["headers"]).get("content-type", "").startswith("text/plain")


def _asked_wrongly(scope: Scope, start: Message) -> HTTPException:
    method, path, headers = scope["method"], scope["path"][:200], Headers(raw=start["headers"])
    allowed = ", ".join(sorted(one.strip() for one in headers.get("allow", "").split(",")))
    detail = f"no route {method} {path}" if start["status"] == 404 else None
    if start["status"] == 405:
        detail = f"{method} is not allowed here" + (f", but {allowed}" if allowed else "")
    return HTTPException(start["status"], detail, headers={"Allow": allowed} if allowed else None)
