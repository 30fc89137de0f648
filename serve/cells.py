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

_BYTES = 8
_SUFFIX = ".cells"
# Of one worker: a model needs hundreds, each version that it gets about a hundred more. What is not used takes no room.
_CELLS = 1024 * 1024

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
            os.ftruncate(descriptor, _CELLS * _BYTES)
            # Never closed, so held for as long as this process lives: by it the others see that it does.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._keys = os.open(Path(name).with_suffix(".keys"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
            os.write(self._keys, json.dumps([name, labels, first, count]).encode() + b"\n")
        self._places[name, labels] = first, count
        return first

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


def _read(values: memoryview[int], places: Mapping[Key, tuple[int, int]], *, lives: bool) -> Worker:
    return Worker(
        lives=lives, values={key: values[first : first + count].tolist() for key, (first, count) in places.items()}
    )


def _keys(path: Path) -> Iterator[tuple[Key, tuple[int, int]]]:
    if not path.exists():  # between a worker's two files
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # else it is being written
            name, labels, first, count = json.loads(line)
            yield (name, tuple(labels)), (first, count)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
