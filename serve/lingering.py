"""A connection that ends while its client still sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

# Nothing came for so long, or all of it lasted so long: as nginx has it.
_IDLE_S, _LONGEST_S = 5.0, 30.0
# Between an encrypted connection's last byte and the client's word that it has seen the end.
_FAREWELL_S = 5.0


class LingeringTransport(asyncio.Transport):
    """A transport of which `close` reads on, into nothing, where the client has more to send.

    A connection that is closed with something unread is reset, and a client that is told so while it sends may drop the
    answer that says why: a 413 or a 429 that was given before the body came is what it should see. So the answer is
    followed by the connection's end in this direction, and what comes in the other is dropped, by who receives it,
    until the client ends it or it takes too long.

    has_more: whether something of a request may still come. note_end: called as the end begins.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        has_more: Callable[[], bool],
        note_end: Callable[[], None],
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__()
        self._transport, self._has_more, self._note_end, self._loop = transport, has_more, note_end, loop
        self._began = self._last = 0.0
        self._sent_since: float | None = None
        self.lingers = False

    def close(self) -> None:
        if self.is_closing():
            return
        self._note_end()
        if not self._has_more():
            self._transport.close()
            return
        self.lingers = True
        self._began = self._last = self._loop.time()
        self._transport.resume_reading()
        if not self._transport.can_write_eof():  # where it is encrypted: there the length of the answer has to do
            return
        try:
            self._transport.write_eof()
        except OSError:  # the client has left
            self._transport.abort()

    def close_now(self) -> None:
        """Once what is written is sent."""
        self._note_end()
        self._transport.close()

    def note_more(self) -> None:
        """Something came after `close`."""
        self._last = self._loop.time()

    def end_if_late(self, now: float) -> None:
        """To be called now and then while it lingers. now: of the loop's clock."""
        if now - self._last > _IDLE_S or now - self._began > _LONGEST_S:
            self.close_now()

    def is_ending_late(self, now: float, *, is_sent: bool, limit_s: float = 0.0) -> bool:
        """Whether it is closed but for the client's word, which takes too long. is_sent: all that was written. limit_s:
        at least."""
        if not (is_sent and self._transport.is_closing()):
            self._sent_since = None
        elif self._sent_since is None:
            self._sent_since = now
        return self._sent_since is not None and now - self._sent_since > max(_FAREWELL_S, limit_s)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def write(self, data: Any) -> None:
        self._transport.write(data)

    def writelines(self, list_of_data: Any) -> None:
        self._transport.writelines(list_of_data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
