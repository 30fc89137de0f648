"""CPU time from Linux's /proc: of the whole machine, and of chosen processes with all that they started."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
# Linux's states of sockets in /proc/net/tcp.
_LISTENING = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticks:
    """Cumulative, in clock ticks, over some processors. busy: of all processes; steal: taken by other virtual machines.

    Interrupts are in neither: no process owns them, and those of our own network traffic are not another's load.
    """

    busy: int
    steal: int


def usable_cpus() -> frozenset[int]:
    """The processors that this process may run on: what others do elsewhere does not disturb it."""
    return frozenset(os.sched_getaffinity(0))


def ticks_a_second() -> int:
    return os.sysconf("SC_CLK_TCK")


def machine_ticks(cpus: frozenset[int], proc: Path = PROC) -> Ticks:
    """Raises OSError where /proc/stat cannot be read, ValueError where it names none of the processors."""
    busy = steal = found = 0
    for line in (proc / "stat").read_text().splitlines():
        name, *numbers = line.split()
        if not name.startswith("cpu") or not name[3:].isdigit() or int(name[3:]) not in cpus:
            continue
        user, nice, system, _idle, _iowait, _irq, _softirq, stolen = map(int, (numbers + ["0"] * 8)[:8])
        busy += user + nice + system
        steal += stolen
        found += 1
    if not found:
        raise ValueError(f"{proc / 'stat'} names none of the processors that this run may use")
    return Ticks(busy=busy, steal=steal)


class Trees:
    """The CPU time of processes, and of all that they start, from when each was added on.

    Raises OSError where the kernel does not tell a process's children.
    """

    def __init__(self, roots: Iterable[int], proc: Path = PROC) -> None:
        self._proc = proc
        self._roots = list(roots)
        for root in self._roots:
            (proc / str(root) / "task" / str(root) / "children").read_bytes()
        self._used = 0
        self._fell = False
        self._last = self._total()

    def add(self, roots: Iterable[int]) -> None:
        """What they used before does not count."""
        self.used()
        self._roots += [root for root in roots if root not in self._roots]
        self._last = self._total()

    def used(self) -> int:
        """Clock ticks, all in all; never less than before."""
        total = self._total()
        # Between a child's end and its parent's hearing of it, its time is in neither, and then comes back. What is
        # still gone at the next call went with a root.
        if total >= self._last or self._fell:
            self._used += max(0, total - self._last)
            self._last, self._fell = total, False
        else:
            self._fell = True
        return self._used

    def _total(self) -> int:
        seen: set[int] = set()
        waiting = list(self._roots)
        total = 0
        while waiting:
            pid = waiting.pop()
            if pid in seen:
                continue
            seen.add(pid)
            try:
                fields = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
                # Its own time in user and system mode, and that of its children that it has waited for.
                total += sum(map(int, fields[11:15]))
                waiting += self._children(pid)
            except (OSError, ValueError):
                continue  # it has ended meanwhile
        return total

    def _children(self, pid: int) -> Iterator[int]:
        for task in (self._proc / str(pid) / "task").iterdir():
            yield from map(int, (task / "children").read_text().split())


def is_here(host: str) -> bool:
    """Whether that name or address is this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        if ipaddress.ip_address(address[0]).is_loopback:
            return True
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # No machine can bind another's address.
            probe.bind(address)
    except (OSError, ValueError):
        return False
    return True


def listeners(port: int, proc: Path = PROC) -> list[int]:
    """The processes that listen on a TCP port of this machine, as far as this user may see."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        table = proc / "net" / name
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    return [pid for pid in _processes(proc) if _holds(proc / str(pid), inodes)] if inodes else []


def _processes(proc: Path) -> list[int]:
    return [int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()]


def _holds(process: Path, inodes: set[str]) -> bool:
    try:
        return any(os.readlink(entry) in inodes for entry in (process / "fd").iterdir())  # noqa: PTH115 - no path
    except OSError:
        return False  # another user's, or gone
