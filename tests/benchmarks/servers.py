"""Servers whose behaviour is known exactly, each in a process of its own: `python servers.py KIND [SECONDS...]`.

parallel D: each request after D. queue D: one request at a time, D each. frozen D BEGIN LENGTH:
like parallel, but from BEGIN seconds after the first request on it stands still for LENGTH. grpc: over gRPC, answers
every call at once with what it was sent. Prints its port. All but grpc count what they have not answered yet, and
answer `GET /inside` with that count's sum over time.
"""

from __future__ import annotations

import asyncio
import json
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


class Inside:
    """How many requests have come and are not answered, summed over time, by this process's own clock alone."""

    def __init__(self) -> None:
        self.now_inside, self.sum_s, self._since_s = 0, 0.0, 0.0
        self.first_s = self.last_s = 0.0

    def step(self, change: int, now_s: float) -> None:
        self.sum_s += self.now_inside * (now_s - self._since_s)
        self.now_inside, self._since_s = self.now_inside + change, now_s
        self.first_s, self.last_s = self.first_s or now_s, now_s

    def answer(self) -> bytes:
        body = json.dumps({"sum_s": self.sum_s, "span_s": self.last_s - self.first_s}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Answering(asyncio.Protocol):
    def __init__(self, rule: Rule, inside: Inside) -> None:
        self._rule, self._inside = rule, inside
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"GET /inside "):
            self._transport.write(self._inside.answer())
            return
        now = self._loop.time()
        self._inside.step(1, now)
        when = self._rule(now)
        if when <= now:
            self._answer()
        else:
            self._loop.call_at(when, self._answer)

    def _answer(self) -> None:
        self._inside.step(-1, self._loop.time())
        if not self._transport.is_closing():
            self._transport.write(ANSWER)


async def serve(rule: Rule) -> None:
    inside = Inside()
    server = await asyncio.get_running_loop().create_server(lambda: Answering(rule, inside), "127.0.0.1", 0)
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
