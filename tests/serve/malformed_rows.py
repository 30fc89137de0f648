"""Requests in a row on one connection, right and wrong, for the suite and, by the thousand, for the experiments."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.serve.malformed import ALLOWED, KINDS, good

_IDENTITY = "row-"
# In each right one, once.
RIGHT = f"X-Request-Id: {_IDENTITY}".encode()
# After so long without an answer the server waits for the rest of what was cut off.
_SILENCE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Requests that are sent at once; first: of right ones at the beginning."""

    sent: bytes
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """place: of the right request that it answers, None for a wrong one's."""

    status: int
    place: int | None


def row(draw: random.Random) -> Row:
    """Right ones carry their place as their id, and go both ways into the service."""
    length = draw.randrange(2, 13)
    are_right = [draw.random() < 0.6 for _ in range(length)]
    parts = []
    for place, is_right in enumerate(are_right):
        if is_right:
            usual = ["Accept-Encoding: gzip"] if draw.random() < 0.3 else []
            parts.append(good(f"X-Request-Id: {_IDENTITY}{place}", *usual))
        else:
            parts.append(draw.choice(KINDS)(draw))
    return Row(sent=b"".join(parts), first=[*are_right, False].index(False), length=length)


def answers_of(port: int, row: Row, *, within_s: float = 20.0) -> list[RowAnswer]:
    """Send a row; what is answered until the connection ends.

    Where the server waits for more once the first right ones are answered, it is told that no more comes. Raises
    TimeoutError where it neither answers nor ends the connection.
    """
    received, silent_s = b"", 0.0
    with socket.create_connection(("127.0.0.1", port), timeout=within_s) as client:
        # As in `status_of`: ports are few.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # What is not read to its end may have been answered before.
        with contextlib.suppress(ConnectionError):
            client.sendall(row.sent)
        client.settimeout(_SILENCE_S)
        while True:
            try:
                more = client.recv(65536)
            except ConnectionError:
                break
            except TimeoutError:
                silent_s += _SILENCE_S
                if silent_s > within_s:
                    raise
                if received.count(RIGHT.lower()) >= row.first:
                    with contextlib.suppress(OSError):
                        client.shutdown(socket.SHUT_WR)
                continue
            if not more:
                break
            received += more
    return _answers_in(received)


def fault_of(row: Row, answers: Sequence[RowAnswer]) -> str | None:
    """What no server may do with such a row; None where it did nothing of the kind."""
    first = list(answers[: row.first])
    if first != [RowAnswer(200, place) for place in range(row.first)]:
        return f"the first {row.first} are right, and their answers are {first}"
    places = [one.place for one in answers if one.place is not None]
    if places != sorted(set(places)):
        return f"answers out of order: {places}"
    if undeclared := {one.status for one in answers} - ALLOWED - {200}:
        return f"answered {undeclared}"
    # What is left of a request with too small a length is taken for another, which ends the connection.
    if len(answers) > row.length + 1:
        return f"{len(answers)} answers to {row.length} requests"
    return None


def _answers_in(received: bytes) -> list[RowAnswer]:
    """Raises ValueError where it is not one whole answer after another, each with its length."""
    answers = []
    while received:
        head, end, rest = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("content-length", -1))
        if not end or not status.startswith("http/1.1 ") or not 0 <= length <= len(rest):
            raise ValueError(f"no whole answer: {received[:1000]!r}")
        identity = headers.get("x-request-id", "")
        is_right = identity.startswith(_IDENTITY)
        answers.append(RowAnswer(int(status.split(" ")[1]), int(identity[len(_IDENTITY) :]) if is_right else None))
        received = rest[length:]
    return answers
