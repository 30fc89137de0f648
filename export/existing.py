"""An artifact that lies there already and would come out the same: kept, once its files and its answers are checked."""

from __future__ import annotations

from pathlib import Path

from dlops.artifact import Artifact, open_artifact
from dlops.console import say
from dlops.errors import GateError, MachineError, UsageError
from dlops.export.record import ExportRecord, read_record
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session


def unchanged_artifact(directory: Path, *, wanted: ExportRecord, options: SessionOptions) -> Artifact | None:
    """The artifact in `directory` where an export would make it again as it is, else None, with the reason said.

    Its digests match, its record differs from `wanted` in nothing that decides, and here and now it gives the outputs
    that it carries for its samples.
    """
    if not (directory / Artifact.file_name).is_file():
        return None
    try:
        artifact = open_artifact(directory)
        differences = read_record(artifact).differences(wanted)
        if differences:
            raise UsageError("; ".join(differences))
        session = open_session(artifact, options)
        try:
            self_test(artifact, session)
        finally:
            session.close()
    except (UsageError, GateError, MachineError) as error:
        # An engine of another TensorRT, say: made again it is one for this machine.
        say(f"{wanted.variant.slug}: exporting again: {error.message}")
        return None
    return artifact
