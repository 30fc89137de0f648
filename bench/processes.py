"""Targets in processes of their own, from the run's side: start one, hear that it is ready, give it turns, end it."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any

from dlops import errors
from dlops.bench.channel import Channel, read_turn
from dlops.bench.worker import Job, Ready
from dlops.errors import DlopsError, MachineError
from dlops.timing import Turn, WarmUp

_GRACE_S = 5.0


class Process:
    """An arm (see dlops.timing) whose calls are made in a fresh process, until `close`.

    What goes wrong there is raised here as what it was, and a process that dies as MachineError with its last words.
    """

    def __init__(self, job: Job) -> None:
        self._target = job.target
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        job = job.model_copy(update={"spawned_ns": time.perf_counter_ns()})
        # -P: a file of the working folder that is named like a library is not imported for it.
        command = [sys.executable, "-P", "-m", "dlops.bench.worker", job.model_dump_json()]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
        )
        assert self._child.stdout is not None
        assert self._child.stdin is not None
        self._channel = Channel(self._child.stdout, self._child.stdin)

    @property
    def pid(self) -> int:
        return self._child.pid

    def ready(self) -> Ready:
        """Wait until the target has answered its first calls. Raises what opening or calling it raised."""
        header, _ = self._receive()
        return Ready.model_validate(header["ready"])

    def warm_up(self, limit_s: float) -> WarmUp:
        header, _ = self._ask({"warm_up": limit_s})
        return WarmUp(calls=header["calls"], settled=header["settled"])

    def take_turn(self, turn_s: float) -> Turn:
        return read_turn(self._ask({"turn": turn_s}))

    def close(self) -> None:
        """Nothing is lost with it: what it measured has arrived with each turn."""
        self._child.kill()
        self._child.wait(_GRACE_S)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # what was still to be written had nobody to read it
        self._stderr.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            self._channel.send(order)
        except BrokenPipeError:
            raise self._death() from None
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
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
        self._stderr.seek(0)
        said = self._stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        hint = "it may have run out of memory: fewer targets a run, or a smaller --batch" if status == -9 else None
        return MachineError(
            f"{self._target}: the process that ran it {how}{f': {said[-1][:300]}' if said else ''}", hint=hint
        )


def _raised(header: dict[str, Any]) -> DlopsError:
    kind = getattr(errors, header["error"])
    error: DlopsError = kind(header["message"], hint=header["hint"])
    return error


def _named(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
