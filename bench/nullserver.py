"""A server that answers any request at once with the same few bytes: what is measured against it is the client itself.

`python -m dlops.bench.nullserver` listens on a free port of 127.0.0.1, prints it, and ends when its stdin does, so that
it never outlives whoever started it.
"""

from __future__ import annotations

import re
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dlops.errors import MachineError

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_READ_BYTES = 1 << 18
_ENDING_S = 5.0


@contextmanager
def null_server() -> Iterator[int]:
    """The port of one in a process of its own, which ends with the block. Raises MachineError where it does not start.

    A request's body is what its Content-Length says; chunked ones are not understood.
    """
    command = [sys.executable, "-m", "dlops.bench.nullserver"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port:
                raise MachineError("the null server did not start", hint="its log is above")
            yield int(port)
        finally:
            process.stdin.close()
            try:
                process.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()


def complete_requests(buffer: bytearray) -> int:
    """How many whole requests the buffer begins with; they are taken out of it."""
    count = start = 0
    while (end := buffer.find(b"\r\n\r\n", start)) >= 0:
        length = _LENGTH.search(buffer, start, end)
        stop = end + 4 + (int(length[1]) if length else 0)
        if stop > len(buffer):
            break
        count, start = count + 1, stop
    del buffer[:start]
    return count


def main() -> None:
    """Serve until stdin ends. One thread and no event loop: a request costs two system calls and a search."""
    # Ctrl-C reaches the whole group of the terminal: whoever started this process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin.buffer, selectors.EVENT_READ)
    print(listener.getsockname()[1], flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                _accept(listener, selector)
            elif isinstance(key.fileobj, socket.socket):
                _answer(key.fileobj, key.data, selector)
            else:
                return


def _accept(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    connection, _ = listener.accept()
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    selector.register(connection, selectors.EVENT_READ, bytearray())


def _answer(connection: socket.socket, buffer: bytearray, selector: selectors.BaseSelector) -> None:
    try:
        data = connection.recv(_READ_BYTES)
        buffer += data
        count = complete_requests(buffer)
        if count:
            # A client that reads nothing until this does not fit is not one of ours: it loses the connection.
            connection.sendall(ANSWER * count)
    except OSError:  # reset by the client, or full: there is nobody to answer
        data = b""
    if not data:
        selector.unregister(connection)
        connection.close()


if __name__ == "__main__":
    main()
