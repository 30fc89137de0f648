"""Model files that are native code (AOTInductor's, TensorRT's) run only where they were made, or where one says so.

A digest tells that a file is unaltered, not who made it. So export notes the digest of each such file that it makes in
a folder of the user's own, `~/.local/state/dlops/made-here/<machine>/`, and only files noted there are loaded; an
artifact that came from elsewhere brings no such note along, whatever its manifest says. The folder is private to its
owner: whoever can write there could run code as that user anyway, so a signature over the notes would add nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlops.artifact import Artifact
from dlops.errors import CorruptError, MachineError, UsageError, from_os_error
from dlops.manifest import sha256_of
from dlops.runtimes.session import SessionOptions

_SHA256 = re.compile(r"[0-9a-f]{64}")
_OTHERS_MAY_WRITE = 0o022


def note_made_here(sha256: str) -> None:
    """Remember a file that was made by this user on this machine. Raises MachineError where that cannot be kept."""
    assert _SHA256.fullmatch(sha256)
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / sha256).touch(mode=0o600)
    except OSError as error:
        raise from_os_error(error, doing=f"noting in {folder} what was made here") from error
    if not _is_private(folder):
        raise MachineError(
            f"{folder}: others may write there, so what it notes as made here proves nothing",
            hint=f"chmod 700 {folder}",
        )


def was_made_here(sha256: str) -> bool:
    """Whether `note_made_here` was told of a file of this digest, by this user on this machine."""
    folder = _folder()
    return bool(_SHA256.fullmatch(sha256)) and (folder / sha256).is_file() and _is_private(folder)


@contextmanager
def trusted_model(artifact: Artifact, options: SessionOptions) -> Iterator[Path]:
    """A copy of the artifact's model file that nobody else can change, for as long as the block lasts.

    Raises UsageError unless the file was made here or `options` say that it is trusted, CorruptError where it is no
    longer the file that the manifest names.
    """
    source = artifact.path("model")
    with tempfile.TemporaryDirectory(prefix="dlops-native-") as folder:
        copy = Path(folder, f"model{source.suffix}")
        try:
            shutil.copyfile(source, copy)
        except OSError as error:
            raise from_os_error(error, doing=f"reading {source}") from error
        # Of the copy: the file itself could be replaced between this and its use.
        digest = sha256_of(copy)
        if digest != artifact.files["model"].sha256:
            raise CorruptError(f"{source}: it is not the file that its manifest names", hint="export it again")
        if not options.trust and not was_made_here(digest):
            raise UsageError(
                f"{artifact.title}: {artifact.variant.format} is native code, which would run with all of your rights, "
                "and this file was not made by you on this machine",
                hint="export it here from its checkpoint; where you trust who made it: --trust, DLOPS_TRUST=true for "
                "bentoml serve, SessionOptions(trust=True) in Python",
            )
        yield copy


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return root / "dlops" / "made-here" / _machine()


def _machine() -> str:
    """Tells machines apart that share a home folder."""
    try:
        identity = Path("/etc/machine-id").read_text().strip()
    except OSError:  # macOS, and containers without one
        identity = ""
    return hashlib.sha256((identity or platform.node()).encode()).hexdigest()[:16]


def _is_private(folder: Path) -> bool:
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & _OTHERS_MAY_WRITE
