"""Whole numbers that every worker of a server adds to and any of them can read.

A worker maps a file of its own into memory and adds to it without a lock or a call: no two of them write to the same
place, and a killed one's counts stay. Which cells mean what stands in a second file beside it, a line each.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dlops.errors import from_os_error

_BYTES = 8
_SUFFIX = ".cells"
# Of one worker: a model needs hundreds, each version that it gets about a hundred more. What is not used takes no room.
_CELLS = 1024 * 1024
_KEY_BYTES = 8 * 1024 * 1024

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
        self._used = 0
        descriptor = -1
        if self._folder is not None:
            descriptor, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=_SUFFIX, dir=self._folder)
            # Now, and not page by page: adding to a page that a full disk has no room for would end the process.
            _take_room(descriptor, _CELLS * _BYTES)
            # Never closed, so held for as long as this process lives: by it the others see that it does.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            keys = os.open(Path(name).with_suffix(".keys"), os.O_RDWR | os.O_CREAT)
            _take_room(keys, _KEY_BYTES)
            self._keys, self._keys_end = mmap.mmap(keys, _KEY_BYTES), 0
        self.values = memoryview(mmap.mmap(descriptor, _CELLS * _BYTES)).cast("q")
        """Add to them at the index that `index` gave."""

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
                if _is_locked(file.fileno()):
                    found.append(int(path.name.partition("-")[0]))
        return found

    def workers(self) -> Iterator[Worker]:
        """What each worker of the server has counted so far, this one among them."""
        if self._folder is None:
            yield _read(self.values, self._places, lives=True)
            return
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.stat().st_size < _CELLS * _BYTES:  # it is being made
                continue
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as plain,
                plain.cast("q") as values,
            ):
                yield _read(values, dict(_keys(path.with_suffix(".keys"))), lives=_is_locked(file.fileno()))


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


def _keys(path: Path) -> Iterator[tuple[Key, tuple[int, int]]]:
    if not path.exists():  # between a worker's two files
        return
    written, _, _ = path.read_bytes().partition(b"\0")
    for line in written.splitlines(keepends=True):
        if line.endswith(b"\n"):  # else it is being written
            name, labels, first, count = json.loads(line)
            yield (name, tuple(labels)), (first, count)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
