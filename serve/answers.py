"""What the ways into the service share: what the headers of a request say, and what an answer looks like."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Sequence

from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dlops.errors import DlopsError, InputError, MachineError
from dlops.serve.body import BodyTooLargeError
from dlops.serve.guard import CrossSiteError, UnauthorizedError
from dlops.serve.outcome import BrokenError, ClosedError, DeadlineError, OverloadedError
from dlops.serve.predict import MediaTypeError
from dlops.serve.protocol import Encoded, SharedMemoryError

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
LENGTH_HEADER = "Inference-Header-Content-Length"
# A request that bears it gets its parts back, as browsers show them.
TIMING_HEADER = "X-Server-Timing"
# Below this, compressing costs more time than sending.
_COMPRESS_FROM_BYTES = 1024
_WEIGHT = re.compile(r"(?:^|;)\s*q\s*=\s*(\d*\.?\d+|\d+\.)", re.IGNORECASE | re.ASCII)
# However long the wait: it is a guess, and a client that never comes back is no use to anybody.
_MOST_RETRY_AFTER_S = 60

Times = Sequence[tuple[str, int]]
"""Part and ns."""


class UnsupportedError(InputError):
    """A part of the protocol that this server does not have."""


class ReceiveTimeoutError(InputError):
    """The request took too long to come."""


class HeadTooLargeError(InputError):
    """The request's address and headers are too large."""


class UnknownModelError(DlopsError):
    """There is no model of this name or version."""


class NotReadyError(MachineError):
    """The model is not loaded yet, or its self-test is still running."""


# What an error means over HTTP and over gRPC: the first that fits, so children stand before their parents.
_STATUSES: Sequence[tuple[type[DlopsError], int, str]] = (
    (ReceiveTimeoutError, 408, "DEADLINE_EXCEEDED"),
    (HeadTooLargeError, 431, "RESOURCE_EXHAUSTED"),
    (UnauthorizedError, 401, "UNAUTHENTICATED"),
    (CrossSiteError, 403, "PERMISSION_DENIED"),
    (UnknownModelError, 404, "NOT_FOUND"),
    (UnsupportedError, 501, "UNIMPLEMENTED"),
    (SharedMemoryError, 501, "UNIMPLEMENTED"),
    (BodyTooLargeError, 413, "RESOURCE_EXHAUSTED"),
    (MediaTypeError, 415, "INVALID_ARGUMENT"),
    (InputError, 400, "INVALID_ARGUMENT"),
    (OverloadedError, 429, "RESOURCE_EXHAUSTED"),
    (NotReadyError, 503, "UNAVAILABLE"),
    (ClosedError, 503, "UNAVAILABLE"),
    (BrokenError, 503, "UNAVAILABLE"),
    (DeadlineError, 504, "DEADLINE_EXCEEDED"),
    (DlopsError, 500, "INTERNAL"),
)


def statuses(error: DlopsError) -> tuple[int, str]:
    """HTTP's number and gRPC's name for an error that was raised on purpose."""
    return next((number, name) for kind, number, name in _STATUSES if isinstance(error, kind))


def error_response(error: DlopsError) -> Response:
    """The JSON answer to such an error: {"error": ..., "field": ... where there is one}."""
    document: dict[str, str] = {"error": str(error)}
    if isinstance(error, InputError) and error.field is not None:
        document["field"] = error.field
    status, _ = statuses(error)
    headers = {}
    if status in (429, 503):
        retry_s = math.ceil(error.retry_after_s) if isinstance(error, OverloadedError) else 1
        headers["Retry-After"] = str(min(max(1, retry_s), _MOST_RETRY_AFTER_S))
    if status == 401:
        # The second is for people: a browser asks for name and password.
        headers["WWW-Authenticate"] = 'Bearer, Basic realm="dlops: the token as password"'
    return json_response(document, status=status, headers=headers)


def header_lines(response: Response) -> bytes:
    """Of an answer that is written without ASGI: each with its line's end, all but its length."""
    return b"".join([b"%s: %s\r\n" % header for header in response.raw_headers if header[0] != b"content-length"])


def json_response(document: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Whatever pydantic can write as JSON."""
    return Response(to_json(document), status_code=status, headers=headers, media_type="application/json")


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors in the form of ours."""
    assert isinstance(error, HTTPException)
    return json_response({"error": error.detail}, status=error.status_code, headers=dict(error.headers or {}))


def deadline_ns(started_ns: int, *, header: str | None, timeout_us: int | None = None) -> int | None:
    """When a request is no longer wanted, by its header and by its own parameter; the earlier of the two.

    Raises InputError for a header that is no number of milliseconds.
    """
    ends = [] if timeout_us is None else [started_ns + timeout_us * 1000]
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) <= 9 and int(header) > 0):
            raise InputError(
                f"{TIMEOUT_HEADER} must be a whole number of milliseconds above 0, of nine digits at most",
                field=TIMEOUT_HEADER,
            )
        ends.append(started_ns + int(header) * 1_000_000)
    return min(ends, default=None)


def json_length(text: str) -> int:
    """What Inference-Header-Content-Length says. Raises InputError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InputError(f"{LENGTH_HEADER} is not a number of bytes", field=LENGTH_HEADER)
    return int(text)


def server_timing(times: Times) -> str:
    """The parts of a request's time in ms, as the Server-Timing header has them."""
    return ", ".join([f"{part};dur={ns / 1e6:.3f}" for part, ns in times])


def infer_response(encoded: Encoded, accepted: str, more: dict[str, str]) -> Response:
    """An inference's answer, compressed where the client takes that; more: headers besides."""
    headers = dict(more)
    if encoded.json_bytes is not None:
        headers[LENGTH_HEADER] = str(encoded.json_bytes)
    body = encoded.body
    # The first that both know, as Triton chooses; clients that name none get it plain.
    chosen = next((name for name in _acceptable(accepted) if name in ("gzip", "deflate")), None)
    if chosen is not None and len(body) >= _COMPRESS_FROM_BYTES:
        body = gzip.compress(body, 1) if chosen == "gzip" else zlib.compress(body, 1)
        headers["Content-Encoding"] = chosen
    kind = "application/json" if encoded.json_bytes is None else "application/octet-stream"
    return Response(body, headers=headers, media_type=kind)


def _acceptable(accepted: str) -> Iterator[str]:
    """What an Accept-Encoding names, in its order; what it weighs with 0 is not to come (RFC 9110, 12.5.3)."""
    for part in accepted.split(","):
        name, _, parameters = part.partition(";")
        weight = _WEIGHT.search(parameters)
        if weight is None or float(weight.group(1)) > 0:
            yield name.strip().lower()
