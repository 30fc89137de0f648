"""Manifests: what a directory of ours holds, read back with every digest checked.

A manifest names its payload files with their SHA-256 and holds the SHA-256 of its own content too. A reader checks all
of them before it hands a path out: that finds damage and alteration, and proves nothing about who wrote it. How a
directory is written is in `dlops.directory`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, ValidationError

from dlops.console import say
from dlops.errors import CorruptError, UsageError, from_os_error

# Manifests hold names, numbers and digests; one of this size is not ours.
MAX_MANIFEST_BYTES = 16 * 1024 * 1024

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A frozen, closed JSON object. Infinity and NaN are written as strings, which JSON has and floats read back."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings")


class Payload(Record):
    """One file beside a manifest."""

    path: FileName
    """A bare file name."""
    sha256: Sha256
    """Of its content."""
    bytes: int = Field(ge=0)
    """Its size."""


class Manifest(Record):
    """A record with a schema number and a directory of its own.

    A subclass sets `file_name`, `newest_schema` and the roles that `files` must have, and declares
    `kind: Literal[...]` and `schema_version`.
    """

    file_name: ClassVar[str]
    newest_schema: ClassVar[int] = 1
    required_roles: ClassVar[tuple[str, ...]] = ()

    kind: str
    """What the manifest is of."""
    schema_version: int = Field(alias="schema", ge=1)
    """[number] Of the schema."""
    sha256: Sha256 | None = None
    """Of the rest of the manifest: its JSON with sorted keys, without spaces and in ASCII; null until it is written."""
    created: AwareDatetime
    """With its time zone; "newest" goes by it."""
    files: dict[str, Payload] = {}
    """The files beside it, by role."""

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
    clauses = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        # What is said of several fields together names them itself.
        said = problem["msg"].removeprefix("Value error, ")
        alone = not place and problem["type"] == "value_error"
        clauses.append(said if alone else f"{place or 'document'}: {_uncapital(said)}")
    return "; ".join(clauses)


def _uncapital(text: str) -> str:
    """Its first letter small: what follows may be a pattern, or somebody's own words."""
    return text[:1].lower() + text[1:]


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
            raise CorruptError(f"{path}: {path.stat().st_size} bytes is too large for {_a(what)}")
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        is_address = not directory.exists() and re.fullmatch(r"[\w.-]+:\d+(/.*)?", str(directory)) is not None
        hint = f"a server is named http://{directory}" if is_address else f"dlops list shows each {what} at hand"
        raise UsageError(f"{directory}: no {kind.file_name} there", hint=hint) from None
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
        raise CorruptError(f"{path}: not {_a(what)} that dlops wrote: {explain_validation(error)}") from None
    if manifest.sha256 != _digest(document):
        raise CorruptError(
            f"{path}: its SHA-256 is not that of its content: altered since it was written",
            hint="copy the whole directory again, or make it again",
        )
    missing = [role for role in kind.required_roles if role not in manifest.files]
    if missing:
        raise CorruptError(f"{path}: not {_a(what)} that dlops wrote: it names no {' and no '.join(missing)} file")
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
        raise CorruptError(f"{path}: not {_a(what)} that dlops wrote: {'; '.join(wrong)}")


def _a(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


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
