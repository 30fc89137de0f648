"""Directories that are whole or absent: payload files named by digest, committed by one manifest.

A writer puts payloads beside the manifest under names that hold their SHA-256, syncs them, and then replaces the
manifest in one `os.replace`. A kill at any moment leaves the old directory or the new one; what the kill left behind is
collected by the next commit. A manifest holds the SHA-256 of its own content too. A reader checks every digest before
it hands a path out: that finds damage and alteration, and proves nothing about who wrote it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError

from dlops.console import say
from dlops.errors import CorruptError, MachineError, UsageError, from_os_error

# Manifests hold names, numbers and digests; one of this size is not ours.
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_DIGEST_CHARS = 16
_OURS = re.compile(rf"^[A-Za-z0-9_]+-[0-9a-f]{{{_DIGEST_CHARS}}}(\.[A-Za-z0-9]+)+$")
_TEMPORARY = ".dlops-tmp-"

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A frozen, closed JSON object. Infinity and NaN are written as strings, which JSON has and floats read back."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings")


class Payload(Record):
    """One file beside a manifest. path: a bare file name. bytes: its size."""

    path: FileName
    sha256: Sha256
    bytes: int = Field(ge=0)


class Manifest(Record):
    """A record with a schema number and a directory of its own.

    A subclass sets `file_name`, `newest_schema` and the roles that `files` must have, and declares
    `kind: Literal[...]` and `schema_version`. created: with its time zone; "newest" goes by it. sha256: of the rest of
    the manifest (see `_digest`), null until it is written.
    """

    file_name: ClassVar[str]
    newest_schema: ClassVar[int] = 1
    required_roles: ClassVar[tuple[str, ...]] = ()

    kind: str
    schema_version: int = Field(alias="schema", ge=1)
    sha256: Sha256 | None = None
    created: AwareDatetime
    files: dict[str, Payload] = {}

    model_config = ConfigDict(populate_by_name=True)
    _directory: Path | None = PrivateAttr(None)

    @property
    def directory(self) -> Path:
        """Where the manifest was read from or written to."""
        if self._directory is None:
            raise ValueError(f"this {self.kind} has not been written to a directory")
        return self._directory

    def path(self, role: str) -> Path:
        """The payload file of that role. Raises CorruptError where the manifest names none."""
        if role not in self.files:
            raise CorruptError(
                f"{self.directory / self.file_name}: it names no {role} file",
                hint=f"it has {', '.join(sorted(self.files)) or 'no files at all'}",
            )
        return self.directory / self.files[role].path

    def located_at(self, directory: Path) -> Self:
        copy = self.model_copy()
        copy._directory = directory
        return copy

    def sealed(self) -> Self:
        """The same with the SHA-256 of its content."""
        return self.model_copy(update={"sha256": _digest(_load_json(self._text().encode()))})

    def to_json(self) -> str:
        """The file's text, sealed."""
        return self.sealed()._text()

    def _text(self) -> str:
        return self.model_dump_json(indent=2, by_alias=True) + "\n"


M = TypeVar("M", bound=Manifest)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path, kind: type[M], *, verify: bool = True) -> M:
    """The manifest in `directory`, its payloads' digests checked.

    Raises UsageError where there is none, CorruptError where it is truncated, altered, foreign, newer than this version
    reads, or where a payload is missing or altered.
    """
    manifest = _parse(directory, kind)
    while verify:
        try:
            _check_payloads(manifest)
        except CorruptError:
            # A writer may have replaced the manifest and collected its payloads since it was read: then the new pair
            # is what there is to check.
            latest = _parse(directory, kind)
            if latest == manifest:
                raise
            manifest = latest
        else:
            break
    return manifest


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
        return self._store(name, hashlib.sha256(content).hexdigest(), lambda path: _write_synced(path, content))

    def add_file(self, name: str, source: Path) -> Payload:
        """Store a copy of a file the same way, without holding it in memory."""

        def copy(path: Path) -> None:
            shutil.copyfile(source, path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())

        try:
            digest = sha256_of(source)
        except OSError as error:
            raise from_os_error(error, doing=f"reading {source}") from error
        return self._store(name, digest, copy)

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
        self._collect(keep={payload.path for payload in manifest.files.values()})
        return manifest.located_at(self.directory)

    def _store(self, name: str, digest: str, write: Callable[[Path], None]) -> Payload:
        stem, _, suffix = name.partition(".")
        file_name = f"{stem}-{digest[:_DIGEST_CHARS]}.{suffix}"
        if not _OURS.fullmatch(file_name):
            raise ValueError(f"payload name {name!r} is not <stem>.<suffix> of letters, digits and _")
        path = self.directory / file_name
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

    def _collect(self, *, keep: set[str]) -> None:
        for entry in self.directory.iterdir():
            ours = _OURS.fullmatch(entry.name) or entry.name.startswith(_TEMPORARY)
            if ours and entry.name not in keep and entry.is_file():
                entry.unlink(missing_ok=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def find_manifests(root: Path, kind: type[M]) -> list[M]:
    """Every readable manifest of that kind under `root`, newest by `created` first; payloads are not checked."""
    return _scan(root, kind)[0]


def newest_manifest(root: Path, kind: type[M], *, make_one: str) -> M:
    """The manifest of that kind under `root` with the latest `created`, its digests checked.

    One that cannot be read is named on stderr: it may have been the newest. Raises UsageError where none is left, with
    `make_one` as the hint.
    """
    found, damaged = _scan(root, kind)
    what = kind.file_name.removesuffix(".json")
    if not found:
        if damaged:
            raise CorruptError(
                f"no {what} under {root.resolve()} can be read ({len(damaged)} there); the first: {damaged[0]}",
                hint="dlops list names each with the reason",
            )
        raise UsageError(f"no {what} under {root.resolve()}", hint=make_one)
    for message in damaged:
        say(f"passed over: {message}")
    return read_manifest(found[0].directory, kind)


def explain_validation(error: ValidationError) -> str:
    """All that is wrong with a record, one clause each, without pydantic's decoration."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {problem['msg'].lower()}"
        for problem in error.errors(include_url=False)
    )


def _scan(root: Path, kind: type[M]) -> tuple[list[M], list[str]]:
    """The manifests under `root`, newest first, and what is wrong with those that cannot be read."""
    found: list[M] = []
    damaged: list[str] = []
    for path in sorted(root.rglob(kind.file_name)) if root.is_dir() else []:
        try:
            found.append(read_manifest(path.parent, kind, verify=False))
        except UsageError as error:
            damaged.append(error.message)
    return sorted(found, key=lambda manifest: manifest.created.timestamp(), reverse=True), damaged


def _parse(directory: Path, kind: type[M]) -> M:
    path = directory / kind.file_name
    what = kind.file_name.removesuffix(".json")
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CorruptError(f"{path}: {path.stat().st_size} bytes is too large for a {what}")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{directory}: no {kind.file_name} there", hint="dlops list shows the checkpoints and artifacts at hand"
        ) from None
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    try:
        document = _load_json(text)
    except ValueError as error:
        raise CorruptError(f"{path}: {error}", hint="write it again from its source") from None
    _check_envelope(document, kind, path)
    try:
        manifest = kind.model_validate_json(text)
    except ValidationError as error:
        raise CorruptError(f"{path}: not a {what} that dlops wrote: {explain_validation(error)}") from None
    if manifest.sha256 != _digest(document):
        raise CorruptError(
            f"{path}: its SHA-256 is not that of its content: altered since it was written",
            hint="copy the whole directory again, or make it again",
        )
    missing = [role for role in kind.required_roles if role not in manifest.files]
    if missing:
        raise CorruptError(f"{path}: not a {what} that dlops wrote: it names no {' and no '.join(missing)} file")
    return manifest.located_at(directory)


def _check_envelope(document: dict[str, Any], kind: type[Manifest], path: Path) -> None:
    """Raise CorruptError unless the keys that every manifest has are there and the schema is one that we read."""
    what = kind.file_name.removesuffix(".json")
    # Read by its alias alone: a second spelling would be a way around the check of the schema below.
    wrong = [f"{key} is missing" for key in ("kind", "schema", "sha256") if key not in document]
    wrong += ["schema_version is unknown"] if "schema_version" in document else []
    schema = document.get("schema")
    if "schema" in document and (not isinstance(schema, int) or isinstance(schema, bool)):
        wrong.append(f"schema is {schema!r}, not a whole number")
    elif schema is not None and schema > kind.newest_schema:
        # Said before anything else is held against it: a newer manifest may well look different.
        raise CorruptError(
            f"{path}: schema {schema} is newer than this dlops reads ({kind.newest_schema})",
            hint=f"it was written by dlops {_writing_version(document)}: upgrade to that",
        )
    if wrong:
        raise CorruptError(f"{path}: not a {what} that dlops wrote: {'; '.join(wrong)}")


def _digest(document: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content: its JSON without `sha256`, keys sorted, no spaces, ASCII only.

    So neither spaces nor the order of keys matter, only what is said.
    """
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _writing_version(document: dict[str, Any]) -> str:
    """The version that a manifest says wrote it: at its top, or in an artifact's provenance."""
    provenance = document.get("provenance")
    inner = provenance.get("dlops_version") if isinstance(provenance, dict) else None
    return str(document.get("dlops_version") or inner or "of a later version")


def _load_json(text: bytes) -> dict[str, Any]:
    """The object in a manifest's text. Raises ValueError for anything else."""
    from pydantic_core import from_json

    try:
        document = from_json(text)
    except ValueError as error:
        raise ValueError(f"truncated or not JSON ({error})") from None
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def _check_payloads(manifest: Manifest) -> None:
    for role, payload in manifest.files.items():
        check_payload(manifest.path(role), payload, role=role)


def check_payload(path: Path, payload: Payload, *, role: str) -> None:
    """Raise CorruptError unless the file at `path` is the payload that a manifest says."""
    try:
        # A link inside the directory is fine; one that leads out would let a stranger's artifact name our files.
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise CorruptError(f"{path}: the {role} file is a link out of the directory", hint="copy the file itself")
        if not path.is_file():
            raise FileNotFoundError
        size = path.stat().st_size
        if size != payload.bytes:
            raise CorruptError(f"{path}: {size} bytes where the manifest says {payload.bytes}: truncated or replaced")
        if sha256_of(path) != payload.sha256:
            raise CorruptError(f"{path}: SHA-256 differs from the manifest's: altered since it was written")
    except FileNotFoundError:
        raise CorruptError(
            f"{path}: the {role} file is missing", hint="copy the whole directory, or make it again"
        ) from None
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error


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
