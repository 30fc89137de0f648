"""The images in a tar archive, read in one pass into memory: nothing is written, so no name in it can lead anywhere."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import IO

from dlops.console import progress_bar, say
from dlops.errors import CorruptError, UsageError, from_os_error

# What unpacks to more than this should be a folder, which is read a file at a time.
MAX_TOTAL_BYTES = 4 * 1024**3
MAX_FILE_BYTES = 64 * 1024**2
MAX_MEMBERS = 2_000_000
# Between two entries: long names and extended headers, which tarfile reads whole into memory. Real ones take kilobytes.
MAX_HEADER_BYTES = 1024**2
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def read_images(
    path: Path,
    *,
    suffixes: Collection[str],
    max_total_bytes: int = MAX_TOTAL_BYTES,
    max_file_bytes: int = MAX_FILE_BYTES,
    max_members: int = MAX_MEMBERS,
) -> tuple[list[str], tuple[bytes, ...]]:
    """(names, contents) of the files in it that end like images, by name.

    Raises CorruptError where it is truncated, no archive, or holds a name or link that leads out of it; UsageError
    where it is over a limit.
    """
    images: dict[str, bytes] = {}
    total = members = passed_over = 0
    limits = (max_total_bytes, max_file_bytes, max_members)
    try:
        with (
            path.open("rb") as packed,
            _unpacked(packed) as unpacked,
            progress_bar(f"reading {path.name}", total=path.stat().st_size) as bar,
        ):
            stream = _Metered(path, unpacked)
            position = 0
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    members += 1
                    # Headers count as well: an archive of empty members is a bomb too.
                    total += tarfile.BLOCKSIZE + member.size
                    _check_limits(path, member, total, members, limits)
                    stream.allow(member.size + MAX_HEADER_BYTES)
                    name = _safe_name(path, member)
                    if name is None:
                        continue
                    if PurePosixPath(name).suffix.lower() not in suffixes:
                        passed_over += 1
                        continue
                    file = tar.extractfile(member)
                    assert file is not None
                    images[name] = file.read()
                    bar.advance(packed.tell() - position, note=f"{len(images)} images")
                    position = packed.tell()
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, RecursionError) as error:
        raise CorruptError(f"{path}: not a tar archive, or a damaged one ({error})") from None
    except OSError as error:
        if error.errno is None:  # gzip and bz2 report damage this way
            raise CorruptError(f"{path}: a damaged archive ({error})") from None
        raise from_os_error(error, doing=f"reading {path}") from error
    if passed_over:
        say(f"{path}: {passed_over} files are not images by their names and were passed over")
    names = sorted(images)
    return names, tuple(images[name] for name in names)


class _Metered:
    """What tarfile reads from: it gives at most MAX_HEADER_BYTES, or as many bytes as `allow` said, then refuses."""

    def __init__(self, path: Path, unpacked: IO[bytes]) -> None:
        self._path, self._unpacked = path, unpacked
        self._left = MAX_HEADER_BYTES

    def allow(self, count: int) -> None:
        # tarfile reads ahead by a record of 20 blocks.
        self._left = count + tarfile.RECORDSIZE

    def read(self, size: int) -> bytes:
        if self._left <= 0:
            raise CorruptError(f"{self._path}: over {MAX_HEADER_BYTES} bytes of headers for one entry")
        chunk = self._unpacked.read(min(size, self._left))
        self._left -= len(chunk)
        return chunk


def _unpacked(packed: IO[bytes]) -> IO[bytes]:
    head = packed.read(6)
    packed.seek(0)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return opener(packed, "rb")  # type: ignore[operator, no-any-return]
    return packed


def _check_limits(path: Path, member: tarfile.TarInfo, total: int, members: int, limits: tuple[int, int, int]) -> None:
    max_total, max_file, max_members = limits
    if members > max_members:
        raise UsageError(f"{path}: over {max_members} entries", hint="unpack it and name the folder")
    if member.size > max_file:
        raise UsageError(f"{path}: {member.name!r} has {member.size} bytes, at most {max_file} allowed")
    if total > max_total:
        raise UsageError(f"{path}: unpacks to over {max_total} bytes", hint="unpack it and name the folder")


def _safe_name(path: Path, member: tarfile.TarInfo) -> str | None:
    """The member's path where it is a file to look at, None for folders and what archivers leave behind."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise CorruptError(f"{path}: the name {member.name!r} leads out of the archive")
    if member.isdir() or any(part.startswith(".") or part == "__MACOSX" for part in name.parts):
        return None
    if not member.isreg():
        raise CorruptError(
            f"{path}: {member.name!r} is a link or a device, not a file", hint="archive with tar --dereference"
        )
    return name.as_posix()
