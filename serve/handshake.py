"""Encryption of a connection: it counts from its first moment, and has no longer for it than for a request."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Protocol

from dlops.console import say

# For all of an answer that is sent as the connection ends: with the usual half minute a slow client would miss the rest
# of a large one. Whoever takes none of it is looked for elsewhere.
_END_S = 3600.0
# Of connections that wait, taken in one go: requests are to be answered, too.
_AT_ONCE = 64
# Of descriptors or memory.
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Before connections are taken again where there is no descriptor or memory for one.
_AGAIN_S = 1.0


class Encryptable(Protocol):
    """What answers on a connection that is encrypted, and may be told of it before."""

    def begin_handshake(self, handshake: Handshake) -> None: ...
    def end_handshake(self, handshake: Handshake) -> None: ...


class Handshake:
    """Of a connection that has just been taken, non-blocking."""

    def __init__(
        self, goal: Encryptable, connection: socket.socket, context: ssl.SSLContext, *, timeout_s: float
    ) -> None:
        self._goal, self._connection, self._context = goal, connection, context
        self._has_begun = self.is_aborted = False
        self._task = asyncio.get_running_loop().create_task(self._run(timeout_s))
        self._task.add_done_callback(self._end)
        goal.begin_handshake(self)

    async def _run(self, timeout_s: float) -> None:
        self._has_begun = True
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: self._goal, self._connection, ssl=self._context, ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=_END_S,
            )  # type: ignore[type-var]  # fmt: skip
        except OSError:  # too late, left, no TLS, or no certificate that is taken: the client's affair
            return

    def _end(self, task: asyncio.Task[None]) -> None:
        if not self._has_begun:
            self._connection.close()
        self._goal.end_handshake(self)
        if not task.cancelled():
            task.result()

    def abort(self) -> None:
        # What ends it may have come already: then its goal is told of a connection all the same.
        self.is_aborted = True
        self._task.cancel()

    # As uvicorn calls it where the server ends.
    shutdown = abort


class _EncryptedServer(asyncio.AbstractServer):
    """Of one listening socket."""

    def __init__(
        self, make: Callable[[], Encryptable], listener: socket.socket, context: ssl.SSLContext, *, timeout_s: float
    ) -> None:
        self._make, self._listener, self._context, self._timeout_s = make, listener, context, timeout_s
        self._loop = asyncio.get_running_loop()
        self._is_serving = False
        self._again: asyncio.TimerHandle | None = None

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def is_serving(self) -> bool:
        return self._is_serving

    async def start_serving(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._is_serving = True
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _address = self._listener.accept()
            except OSError as error:
                if error.errno not in _SCARCE:  # there is none, or it has just ended
                    return
                say(f"no connection can be taken for {_AGAIN_S:g} s: {error}")
                self.close()
                self._again = self._loop.call_later(_AGAIN_S, self._begin)
                return
            connection.setblocking(False)
            # As event loops do for what they take themselves.
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                with suppress(OSError):  # it has just ended, which is seen elsewhere
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Handshake(self._make(), connection, self._context, timeout_s=self._timeout_s)

    def close(self) -> None:
        if self._is_serving:
            self._is_serving = False
            self._loop.remove_reader(self._listener)
        if self._again is not None:
            self._again.cancel()

    async def wait_closed(self) -> None:
        """Of the connections that were taken others know."""

    async def serve_forever(self) -> NoReturn:
        raise NotImplementedError("whoever makes this server runs its loop")


def count_handshakes(loop: asyncio.AbstractEventLoop, *, timeout_s: float) -> None:
    """Let servers that the loop makes from here on of a socket, and that encrypt, begin so; their protocols are
    `Encryptable`. timeout_s: for a handshake."""
    create_server: Callable[..., Any] = loop.create_server

    async def create(make: Callable[[], Any], *args: Any, **options: Any) -> asyncio.AbstractServer:
        listener, context = options.get("sock"), options.get("ssl")
        if listener is None or context is None:
            return await create_server(make, *args, **options)  # type: ignore[no-any-return]
        listener.setblocking(False)
        listener.listen(options.get("backlog", 100))
        server = _EncryptedServer(make, listener, context, timeout_s=timeout_s)
        await server.start_serving()
        return server

    loop.create_server = create  # type: ignore[assignment,method-assign]
