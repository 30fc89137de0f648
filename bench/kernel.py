"""What a process that times or sends asks of its kernel: to be woken exactly, and enough open files."""

from __future__ import annotations

import ctypes
import errno
import sys

from dlops.errors import MachineError

# prctl(2): by how much later than asked a thread, and those that it starts, may be woken. It is 50 µs unless told.
_PR_SET_TIMERSLACK = 29
# What a process has open besides its connections, with room to import what it has not yet.
_OTHER_FILES = 64
# More than any load here takes, and few enough for systems that refuse to set what they call unlimited.
_MOST_FILES = 65_536
# Of an OSError: this process, or the machine, may open no more files.
NO_MORE_FILES = frozenset({errno.EMFILE, errno.ENFILE})


def wake_on_time() -> None:
    """Have the kernel wake this thread, and those that it starts, as exactly as it can."""
    if sys.platform == "linux":
        # Where the kernel refuses, wake-ups are 50 µs later: measured as lag like any other.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


def open_more_files(connections: int = 0) -> None:
    """Let this process open as many files as it may at all. Raises MachineError where those are too few for so many
    connections."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft != resource.RLIM_INFINITY and soft < connections + _OTHER_FILES:
        raise MachineError(
            f"{connections} connections at once: this process may have {soft} files open",
            hint=f"ulimit -n {connections + _OTHER_FILES}, or fewer in flight",
        )
