"""Messages between a bench run and the processes that it times: a line of JSON, then as many bytes as it says."""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

import numpy as np

from dlops.timing import Turn

Message = tuple[dict[str, Any], bytes]


class Channel:
    """Both directions of a pipe pair. Where the other end is gone `receive` gives None, `send` BrokenPipeError."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    def of_child(cls) -> Channel:
        """The child's end: its standard input and output.

        From here on what any library prints goes to standard error, where it cannot be taken for a message.
        """
        writer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(sys.stdin.buffer, writer)

    def send(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self._writer.write(json.dumps({**header, "bytes": len(payload)}).encode() + b"\n" + payload)
        self._writer.flush()

    def receive(self) -> Message | None:
        """The next message, None where the other end has closed or died in the middle of one."""
        line = self._reader.readline()
        if not line.endswith(b"\n"):
            return None
        header: dict[str, Any] = json.loads(line)
        payload = self._reader.read(header["bytes"])
        return (header, payload) if len(payload) == header["bytes"] else None


def turn_message(turn: Turn) -> Message:
    return {"parts": list(turn.parts_ns)}, np.stack(
        [turn.starts_ns, turn.latencies_ns, *turn.parts_ns.values()]
    ).tobytes()


def read_turn(message: Message) -> Turn:
    header, payload = message
    names = header["parts"]
    starts, latencies, *parts = np.frombuffer(payload, np.int64).reshape(2 + len(names), -1)
    return Turn(starts_ns=starts, latencies_ns=latencies, parts_ns=dict(zip(names, parts, strict=True)))
