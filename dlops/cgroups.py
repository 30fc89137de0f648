"""What Linux' control groups, and so containers and systemd, leave a process: CPU time and memory.

Both versions: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/. A limit holds for all groups below
it, so those around this process are read up to the outermost that can be seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc/self")
# As mounts name them.
_VERSION_1, _VERSION_2 = "cgroup", "cgroup2"


def allowed_cores(proc: Path = _PROC) -> float | None:
    """Cores whose time the tightest quota allows; None where there is none. proc: as /proc/self."""
    written = [_read(group, "cpu.max") for group in _groups(proc, "cpu", _VERSION_2, "cpu.max")]
    for group in _groups(proc, "cpu", _VERSION_1, "cpu.cfs_quota_us"):
        written.append(f"{_read(group, 'cpu.cfs_quota_us')} {_read(group, 'cpu.cfs_period_us')}")
    quotas = [_quota(text) for text in written]
    return min((quota for quota in quotas if quota is not None), default=None)


def allowed_memory(proc: Path = _PROC) -> int | None:
    """Bytes that the tightest limit allows; None where there is none. proc: as /proc/self."""
    limits = [_read(group, "memory.max") for group in _groups(proc, "memory", _VERSION_2, "memory.max")]
    name = "memory.limit_in_bytes"
    limits += [_read(group, name) for group in _groups(proc, "memory", _VERSION_1, name)]
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)


def _groups(proc: Path, controller: str, kind: str, name: str) -> Iterator[Path]:
    """The groups around this process, as folders that have a file of that name."""
    for line in _lines(proc / "mountinfo"):
        before, _, after = line.partition(" - ")
        mount, of = before.split(), after.split()
        if len(mount) < 5 or len(of) < 3 or of[0] != kind:
            continue
        if kind != _VERSION_2 and controller not in of[2].split(","):
            continue
        top, group = Path(_plain(mount[4])), _group(proc, controller if kind != _VERSION_2 else "")
        # A container may see a part of the tree alone, and its own group by the name that it has outside.
        root = _plain(mount[3]).rstrip("/")
        inside = group.removeprefix(root) if group == root or group.startswith(f"{root}/") else ""
        folder = top / inside.strip("/")
        for level in (folder, *folder.parents):
            if (level / name).is_file():
                yield level
            if level == top:
                break


def _group(proc: Path, controller: str) -> str:
    """The name of this process's group in the tree of that controller; of version 2, which has one for all, ''."""
    for line in _lines(proc / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            return group
    return "/"


def _quota(text: str) -> float | None:
    """text: microseconds of CPU time in a period, and the period's."""
    quota, _, period = text.partition(" ")
    # What stands for none is "max", or -1.
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _read(group: Path, name: str) -> str:
    return " ".join(_lines(group / name))


def _plain(path: str) -> str:
    # As the kernel writes them there.
    for written, meant in (("\\040", " "), ("\\011", "\t"), ("\\134", "\\")):
        path = path.replace(written, meant)
    return path


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux, or not to be read
        return []
