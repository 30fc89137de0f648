"""What one model file says of itself, for a person and for a machine, where the folder that it came in is not there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dlops.embedded import Embedded, read_embedded
from dlops.errors import from_os_error
from dlops.facts import labels_text, preprocess_lines, signature_lines, size_text
from dlops.manifest import Record, sha256_of
from dlops.model_file import ModelFormat

if TYPE_CHECKING:
    from rich.console import RenderableType


class FileDescription(Record):
    """format: found by the content. bytes, sha256: of the file, weights in another not counted.

    embedded: what it says of itself.
    """

    path: str
    format: ModelFormat
    bytes: int
    sha256: str
    embedded: Embedded

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, by_alias=True)

    def render(self) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        said = self.embedded
        facts = {
            "Model": {
                "version": said.version,
                "variant": said.variant,
                "task": said.task,
                "labels": labels_text(said.labels),
            },
            "Signature": signature_lines(said.signature),
            "Preprocessing": preprocess_lines(said.preprocess),
            "Provenance": {
                "checkpoint": f"manifest SHA-256 {said.checkpoint_sha256[:16]}…",
                "made by": f"dlops {said.dlops_version}",
            },
            "File": {"format": self.format, "size": size_text(self.bytes), "SHA-256": f"{self.sha256[:16]}…"},
        }
        parts: list[RenderableType] = [
            Text.assemble((f"model file of {said.name}/{said.variant}", "bold"), f"\n{self.path}\n"),
            Text("Its own word for it: no manifest beside it was checked."),
        ]
        for heading, lines in facts.items():
            table = Table(show_header=False, title=heading, title_justify="left")
            for name, value in lines.items():
                table.add_row(Text(name), Text(value))
            parts.append(table)
        return Group(*parts)


def is_model_file(path: Path) -> bool:
    """Whether it is a file that is not one of our manifests by its name."""
    return path.is_file() and path.suffix != ".json"


def describe_file(path: Path | str) -> FileDescription:
    """What an ONNX, OpenVINO or TorchScript file says of itself; no framework is needed, and nothing in it is run.

    Raises UsageError where it says nothing, CorruptError where it is no such file.
    """
    path = Path(path)
    form, embedded = read_embedded(path)
    try:
        return FileDescription(
            path=str(path), format=form, bytes=path.stat().st_size, sha256=sha256_of(path), embedded=embedded
        )
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
