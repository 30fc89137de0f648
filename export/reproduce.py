"""An artifact made again from what its reproduce.json says, and compared with it byte by byte."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dlops.artifact import MODEL_ROLES, Artifact, open_artifact
from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.console import say
from dlops.embedded import PREFIX, RT_INFO
from dlops.errors import GateError, UsageError
from dlops.export.pipeline import export_variants
from dlops.export.record import ExportRecord, read_record
from dlops.manifest import Record, Sha256, find_manifests
from dlops.runtimes import SessionOptions, open_session
from dlops.signature import Feed

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

Same = Literal["file", "graph", "outputs", "nothing"]
_SAID: dict[Same, str] = {
    "file": "the model file is byte for byte the same",
    "graph": "graph and weights are the same, what the file says of its origin differs",
    "outputs": "the outputs for its samples are the same to the last bit (torch numbers the classes in the file anew)",
    "nothing": "the model file is another one",
}


class Reproduction(Record):
    """same: the file, byte for byte; or the graph, but for what an ONNX or OpenVINO file says of itself; or the outputs
    for the samples, bit for bit: the bytes of a TorchScript file depend on what else its process has compiled.

    sha256: of the artifact's model file, or of its weights where they alone differ; again: of the one that was made
    now. differences: what decides the outcome
    and was other now; circumstances: what may move last bits.
    """

    artifact: str
    same: Same
    sha256: Sha256
    again: Sha256
    differences: tuple[str, ...]
    circumstances: tuple[str, ...]

    @property
    def succeeded(self) -> bool:
        """Whether the same artifact came out, as nearly as its format can show."""
        return self.same == "file" or (self.same == "outputs" and not self.differences)

    def summary(self) -> str:
        """The finding for a person, a line each."""
        lines = [f"{self.artifact}: made again, {_SAID[self.same]}", f"  SHA-256 {self.sha256}"]
        if self.same != "file":
            lines.append(f"  now     {self.again}")
        return "\n".join([*lines, *(f"  {text}" for text in (*self.differences, *self.circumstances))])

    def check(self) -> None:
        """Raise GateError, with what differs, unless it succeeded."""
        if self.succeeded:
            return
        reasons = "; ".join((*self.differences, *self.circumstances))
        raise GateError(
            f"{self.artifact}: made again, its model file differs: {reasons or 'in nothing that is recorded'}",
            hint="use the versions and the checkpoint that it was made with"
            if reasons
            else "a module of your own may have changed in ways that its answers do not show",
        )


def reproduce_artifact(
    artifact: Artifact | Path | str,
    checkpoint: Checkpoint | Path | str | None = None,
    *,
    model: ModuleSource | None = None,
    out: Path | str | None = None,
    command: Sequence[str] = (),
) -> Reproduction:
    """Export the artifact's variant again, as its reproduce.json says, and compare the two model files.

    checkpoint: left out, the one under runs/ whose digest is recorded. model: as for `export_variants`. out: keeps the
    new artifact there, under `<name>/<slug>/`; left out, it is thrown away. Raises UsageError where an older dlops
    wrote no record, where the checkpoint is not found, and where `out` would replace the artifact itself; GateError
    where the variant no longer passes its gates.
    """
    original = open_artifact(artifact.directory if isinstance(artifact, Artifact) else artifact)
    record = read_record(original)
    if checkpoint is None:
        checkpoint = _origin(record)
    elif not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    with ExitStack() as stack:
        folder = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="dlops-reproduce-")))
        if (folder / checkpoint.name / original.slug).resolve() == original.directory.resolve():
            raise UsageError(
                f"{original.title}: made again in {folder} it would replace what it is compared with",
                hint="name another folder, or none: then it is not kept",
            )
        settings: dict[str, Any] = record.settings.model_dump()
        (again,) = export_variants(
            checkpoint, variants=[record.variant], out=folder, model=model, force=True, command=command, **settings
        )
        now = read_record(again)
        same = _same(original, again, SessionOptions(device=record.settings.device))
        role = next((name for name in _roles(original) if _digest(original, name) != _digest(again, name)), "model")
        return Reproduction(
            artifact=original.title,
            same=same,
            sha256=_digest(original, role),
            again=_digest(again, role),
            differences=tuple(record.differences(now)),
            circumstances=() if same == "file" else tuple(record.circumstances(now)),
        )


def _origin(record: ExportRecord) -> Checkpoint:
    for found in find_manifests(Path("runs"), Checkpoint):
        if found.sha256 == record.checkpoint.sha256:
            say(f"Taking the checkpoint that it was made from: {found.directory}")
            return load_checkpoint(found.directory)
    raise UsageError(
        f"no checkpoint under {Path('runs').resolve()} has the SHA-256 {record.checkpoint.sha256[:16]}…",
        hint=f"name its folder; when the artifact was made it was {record.checkpoint.path}",
    )


def _same(original: Artifact, again: Artifact, options: SessionOptions) -> Same:
    if all(_digest(original, role) == _digest(again, role) for role in _roles(original)):
        return "file"
    if original.variant.format in _BARE:
        bare = _BARE[original.variant.format]
        return "graph" if bare(original) == bare(again) else "nothing"
    if original.signature != again.signature:
        return "nothing"
    feed = original.samples().inputs
    before, after = (_outputs(artifact, feed, options) for artifact in (original, again))
    return "outputs" if all(np.array_equal(array, after[name]) for name, array in before.items()) else "nothing"


def _roles(artifact: Artifact) -> list[str]:
    return [role for role in MODEL_ROLES if role in artifact.files]


def _digest(artifact: Artifact, role: str) -> Sha256:
    return artifact.files[role].sha256


def _bare_onnx(artifact: Artifact) -> bytes:
    """An ONNX file without what it says of itself."""
    import onnx

    # Weights in a second file are named there by their digest.
    model = onnx.load(artifact.path("model"), load_external_data=False)
    others = [entry for entry in model.metadata_props if not entry.key.startswith(PREFIX)]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    return bytes(model.SerializeToString(deterministic=True))


def _bare_openvino(artifact: Artifact) -> bytes:
    """An OpenVINO graph without what it says of itself, and the digest of its weights."""
    graph = artifact.path("model").read_bytes()
    said = re.compile(rb"<%b>.*</%b>" % (RT_INFO.encode(), RT_INFO.encode()), re.DOTALL)
    return said.sub(b"", graph) + _digest(artifact, "weights").encode()


_BARE: Mapping[str, Callable[[Artifact], bytes]] = {"onnx": _bare_onnx, "openvino": _bare_openvino}


def _outputs(artifact: Artifact, feed: Feed, options: SessionOptions) -> Feed:
    """For the first samples, as many as one batch may have."""
    session = open_session(artifact, options)
    try:
        return session.run({name: array[: artifact.signature.max_batch] for name, array in feed.items()})
    finally:
        session.close()
