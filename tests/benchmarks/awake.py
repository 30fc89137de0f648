"""Cores that do not halt between requests.

A core with nothing to do halts, and in a virtual machine it takes the host 50 to 150 µs to run it again: whatever slept
is late by that, which says nothing of who slept. `cores_awake` gives each core a loop of the lowest class (SCHED_IDLE),
which gives way at once to anything else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LOOP = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print("awake", flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def cores_awake() -> Iterator[None]:
    """Inside, none of this process's cores halts (Linux)."""
    loops = [
        subprocess.Popen([sys.executable, "-c", _LOOP, str(core), str(os.getpid())], stdout=subprocess.PIPE)
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        for loop in loops:
            assert loop.stdout is not None
            assert loop.stdout.readline() == b"awake\n"
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()
