"""Messages between a bench run and the processes that it times: a line of JSON, then as many bytes as it says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from dlops.errors import DlopsError

Message = tuple[dict[str, Any], bytes]


class Channel:
    """Both directions of a pipe pair. Where the other end is gone `receive` gives None, `send` BrokenPipeError."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self.reader, self._writer = reader, writer

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
        line = self.reader.readline()
        if not line.endswith(b"\n"):
            return None
        header: dict[str, Any] = json.loads(line)
        payload = self.reader.read(header["bytes"])
        return (header, payload) if len(payload) == header["bytes"] else None


@contextmanager
def telling(channel: Channel, target: str, *, hint: str | None = None) -> Iterator[None]:
    """What goes wrong in a child is told to the run, and ends the child. hint: beside what a runtime raised."""
    try:
        yield
    except DlopsError as error:
        channel.send({"error": type(error).__name__, "message": error.message, "hint": error.hint})
        sys.exit(error.exit_status)
    except Exception as error:  # noqa: BLE001 - a runtime raises classes of its own; the run says what it was
        first = (str(error).strip().splitlines() or [""])[0][:300]
        said = f"{target}: running it failed: {type(error).__name__}: {first}"
        channel.send({"error": "MachineError", "message": said, "hint": hint})
        sys.exit(1)
