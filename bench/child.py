"""A process of this package beside the run: start it, talk with it over a pipe pair, hear how it ended, end it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import IO, Any, Self

from dlops import errors
from dlops.bench.channel import Channel
from dlops.errors import DlopsError, MachineError

_GRACE_S = 5.0
_DYING_S = 60.0
_LAST_WORDS_S = 1.0
# PyTorch takes a good part of a second to go.
_ENDING_S = 3.0


class Child:
    """A fresh process that runs a module of this package, and a channel to it, until `close`.

    What goes wrong there is raised here as what it was, and a process that dies as MachineError with its last words.
    """

    def __init__(self, who: str, module: str, argument: str) -> None:
        """who: what an error calls it ("toy: the process that ran it")."""
        self._who = who
        self._stderr = _last_words_file()
        # -P: a file of the working folder that is named like a library is not imported for it.
        command = [sys.executable, "-P", "-m", module, argument]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
        )
        assert self._child.stdout is not None
        assert self._child.stdin is not None
        self._channel = Channel(self._child.stdout, self._child.stdin)

    @property
    def pid(self) -> int:
        return self._child.pid

    def close(self) -> None:
        """Nothing is lost with it: what it measured has arrived with each turn."""
        self._child.kill()
        # What stands back needs a moment of a processor even to die, which a full machine does not give it at once.
        # It is reaped when the next process is started.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_DYING_S)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what was still to be written had nobody to read it
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._let_end()
        self.close()

    def _let_end(self) -> None:
        """Let it close what it has open: a runtime may have unpacked a model into files of its own."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_ENDING_S)

    def ask(
        self, order: dict[str, Any], payload: bytes = b"", *, limit_s: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Send an order and wait for its answer. limit_s: see `receive`."""
        self.tell(order, payload)
        return self.receive(limit_s)

    def receive_or_stop(self) -> tuple[dict[str, Any], bytes, bool]:
        """The answer to an order that may be cut short, and whether Ctrl-C did so: what was done until then comes."""
        try:
            return *self.receive(), False
        except KeyboardInterrupt:
            self.tell({"stop": True})
            return *self.receive(), True

    def tell(self, order: dict[str, Any], payload: bytes = b"") -> None:
        try:
            self._channel.send(order, payload)
        except BrokenPipeError:
            raise self._death() from None

    def receive(self, limit_s: float | None = None) -> tuple[dict[str, Any], bytes]:
        """limit_s: a process that says nothing for so long is ended, and MachineError says where it was; None waits."""
        if limit_s is not None and not select.select([self._channel.reader], [], [], limit_s)[0]:
            raise self._silence(limit_s)
        message = self._channel.receive()
        if message is None:
            raise self._death()
        if "error" in message[0]:
            raise _raised(message[0])
        return message

    def _death(self) -> MachineError:
        try:
            status = self._child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            status = None
        how = "closed its pipe" if status is None else f"ended with {_named(status)}"
        said = self._last_words()
        hint = "it may have run out of memory: fewer targets a run, or a smaller --batch" if status == -9 else None
        return MachineError(f"{self._who} {how}{f': {said[-1][:300]}' if said else ''}", hint=hint)

    def _silence(self, limit_s: float) -> MachineError:
        # It dies of this signal, having said where it was if it asked faulthandler for that.
        self._child.send_signal(signal.SIGUSR1)
        try:
            self._child.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
        where = next((line.strip() for line in self._last_words() if line.startswith("  File")), "")
        return MachineError(f"{self._who} did not answer within {limit_s:g} s{f': it was in {where}' if where else ''}")

    def _last_words(self) -> list[str]:
        self._stderr.seek(0)
        return self._stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()


def _last_words_file() -> IO[bytes]:
    """In memory where the system has that: a full disk must not keep anything from being measured."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dlops-last-words"), "w+b")
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise MachineError(f"no folder for temporary files can be written ({error})", hint="set TMPDIR") from None


def _raised(header: dict[str, Any]) -> DlopsError:
    kind = getattr(errors, header["error"])
    error: DlopsError = kind(header["message"], hint=header["hint"])
    return error


def _named(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
