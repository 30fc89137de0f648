"""Servers whose behaviour is known exactly, each in a process of its own: `python servers.py KIND [SECONDS...]`.

parallel D: each request after D. queue D: one request at a time, D each. frozen D BEGIN LENGTH:
like parallel, but from BEGIN seconds after the first request on it stands still for LENGTH. grpc: over gRPC, answers
every call at once with what it was sent. Prints its port.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections.abc import Callable

from dlops.bench.nullserver import ANSWER

# From when a request arrives to when it is answered, both on the loop's clock.
Rule = Callable[[float], float]


def parallel(seconds: float) -> Rule:
    return lambda now: now + seconds


def queue(seconds: float) -> Rule:
    free = 0.0

    def rule(now: float) -> float:
        nonlocal free
        free = max(free, now) + seconds
        return free

    return rule


def frozen(seconds: float, begin: float, length: float) -> Rule:
    first = 0.0

    def rule(now: float) -> float:
        nonlocal first
        first = first or now
        since = now - first
        return (first + begin + length if begin - seconds < since < begin + length else now) + seconds

    return rule


KINDS: dict[str, Callable[..., Rule]] = {
    "parallel": parallel,
    "queue": queue,
    "frozen": frozen,
}


class Answering(asyncio.Protocol):
    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = self._loop.time()
        when = self._rule(now)
        if when <= now:
            self._transport.write(ANSWER)
        else:
            self._loop.call_at(when, self._answer)

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(ANSWER)


async def serve(rule: Rule) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Answering(rule), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def serve_grpc() -> None:
    import grpc.aio

    class Echo(grpc.GenericRpcHandler):
        def service(self, details: object) -> object:
            async def answer(request: bytes, context: object) -> bytes:
                return request

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    # epoll's timeouts are whole milliseconds, which a queue of two milliseconds would not be one with.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(
        serve_grpc() if sys.argv[1] == "grpc" else serve(KINDS[sys.argv[1]](*map(float, sys.argv[2:])))
    )
