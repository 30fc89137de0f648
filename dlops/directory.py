"""Directories that are whole or absent: payload files named by digest, committed by one manifest.

A writer puts payloads beside the manifest under names that hold their SHA-256, syncs them, and then replaces the
manifest in one `os.replace`. A kill at any moment leaves the old directory or the new one; what the kill left behind is
collected by the next commit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from dlops.errors import MachineError, UsageError, from_os_error
from dlops.manifest import Manifest, Payload, sha256_of

_DIGEST_CHARS = 16
_OURS = re.compile(rf"^[A-Za-z0-9_]+-[0-9a-f]{{{_DIGEST_CHARS}}}(\.[A-Za-z0-9]+)+$")
_TEMPORARY = ".dlops-tmp-"

M = TypeVar("M", bound=Manifest)


def payload_name(name: str, digest: str) -> str:
    """What a writer calls the payload `name`, `<stem>.<suffix>`, whose SHA-256 is `digest`: `<stem>-<digest>.<suffix>`.

    For a file that has to name another one before both are written. Raises ValueError for a name of another form.
    """
    stem, _, suffix = name.partition(".")
    stored = f"{stem}-{digest[:_DIGEST_CHARS]}.{suffix}"
    if not _OURS.fullmatch(stored):
        raise ValueError(f"payload name {name!r} is not <stem>.<suffix> of letters, digits and _")
    return stored


class DirectoryWriter:
    """Writes payloads into a directory and commits them with a manifest; without a commit nothing changes.

    Use as a context manager. One writer a directory at a time: a second one raises MachineError.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._written: list[Path] = []
        self._created: list[Path] = []
        self._committed = False
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            missing = [p for p in (self.directory, *self.directory.parents) if not p.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            self._created = missing
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock), self.directory.stat()):
                # A writer that gave up removed the directory that it had made, between our opening and our lock.
                raise BlockingIOError
        except BlockingIOError as error:
            self._unlock()
            raise MachineError(
                f"{self.directory}: another process is writing there", hint="wait for it, or name another directory"
            ) from error
        except OSError as error:
            self._unlock()
            raise from_os_error(error, doing=f"creating {self.directory}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            for path in self._written:
                path.unlink(missing_ok=True)
            for directory in self._created:
                try:
                    directory.rmdir()
                except OSError:  # someone else's files are in there by now: theirs to keep
                    break
        self._unlock()

    def add(self, name: str, content: bytes) -> Payload:
        """Store bytes as `<stem>-<digest><suffix>`, synced."""
        digest = hashlib.sha256(content).hexdigest()
        return self._store(name, digest, lambda path: _write_synced(path, content), stem_digest=digest)

    def add_file(self, name: str, source: Path) -> Payload:
        """Store a copy of a file the same way, without holding it in memory."""
        digest = _digest_of(source)
        return self._store(name, digest, _copier(source), stem_digest=digest)

    def add_together(self, stem: str, sources: Sequence[Path]) -> list[Payload]:
        """Store copies of files that find each other by their stem, one for all of them, with a digest of all."""
        digests = [_digest_of(source) for source in sources]
        shared = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return [
            self._store(f"{stem}{source.suffix}", digest, _copier(source), stem_digest=shared)
            for source, digest in zip(sources, digests, strict=True)
        ]

    def commit(self, manifest: M) -> M:
        """Make `manifest` and its payloads what the directory holds, and collect what it held before."""
        manifest = manifest.sealed()
        path, text = self.directory / manifest.file_name, manifest.to_json()
        # An interrupt may arrive after the replacement: from here on what the disk holds decides, and until that is
        # known no payload may be removed.
        self._committed = True
        try:
            write_json(path, text)
        except BaseException:
            self._committed = path.is_file() and path.read_bytes() == text.encode()
            raise
        self._collect(keep={payload.path for payload in manifest.files.values()}, manifest=path)
        return manifest.located_at(self.directory)

    def _store(self, name: str, digest: str, write: Callable[[Path], None], *, stem_digest: str) -> Payload:
        path = self.directory / payload_name(name, stem_digest)
        temporary = self.directory / f"{_TEMPORARY}{path.name}"
        try:
            if not (path.exists() and sha256_of(path) == digest):
                write(temporary)
                os.replace(temporary, path)
                self._written.append(path)
                _sync_directory(self.directory)
            return Payload(path=path.name, sha256=digest, bytes=path.stat().st_size)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise from_os_error(error, doing=f"writing {path}") from error

    def _collect(self, *, keep: set[str], manifest: Path) -> None:
        entries = list(self.directory.iterdir())
        # `dlops bench DIR --out DIR` writes a report beside an artifact, whose model must not go for it.
        others = [_named_by(entry) for entry in entries if entry.suffix == ".json" and entry != manifest]
        if None in others:
            return
        keep = keep.union(*(names for names in others if names is not None))
        for entry in entries:
            ours = _OURS.fullmatch(entry.name) or entry.name.startswith(_TEMPORARY)
            if ours and entry.name not in keep and entry.is_file():
                entry.unlink(missing_ok=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_writable(folder: Path, *, what: str) -> None:
    """That it is a folder to write in, or could be made. what: is to be there, for the message.

    Raises UsageError where something else is in its place, MachineError without the permission.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"{what} {folder}: {there} is no folder", hint="name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise MachineError(f"{what} {folder}: permission denied: {there}", hint="name another folder")


def write_json(path: Path, text: str) -> None:
    """Replace one file whole: the old text or the new, never half of one."""
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(temporary, text.encode())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise from_os_error(error, doing=f"writing {path}") from error
    finally:
        # Gone where it became `path`, and absent where its folder could not be made.
        with suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def write_copy(path: Path, text: str) -> None:
    """Write a file that the user named: whole as `write_json` does, through a link into what it points to, and straight
    into a device or a pipe, which must stay what it is."""
    target = path.resolve()
    if not target.exists() or target.is_file():
        write_json(target, text)
        return
    try:
        with target.open("w") as stream:
            stream.write(text)
    except OSError as error:
        raise from_os_error(error, doing=f"writing {path}") from error


def _named_by(path: Path) -> set[str] | None:
    """The payloads that a manifest of the folder names, none where it is no manifest, None where it is damaged."""
    if path.name.startswith(_TEMPORARY) or _OURS.fullmatch(path.name) or not path.is_file():
        return set()
    try:
        document = json.loads(path.read_bytes())
        return {payload["path"] for payload in document["files"].values()} if "files" in document else set()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _digest_of(source: Path) -> str:
    try:
        return sha256_of(source)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {source}") from error


def _copier(source: Path) -> Callable[[Path], None]:
    def copy(path: Path) -> None:
        shutil.copyfile(source, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())

    return copy


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
