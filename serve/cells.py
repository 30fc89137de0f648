"""Whole numbers that every worker of a server adds to and any of them can read.

A worker maps a file of its own into memory and adds to it without a lock or a call: no two of them write to the same
place, and a killed one's counts stay: the worker that is started in its place takes over its file and counts on. Which
cells mean what stands in a second file beside it, a line each.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from psutil import pid_exists

from dlops.errors import from_os_error

_BYTES = 8
_SUFFIX = ".cells"
# Of one worker: a model needs hundreds, each version that it gets about a hundred more. What is not used takes no room.
_CELLS = 1024 * 1024
_KEY_BYTES = 8 * 1024 * 1024
# Of the second file, at a time.
_READ_BYTES = 64 * 1024
# The first cell: the process that the file is of.
_PID = 0
# How long another process may need to look at a file.
_LOOKED_WITHIN_S = 2.0

Key = tuple[str, tuple[str, ...]]
"""A name and the values of its labels."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What one worker counted. lives: it still does."""

    lives: bool
    values: Mapping[Key, list[int]]


class Cells:
    """This process's cells, and those of all that were given the same folder.

    folder: of the server; None for a process that is alone. Written by one thread at a time.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._places: dict[Key, tuple[int, int]] = {}
        self._used = _PID + 1
        # What was read of the workers' keys, and up to where.
        self._known: dict[Path, tuple[dict[Key, tuple[int, int]], int]] = {}
        descriptor = -1
        if self._folder is not None:
            # Neither is closed: the lock is held for as long as this process lives, and by it the others see that it
            # does.
            descriptor, path = _left_behind(self._folder) or _new_file(self._folder)
            keys = os.open(path.with_suffix(".keys"), os.O_RDWR | os.O_CREAT)
            _take_room(keys, _KEY_BYTES)
            self._keys = mmap.mmap(keys, _KEY_BYTES)
            places, self._keys_end = self._keys_of(path)
            self._places = dict(places)
            self._used = max([self._used, *(first + count for first, count in self._places.values())])
            # A line that a killed worker had begun.
            rest = self._keys.find(b"\0", self._keys_end) - self._keys_end
            self._keys[self._keys_end : self._keys_end + rest] = bytes(rest)
        self.values = memoryview(mmap.mmap(descriptor, _CELLS * _BYTES)).cast("q")
        """Add to them at the index that `index` gave."""
        self.values[_PID] = os.getpid()

    def clear(self, name: str) -> None:
        """Set this process's cells of that name to 0, where a worker before it has left them."""
        for (known, _), (first, count) in self._places.items():
            if known == name:
                for place in range(first, first + count):
                    self.values[place] = 0

    def index(self, name: str, labels: tuple[str, ...] = (), *, count: int = 1) -> int:
        """Of the first of `count` cells for this key; the same at every call."""
        known = self._places.get((name, labels))
        if known is not None:
            return known[0]
        first, self._used = self._used, self._used + count
        if self._used > _CELLS:
            raise RuntimeError(f"no cell is left for {name}: do its labels come from a bounded set?")
        if self._folder is not None:
            self._write_key(json.dumps([name, labels, first, count]).encode())
        self._places[name, labels] = first, count
        return first

    def _write_key(self, line: bytes) -> None:
        end = self._keys_end + len(line) + 1
        if end > _KEY_BYTES:
            raise RuntimeError("no room is left for names of cells: do their labels come from a bounded set?")
        self._keys[self._keys_end : end - 1] = line
        # Last: until then a reader takes it for a line that is being written.
        self._keys[end - 1] = ord("\n")
        self._keys_end = end

    def living(self) -> list[int]:
        """The process ids of the server's workers that live, this one's among them."""
        if self._folder is None:
            return [os.getpid()]
        found = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with path.open("rb") as file:
                if _is_whole(file.fileno()) and _is_locked(file.fileno()):
                    found.append(_pid(file.fileno()))
        return found

    def workers(self) -> Iterator[Worker]:
        """What each worker of the server has counted so far, this one among them."""
        if self._folder is None:
            yield _read(self.values, self._places, lives=True)
            return
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            with path.open("rb") as file:
                if not _is_whole(file.fileno()):
                    continue
                with (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                    memoryview(mapped) as plain,
                    plain.cast("q") as values,
                ):
                    yield _read(values, self._keys_of(path)[0], lives=_is_locked(file.fileno()))

    def _keys_of(self, path: Path) -> tuple[dict[Key, tuple[int, int]], int]:
        """Where a worker's cells are, and where in the second file the next line will begin. Lines are only added, so
        what was read once is not read again."""
        places, end = self._known.setdefault(path, ({}, 0))
        keys = path.with_suffix(".keys")
        if not keys.exists():  # between a worker's two files
            return places, end
        with keys.open("rb") as file:
            file.seek(end)
            written = b""
            while not (part := file.read(_READ_BYTES)).count(b"\0") and part:
                written += part
        written += part.partition(b"\0")[0]
        for line in written.splitlines(keepends=True):
            if line.endswith(b"\n"):  # else it is being written
                name, labels, first, count = json.loads(line)
                places[name, tuple(labels)] = first, count
                end += len(line)
        self._known[path] = places, end
        return places, end


def _left_behind(folder: Path) -> tuple[int, Path] | None:
    """The locked file of a worker that has ended, which nobody counts in any more."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        descriptor = os.open(path, os.O_RDWR)
        if _is_whole(descriptor) and _lock(descriptor):
            return descriptor, path
        os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool:
    """Whether it could be: not where its worker lives. One that looks whether it does has it for a moment."""
    until = time.monotonic() + _LOOKED_WITHIN_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if pid_exists(_pid(descriptor)) or time.monotonic() > until:
                return False
            time.sleep(0.002)
        else:
            return True


def _pid(descriptor: int) -> int:
    return int.from_bytes(os.pread(descriptor, _BYTES, _PID * _BYTES), sys.byteorder)


def _new_file(folder: Path) -> tuple[int, Path]:
    descriptor, name = tempfile.mkstemp(suffix=_SUFFIX, dir=folder)
    # Before it is whole: until then nobody takes it for one that was left.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # Now, and not page by page: adding to a page that a full disk has no room for would end the process.
    _take_room(descriptor, _CELLS * _BYTES)
    return descriptor, Path(name)


def _is_whole(descriptor: int) -> bool:
    """Whether it has been made."""
    return os.fstat(descriptor).st_size >= _CELLS * _BYTES


def _take_room(descriptor: int, size: int) -> None:
    """Raises MachineError where the disk is full."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        raise from_os_error(
            error, doing="making room for the server's counts in the folder for temporary files"
        ) from None


def _read(values: memoryview[int], places: Mapping[Key, tuple[int, int]], *, lives: bool) -> Worker:
    return Worker(
        lives=lives, values={key: values[first : first + count].tolist() for key, (first, count) in places.items()}
    )


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
