"""What every exporter is given, gives back and must hold: one request, one file, nothing of this machine in it."""

from __future__ import annotations

import mmap
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from dlops.artifact import Variant
from dlops.embedded import Embedded, read_embedded
from dlops.errors import GateError
from dlops.runtimes.session import Device
from dlops.signature import Feed, Signature

if TYPE_CHECKING:
    from torch import nn

    from dlops.export.raw_inputs import RawInputs

# How static int8 chooses the range of an activation.
Calibration = Literal["minmax", "entropy", "percentile"]
CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "entropy", "percentile")
# How far from the asked fraction of the MACs a pruned model may be: widths are whole blocks.
PRUNING_TOLERANCE = 0.02
# Of recovery, in seconds, where nothing else was said; where it is not reached the same seed gives the same weights.
BUDGET_S = 600.0
# The batch that graphs are captured with: 1 would be taken for a constant, and so might a size of the network.
EXAMPLE_BATCH = 3
# One folder name says nothing ("/app"), and would be found by chance among the weights.
_MIN_PATH_BYTES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """module: in eval mode, on the CPU. into: the file to write.

    calibration: input tensors, for int8 alone. calibration_method: how the ranges of activations come from them.

    excluded: names of the nodes that stay in fp32, for int8 alone.

    captured: what exporting this very module gave before, kept by the exporter for its next variant of it.
    embedded: what the file shall say of itself, null where nothing.
    raw: with preprocessing and probabilities around the module, whose own signature `signature` stays.
    device: where it will run, for formats that are compiled.
    """

    module: nn.Module
    signature: Signature
    variant: Variant
    into: Path
    title: str
    calibration: Feed | None = None
    calibration_method: Calibration = "minmax"
    excluded: tuple[str, ...] = ()
    captured: dict[str, Any] = field(default_factory=dict)
    embedded: Embedded | None = None
    raw: RawInputs | None = None
    device: Device = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """notes: what one should know about the file, for its provenance.

    extra: by role ("weights", of `dlops.artifact.MODEL_ROLES`) what `path` cannot be opened without, in the same
    folder. It becomes a payload of the artifact, `<role>-<digest><suffix>`: where `path` holds its name, it must bear
    that one already (`dlops.directory.payload_name`). together: they are found by the stem of `path` instead, and keep
    one for all of them. source: where weights cannot be read in `path`, the graph that it was compiled from, in the
    same folder; it is no part of the artifact.
    """

    path: Path
    extra: Mapping[str, Path] = field(default_factory=dict)
    together: bool = False
    source: Path | None = None
    notes: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """By the role that each has in an artifact."""
        return {"model": self.path, **self.extra}


def check_embedded(request: ExportRequest) -> None:
    """Raise GateError unless the written file says of itself what was asked for."""
    if request.embedded is not None and read_embedded(request.into)[1] != request.embedded:
        raise GateError(f"{request.title}: the written file says something else of itself than was asked for")


def check_no_machine_paths(path: Path, *, title: str) -> None:
    """Raise GateError where a file (or a member of a zip file) holds an absolute path of this machine."""
    needles = machine_paths()
    for member, content in _contents(path):
        for needle in needles:
            if content.find(needle) >= 0:
                raise GateError(
                    f"{title}: {path.name}{member} holds the path {needle.decode(errors='replace')!r} of this machine",
                    hint="this is a defect of the exporter: report it with the model's type and the variant",
                )


def portable_argument(argument: str) -> str:
    """A command's argument without the building machine's folders: relative to here, or the bare name."""
    option, separator, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    here = Path.cwd()
    return f"{option}{separator}{path.relative_to(here) if path.is_relative_to(here) else path.name}"


def machine_paths() -> list[bytes]:
    """What no file that leaves here may hold, each with a slash at its end."""
    import dlops

    folders = {Path.home(), Path.cwd(), Path(sys.prefix), Path(sys.base_prefix), Path(tempfile.gettempdir())}
    folders |= {Path(__file__).resolve().parents[1], Path(dlops.__file__).resolve().parents[1]}
    texts = {f"{folder}/" for folder in folders if folder != Path(folder.anchor)}
    return sorted({text.encode() for text in texts if len(text) >= _MIN_PATH_BYTES} | {b"site-packages/"})


def _contents(path: Path) -> Iterator[tuple[str, bytes | mmap.mmap]]:
    if not zipfile.is_zipfile(path):
        # Mapped: a file of weights may be larger than what is left of the memory. An empty one cannot be.
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield "", content
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            yield f":{entry.filename}", entry.filename.encode() + archive.read(entry)
