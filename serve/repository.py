"""What there is to serve: artifacts under the names and versions that folders give them.

models/digits/2        version 2 of `digits`: a folder whose name is a whole number is a version of the one above it
models/…/onnx-int8     any other that is found in a folder: `<artifact's name>-<variant>`, version 1
one that is named      its own name and version; `<name>-<variant>` where another one has the same
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlops.artifact import Artifact, newest_artifact, open_artifact
from dlops.checkpoint import NAME_PATTERN
from dlops.errors import UsageError
from dlops.manifest import Record, Sha256, read_manifest

_STORE = "bentoml:"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_FIRST = "1"


class Entry(Record):
    """An artifact and what it is called here. sha256: its manifest's, by which a changed one is told from the same."""

    name: str
    version: str
    directory: Path
    sha256: Sha256

    @property
    def title(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """What stands where an artifact should, and cannot be read."""

    name: str
    version: str
    reason: str


class Repository:
    """Artifacts and folders of artifacts; looked at anew at each call.

    sources: folders, or `bentoml:<tag>` for an artifact in BentoML's model store; none for the newest under
    ./artifacts. versions: how many of a model's newest numbered ones in a folder count, None for all of them.
    """

    def __init__(self, sources: Sequence[str | Path] = (), *, versions: int | None = 1) -> None:
        self._sources = tuple(sources)
        self._versions = versions

    def entries(self) -> tuple[Entry, ...]:
        """All that there is, by name and version; the first is the one that was named first. Files are not checked.

        Raises UsageError where there is none, one cannot be read, or two have the same name and version.
        """
        found, damaged = self._scan()
        if damaged:
            raise UsageError(damaged[0].reason)
        return found

    def readable(self) -> tuple[tuple[Entry, ...], tuple[Damaged, ...]]:
        """As `entries`, and beside them what cannot be read."""
        return self._scan()

    def _scan(self) -> tuple[tuple[Entry, ...], tuple[Damaged, ...]]:
        if not self._sources:
            artifact = newest_artifact()
            return (entry_of(artifact),), ()
        named: list[Artifact] = []
        entries: list[Entry] = []
        damaged: list[Damaged] = []
        for source in self._sources:
            folder = _folder(source)
            if _is_repository(folder):
                found, wrong = self._folder_entries(folder)
                entries += found
                damaged += wrong
            else:
                named.append(read_manifest(folder, Artifact, verify=False))
        entries = [*_called(named), *entries]
        twice = [key for key, count in Counter((entry.name, entry.version) for entry in entries).items() if count > 1]
        if twice:
            name, version = twice[0]
            where = [str(entry.directory) for entry in entries if (entry.name, entry.version) == twice[0]]
            raise UsageError(
                f"{' and '.join(where)} are both version {version} of {name}",
                hint="put them into folders as NAME/VERSION, models/digits/2 say",
            )
        return tuple(entries), tuple(damaged)

    def _folder_entries(self, root: Path) -> tuple[list[Entry], list[Damaged]]:
        entries: list[Entry] = []
        damaged: list[Damaged] = []
        by_model: dict[str, list[tuple[int, Path]]] = {}
        for folder in _folders_with(Artifact.file_name, root):
            numbered = _numbered(folder)
            if numbered is not None:
                by_model.setdefault(numbered[0], []).append((int(numbered[1]), folder))
                continue
            try:
                artifact = read_manifest(folder, Artifact, verify=False)
            except UsageError as error:
                damaged.append(Damaged(name=folder.name, version=_FIRST, reason=str(error)))
            else:
                entries.append(entry_of(artifact, f"{artifact.name}-{artifact.slug}", _FIRST))
        for name, folders in sorted(by_model.items()):
            for number, folder in sorted(folders, reverse=True)[: self._versions]:
                try:
                    artifact = read_manifest(folder, Artifact, verify=False)
                except UsageError as error:
                    damaged.append(Damaged(name=name, version=str(number), reason=str(error)))
                else:
                    entries.append(entry_of(artifact, name, str(number)))
        if not entries and not damaged:
            # Which says what the folder is instead, where that can be told.
            open_artifact(root)
        return entries, damaged


def newest_first(versions: Iterable[str]) -> list[str]:
    """Numbers by their value, then whatever else a version may be called."""
    return sorted(versions, key=lambda version: (_VERSION.fullmatch(version) is not None, len(version), version))[::-1]


def _called(named: Sequence[Artifact]) -> Iterator[Entry]:
    names = [_numbered(artifact.directory) or (artifact.name, artifact.version) for artifact in named]
    counts = Counter(names)
    for artifact, (name, version) in zip(named, names, strict=True):
        yield entry_of(artifact, name if counts[name, version] == 1 else f"{name}-{artifact.slug}", version)


def entry_of(artifact: Artifact, name: str | None = None, version: str | None = None) -> Entry:
    """An artifact that was read or written, under its own name and version where they are left out."""
    return Entry(
        name=artifact.name if name is None else name,
        version=artifact.version if version is None else version,
        directory=artifact.directory.resolve(),
        sha256=artifact.sha256 or artifact.sealed().sha256,
    )


def _numbered(folder: Path) -> tuple[str, str] | None:
    """Model and version of models/digits/2, which may be links: what they are called counts."""
    folder = Path(_unresolved(folder))
    if _VERSION.fullmatch(folder.name) and re.fullmatch(NAME_PATTERN, folder.parent.name):
        return folder.parent.name, folder.name
    return None


def _unresolved(path: str | Path) -> str:
    """From the root, its links as they are: a folder is called what its link is."""
    return os.path.abspath(path)  # noqa: PTH100 - Path.resolve follows links, Path.absolute leaves ".." in


def _folders_with(name: str, root: Path) -> list[Path]:
    """Sorted; links to folders are followed, each folder on the way down once."""
    found = []
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder)
        if name in files:
            found.append(here)
        # A link to a folder above would lead round and round.
        above = {os.path.realpath(one) for one in (here, *here.parents)}
        below[:] = [one for one in below if os.path.realpath(here / one) not in above]
    return sorted(found)


def _is_repository(folder: Path) -> bool:
    return folder.is_dir() and not (folder / Artifact.file_name).exists()


def absolute(sources: Iterable[str | Path]) -> tuple[str, ...]:
    """The same, whatever folder they are read in."""
    return tuple(str(one) if _is_tag(one) else _unresolved(one) for one in sources)


def _is_tag(source: str | Path) -> bool:
    return str(source).startswith(_STORE)


def _folder(source: str | Path) -> Path:
    if not _is_tag(source):
        path = Path(source)
        return path.parent if path.name == Artifact.file_name else path
    import bentoml
    from bentoml.exceptions import BentoMLException

    tag = str(source).removeprefix(_STORE)
    try:
        return Path(bentoml.models.get(tag).path)
    except BentoMLException as error:
        raise UsageError(f"{tag}: not in BentoML's model store ({error})", hint="bentoml models list") from None


def open_entry(entry: Entry) -> Artifact:
    """The entry's artifact, its digests checked. Raises CorruptError, UsageError where it is no longer what it was."""
    artifact = open_artifact(entry.directory)
    if artifact.sha256 != entry.sha256:
        raise UsageError(f"{entry.directory}: another artifact than a moment ago", hint="load it again")
    return artifact
