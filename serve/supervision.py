"""The process that starts the workers and the workers themselves: how one tells the other that it cannot go on, and
how none outlives the other.

`bentoml serve` starts workers again and again when they fail. A worker whose artifact is wrong would do so for ever,
so it leaves its reason in a file and ends the server; not where others have loaded before, which go on. It also gives
every worker a session of its own, so that no signal to the arbiter's group reaches them: a worker watches its arbiter
itself.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dlops.console import say
from dlops.directory import write_json
from dlops.errors import CorruptError, DlopsError, GateError, MachineError, NoVerdictError, UsageError

if TYPE_CHECKING:
    import psutil

# Environment variables, inherited by the workers.
ARBITER_PID = "DLOPS_ARBITER_PID"
FAILURE_FILE = "DLOPS_FAILURE_FILE"
CELLS_DIR = "DLOPS_CELLS_DIR"
STOP_ON_STDIN_EOF = "DLOPS_STOP_ON_STDIN_EOF"
# In the folder of the cells.
_SERVED = "served"
_WATCH_S = 0.5
_KILLED_WITHIN_S = 5.0
# From <sys/prctl.h>: the signal that the kernel sends to this process when its parent dies.
_PR_SET_PDEATHSIG = 1
_KINDS: dict[str, type[DlopsError]] = {
    kind.__name__: kind for kind in (DlopsError, GateError, UsageError, CorruptError, NoVerdictError, MachineError)
}


def is_worker() -> bool:
    """Whether this process was started by one that called `become_arbiter`."""
    return ARBITER_PID in os.environ and os.environ[ARBITER_PID] != str(os.getpid())


def become_arbiter() -> None:
    """Call once, in the process that is about to start the workers.

    From here on it exits with the status of the failure that a worker reports, and ends when its standard input does
    where DLOPS_STOP_ON_STDIN_EOF is set: so a server never outlives the process that holds the other end.
    """
    os.environ[ARBITER_PID] = str(os.getpid())
    # A launcher's folder outlives a server that is killed, and goes with the launcher.
    launcher = os.environ.get(FAILURE_FILE)
    folder = None if launcher is None else Path(launcher).parent
    os.environ[CELLS_DIR] = tempfile.mkdtemp(prefix="dlops-cells-", dir=folder)
    os.environ.setdefault(FAILURE_FILE, str(Path(os.environ[CELLS_DIR]) / "failure.json"))
    atexit.register(_at_exit)
    if os.environ.pop(STOP_ON_STDIN_EOF, None):
        threading.Thread(target=_end_with_stdin, daemon=True).start()


def end_with_arbiter() -> None:
    """Call once, in a worker: from here on it is killed as soon as the process that started it is gone.

    A worker whose arbiter was killed would answer for ever on a port that nobody knows is taken. By the kernel at once
    where that is Linux; elsewhere within half a second, by a thread that looks who the parent is.
    """
    if not is_worker():
        return
    arbiter = int(os.environ[ARBITER_PID])
    if sys.platform == "linux":
        # What it returns does not matter: where the kernel refuses, the thread is what there is anyway.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_after, args=(arbiter,), name="dlops-arbiter-watch", daemon=True).start()


class Family:
    """A server's arbiter and the workers that it has started, each in a session of its own."""

    def __init__(self, arbiter: subprocess.Popen[bytes]) -> None:
        self._arbiter = arbiter
        self._workers = _children(arbiter)

    def kill(self) -> None:
        """SIGKILL to all of them, workers started since included; returns when they are gone, or after five seconds."""
        import psutil

        workers = {*self._workers, *_children(self._arbiter)}
        # It may have ended by itself, and its workers not.
        with suppress(ProcessLookupError):
            os.killpg(self._arbiter.pid, signal.SIGKILL)
        for worker in workers:
            try:
                # Never another process that got the number since: psutil compares when they began.
                worker.kill()
            except psutil.NoSuchProcess:
                continue
        deadline = time.monotonic() + _KILLED_WITHIN_S
        while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.01)


def note_served(worker: int) -> None:
    """The worker of this number has loaded: what fails there after this is its own failure, and not the server's."""
    Path(os.environ[CELLS_DIR], f"{_SERVED}-{worker}").touch()


def has_served(worker: int) -> bool:
    """Whether a worker of this number ever loaded."""
    return Path(os.environ[CELLS_DIR], f"{_SERVED}-{worker}").exists()


def end_server(error: DlopsError) -> None:
    """Say why in one line and end the server that this worker belongs to."""
    path = Path(os.environ[FAILURE_FILE])
    # Whoever named the file reads it and says so itself.
    if path.parent == Path(os.environ[CELLS_DIR]):
        say(f"dlops: {error}")
    write_failure(path, error)
    os.kill(int(os.environ[ARBITER_PID]), signal.SIGTERM)


def write_failure(path: Path, error: DlopsError) -> None:
    """Keep what went wrong, for `read_failure` in another process."""
    kind = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS)
    # Replaced whole, because the launcher may look at any moment.
    write_json(path, json.dumps({"kind": kind, "message": error.message, "hint": error.hint}))


def read_failure(path: Path) -> DlopsError | None:
    """What a worker wrote, or None where none did."""
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    return _KINDS[document["kind"]](document["message"], hint=document["hint"])


def _at_exit() -> None:
    failure = read_failure(Path(os.environ[FAILURE_FILE]))
    shutil.rmtree(os.environ[CELLS_DIR], ignore_errors=True)
    if failure is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        # BentoML's command would end with 0, and an exit handler can change that in no other way.
        os._exit(failure.exit_status)


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _end_after(arbiter: int) -> None:
    while os.getppid() == arbiter:
        time.sleep(_WATCH_S)
    os._exit(1)


def _children(arbiter: subprocess.Popen[bytes]) -> list[psutil.Process]:
    # BentoML needs it, so it is there where there is a server.
    import psutil

    if arbiter.poll() is not None:
        return []
    try:
        return psutil.Process(arbiter.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        # A killed process is a zombie once its first thread has ended; the last one to end closes the sockets.
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False
