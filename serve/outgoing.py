"""How long the other end of a connection has taken nothing of what is sent to it."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys

# Of Linux' struct tcp_info: packets on their way, bytes that the other end has acknowledged, bytes not sent yet.
_IN_FLIGHT, _TAKEN, _UNSENT = (struct.Struct("@I"), 24), (struct.Struct("@Q"), 120), (struct.Struct("@I"), 144)
_INFO_BYTES = 256


class Outgoing:
    """Of one connection. Asked again and again; what happened between two looks is not seen."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        # Encryption passes what it has on to a transport that cannot be asked; the kernel knows of both.
        self._is_hidden = transport.get_extra_info("sslcontext") is not None
        self._socket: socket.socket | None = transport.get_extra_info("socket") if sys.platform == "linux" else None
        # Whether the kernel says what it has of it.
        self._knows = False
        self._seen = 0
        self._since: float | None = None

    def stalled_s(self, now: float) -> float:
        """For how long something has waited to be sent and none of it was taken; 0 where nothing waits."""
        waits, progress = self._look()
        if not waits:
            self._since = None
            return 0.0
        if self._since is None or progress != self._seen:
            self._seen, self._since = progress, now
        return now - self._since

    def is_sent(self) -> bool:
        """Whether the kernel has all that was written; where it says so, and it is asked, the other end."""
        return not self._look()[0]

    @property
    def is_known(self) -> bool:
        """Whether `is_sent`, once asked, can be relied on: of what is encrypted not everywhere."""
        return self._knows or not self._is_hidden

    def _look(self) -> tuple[bool, int]:
        """Whether anything waits, and a number that changes where some of it is taken."""
        size = self._transport.get_write_buffer_size()
        if self._socket is None or not (size or self._is_hidden):
            return size > 0, size
        # Not by the transport's size alone: the kernel takes more of it only once a third of its own megabytes is free,
        # for which a slow client needs minutes.
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            in_flight, taken, unsent = (field.unpack_from(info, at)[0] for field, at in (_IN_FLIGHT, _TAKEN, _UNSENT))
        except (OSError, ValueError, struct.error):  # it has just been closed; or a kernel that says less
            return size > 0, size
        if not taken:  # as that of a sandbox has it: what says nothing of the handshake says nothing
            return size > 0, size
        self._knows = True
        return bool(size or in_flight or unsent), taken
