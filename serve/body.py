"""Request bodies read within limits: refused by Content-Length before reading, counted while reading, and after
decompression too."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from dlops.errors import InputError
from dlops.serve.outcome import OverloadedError

# zlib's window bits: gzip's header alone, and zlib's own.
_WINDOW_BITS: Mapping[str, int] = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class BodyTooLargeError(InputError):
    """The body is larger than the server takes: status 413."""


class BodyReader:
    """Reads bodies of at most `max_bytes` each, and `max_pending_bytes` of all that are held at once."""

    def __init__(self, *, max_bytes: int, max_pending_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._max_pending_bytes = max_pending_bytes
        self.pending_bytes = 0
        """Of all bodies that are held at this moment."""

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, decompressed as Content-Encoding says; its share of the memory is held until the block ends.

        Raises BodyTooLargeError, OverloadedError where other bodies fill the memory, InputError for a damaged or
        unknown encoding, ClientDisconnect where the client left half-way.
        """
        text = request.headers.get("content-length")
        announced = 0 if text is None else self.announced(text)
        held = 0
        try:
            chunks, size = [], 0
            async for chunk in request.stream():
                size += len(chunk)
                if size > self._max_bytes:
                    raise self._too_large()
                # What has come and not what was announced: else a few who announce much and send nothing keep all
                # others out.
                held += self.hold(len(chunk))
                chunks.append(chunk)
            if size < announced:
                raise ClientDisconnect
            body = b"".join(chunks)
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                body = await asyncio.to_thread(self._decompressed, body, encoding)
                held += self.hold(max(0, len(body) - held))
            yield body
        finally:
            self.release(held)

    def announced(self, text: str) -> int:
        """The number of bytes that a Content-Length says. Raises InputError, BodyTooLargeError above the limit."""
        if not (text.isascii() and text.isdigit()):
            raise InputError("Content-Length is not a number", field="Content-Length")
        size = int(text)
        if size > self._max_bytes:
            raise self._too_large()
        return size

    def hold(self, size: int) -> int:
        """Count so many bytes as held, until `release`; returns them. Raises OverloadedError where they do not fit."""
        if self.pending_bytes and self.pending_bytes + size > self._max_pending_bytes:
            raise OverloadedError("too many request bodies are held at once", hint="try again")
        self.pending_bytes += size
        return size

    def release(self, size: int) -> None:
        """Bytes that `hold` counted are given back."""
        self.pending_bytes -= size

    def _decompressed(self, body: bytes, encoding: str) -> bytes:
        if encoding not in _WINDOW_BITS:
            raise InputError(f"Content-Encoding {encoding!r}, known are gzip and deflate", field="Content-Encoding")
        stream = zlib.decompressobj(_WINDOW_BITS[encoding])
        try:
            # Not a byte more than the limit is ever made, however small the body is that asks for it.
            plain = stream.decompress(body, self._max_bytes + 1)
        except zlib.error:
            raise InputError(f"the body is not {encoding}", field="body") from None
        if len(plain) > self._max_bytes:
            raise self._too_large()
        if not stream.eof or stream.unused_data:
            raise InputError(f"the {encoding} body is truncated, or something follows it", field="body")
        return plain

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body is larger than {self._max_bytes} bytes", field="body")
