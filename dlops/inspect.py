"""What a folder holds, said for a person and for a machine: one checkpoint, artifact or report, or all under a root."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import CorruptError, DlopsError, UsageError
from dlops.facts import facts_of, moment_text, size_text, summary_of, title_of
from dlops.manifest import Manifest, Record, check_payload, read_manifest
from dlops.report import Report

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = Literal["checkpoint", "artifact", "report"]
KINDS: Mapping[Kind, type[Checkpoint] | type[Artifact] | type[Report]] = {
    "checkpoint": Checkpoint,
    "artifact": Artifact,
    "report": Report,
}
# Where the commands put each kind, below the working folder.
FOLDERS: Mapping[Kind, str] = {"checkpoint": "runs", "artifact": "artifacts", "report": "reports"}


class FileState(Record):
    """One payload. problem: what is wrong with it, null where its size and SHA-256 are the manifest's."""

    role: str
    path: str
    bytes: int
    sha256: str
    problem: str | None


class Description(Record):
    """What a folder holds. facts: the manifest's content by heading, each line under its name."""

    kind: Kind
    title: str
    directory: str
    created: datetime
    facts: dict[str, dict[str, str]]
    files: tuple[FileState, ...]
    manifest: dict[str, JsonValue]

    @property
    def is_whole(self) -> bool:
        """Whether every file is the one that the manifest names."""
        return all(file.problem is None for file in self.files)

    def to_json(self) -> str:
        """kind, directory, the files with what is wrong with them, and the manifest as it is on disk."""
        return self.model_dump_json(indent=2, exclude={"facts"})

    def check(self) -> None:
        """Raise CorruptError naming every file that is not what the manifest says."""
        problems = [state.problem for state in self.files if state.problem is not None]
        if problems:
            raise CorruptError("; ".join(problems), hint="copy the whole directory again, or make it again")

    def render(self) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [
            Text.assemble(
                (f"{self.kind} {self.title}", "bold"), f"\n{self.directory}\nmade {moment_text(self.created)}"
            )
        ]
        for heading, lines in self.facts.items():
            table = Table(show_header=False, title=heading, title_justify="left")
            for name, value in lines.items():
                table.add_row(Text(name), Text(value))
            parts.append(table)
        files = Table("role", "file", "size", "SHA-256", title="Files", title_justify="left")
        for file in self.files:
            state = Text(file.problem, "bold red") if file.problem else Text(f"{file.sha256[:16]}… matches", "green")
            files.add_row(Text(file.role), Text(file.path), Text(size_text(file.bytes)), state)
        return Group(*parts, files)


class Entry(Record):
    """One folder of a listing. summary: a few words on it. problem: why it cannot be used, null where it can."""

    kind: Kind
    path: str
    title: str
    created: datetime | None
    bytes: int
    summary: str
    problem: str | None = None


class Listing(Record):
    """All that lies under `root`, newest first, the damaged ones after those."""

    root: str
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    def render(self) -> RenderableType:
        """For a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        if not self.entries:
            return Text(f"No checkpoints, artifacts or reports under {self.root}. Make some: dlops quickstart")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("made", no_wrap=True)
        # A path is there to be copied: it is folded where it must be, never cut.
        table.add_column("folder", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        for entry in self.entries:
            what = Text(entry.problem, "bold red") if entry.problem else Text(entry.summary)
            made = entry.created.astimezone().strftime("%m-%d %H:%M") if entry.created else "?"
            size = size_text(entry.bytes) if entry.created else "?"
            # An artifact's folder is its title already.
            named = Text("" if entry.kind == "artifact" else f"{entry.title}: ")
            table.add_row(made, Text(entry.path), size, named + what)
        return table


def describe(path: Path | str) -> Description:
    """What the folder (or its manifest file) is, every file's digest checked.

    A damaged file is reported in `files`, not raised. Raises UsageError where there is no manifest, CorruptError where
    it cannot be read.
    """
    path = Path(path)
    kind, directory = _kind_of(path)
    manifest = read_manifest(directory, KINDS[kind], verify=False)
    return Description(
        kind=kind,
        title=title_of(manifest),
        directory=str(directory),
        created=manifest.created,
        facts=facts_of(manifest),
        files=tuple(_file_state(manifest, role) for role in manifest.files),
        manifest=manifest.model_dump(mode="json", by_alias=True),
    )


def list_all(root: Path | str = ".") -> Listing:
    """The checkpoints under runs/, artifacts under artifacts/ and reports under reports/ of `root`.

    A damaged one is named with the reason: its manifest cannot be read, or a file is missing or of another size.
    Digests are left to `describe`. Raises UsageError where `root` is not a directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: not a directory", hint="name the working folder, which has runs/ and artifacts/")
    entries = [
        _entry(kind, path.parent, root)
        for kind, folder in FOLDERS.items()
        for path in sorted((root / folder).rglob(KINDS[kind].file_name))
    ]
    entries.sort(key=lambda entry: entry.created.timestamp() if entry.created else 0.0, reverse=True)
    return Listing(root=str(root.resolve()), entries=tuple(entries))


def _kind_of(path: Path) -> tuple[Kind, Path]:
    found: list[Kind] = []
    for kind, type_ in KINDS.items():
        if path.name == type_.file_name and path.is_file():
            return kind, path.parent
        if (path / type_.file_name).is_file():
            found.append(kind)
    if not found:
        problem = "no checkpoint, artifact or report there" if path.exists() else "no such file or directory"
        raise UsageError(f"{path}: {problem}", hint="dlops list shows what there is under the working folder")
    if len(found) > 1:
        raise UsageError(
            f"{path}: a {' and a '.join(found)} in one folder",
            hint=f"name the file: {path / KINDS[found[0]].file_name}, say",
        )
    return found[0], path


def _file_state(manifest: Manifest, role: str) -> FileState:
    payload = manifest.files[role]
    problem = None
    try:
        check_payload(manifest.path(role), payload, role=role)
    except DlopsError as error:
        problem = error.message
    return FileState(role=role, path=payload.path, bytes=payload.bytes, sha256=payload.sha256, problem=problem)


def _entry(kind: Kind, directory: Path, root: Path) -> Entry:
    path = str(directory.relative_to(root))
    try:
        manifest = read_manifest(directory, KINDS[kind], verify=False)
    except DlopsError as error:
        return Entry(
            kind=kind, path=path, title=directory.name, created=None, bytes=0, summary="", problem=error.message
        )
    size = sum(payload.bytes for payload in manifest.files.values())
    return Entry(
        kind=kind, path=path, title=title_of(manifest), created=manifest.created, bytes=size,
        summary=summary_of(manifest), problem=_quick_problem(manifest),
    )  # fmt: skip


def _quick_problem(manifest: Manifest) -> str | None:
    """What a look at names and sizes finds wrong, without reading gigabytes."""
    for role, payload in manifest.files.items():
        path = manifest.path(role)
        if not path.is_file():
            return f"{payload.path}: the {role} file is missing"
        if path.stat().st_size != payload.bytes:
            return f"{payload.path}: {path.stat().st_size} bytes where the manifest says {payload.bytes}"
    return None
