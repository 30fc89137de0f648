"""Targets in processes of their own, from the run's side: start one, hear that it is ready, give it turns, end it."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from types import TracebackType
from typing import Any, Self

import numpy as np

from dlops import errors
from dlops.bench.channel import Channel, read_turn
from dlops.bench.fifo import Integers, Kept
from dlops.bench.worker import Job, Ready
from dlops.errors import DlopsError, MachineError
from dlops.timing import Turn, WarmUp

_GRACE_S = 5.0


class Child:
    """A fresh process that runs a module of this package, and a channel to it, until `close`.

    What goes wrong there is raised here as what it was, and a process that dies as MachineError with its last words.
    """

    def __init__(self, target: str, module: str, argument: str) -> None:
        self._target = target
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
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
        self._child.wait(_GRACE_S)
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
        self.close()

    def ask(self, order: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        """Send an order and wait for its answer."""
        self.tell(order, payload)
        return self.receive()

    def tell(self, order: dict[str, Any], payload: bytes = b"") -> None:
        try:
            self._channel.send(order, payload)
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> tuple[dict[str, Any], bytes]:
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


class Process(Child):
    """An arm (see dlops.timing) whose calls are made in a fresh process."""

    def __init__(self, job: Job) -> None:
        job = job.model_copy(update={"spawned_ns": time.perf_counter_ns()})
        super().__init__(job.target, "dlops.bench.worker", job.model_dump_json())

    def ready(self) -> Ready:
        """Wait until the target has answered its first calls. Raises what opening or calling it raised."""
        header, _ = self.receive()
        return Ready.model_validate(header["ready"])

    def warm_up(self, limit_s: float) -> WarmUp:
        header, _ = self.ask({"warm_up": limit_s})
        return WarmUp(calls=header["calls"], settled=header["settled"])

    def take_turn(self, turn_s: float) -> Turn:
        return read_turn(self.ask({"turn": turn_s}))

    def keep_schedule(self, due_ns: Integers, *, give_up_ns: int) -> Kept:
        """Run a request at each of these times from the schedule's start, queued while another runs.

        On Ctrl-C what was done until then is given, marked so.
        """
        self.tell({"schedule": {"give_up_ns": give_up_ns}}, due_ns.tobytes())
        interrupted = False
        try:
            header, payload = self.receive()
        except KeyboardInterrupt:
            interrupted = True
            self.tell({"stop": True})
            header, payload = self.receive()
        begun, ended = np.frombuffer(payload, np.int64).reshape(2, -1)
        return Kept(begun_ns=begun, ended_ns=ended, interrupted=interrupted or header["interrupted"])


def _raised(header: dict[str, Any]) -> DlopsError:
    kind = getattr(errors, header["error"])
    error: DlopsError = kind(header["message"], hint=header["hint"])
    return error


def _named(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
