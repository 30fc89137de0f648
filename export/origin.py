"""Which checkpoint something was made from: the one that was loaded, and not what lies in its folder by now."""

from __future__ import annotations

from dlops.checkpoint import Checkpoint
from dlops.errors import UsageError
from dlops.manifest import read_manifest


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """The SHA-256 that the loaded manifest holds of its own content.

    Raises UsageError where the directory holds another manifest by now: weights and samples are read from there.
    """
    here = read_manifest(checkpoint.directory, Checkpoint, verify=False)
    if checkpoint.sha256 is None or here.sha256 != checkpoint.sha256:
        raise UsageError(
            f"{checkpoint.directory}: it holds another checkpoint than the one that was loaded",
            hint="something wrote it anew meanwhile: load it again",
        )
    return checkpoint.sha256
