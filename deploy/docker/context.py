"""Writes what `docker build` needs: our wheel, the requirements, the artifact and a Dockerfile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from dlops.artifact import Artifact
from dlops.deploy.requirements import serving_requirements
from dlops.deploy.wheel import write_wheel
from dlops.errors import UsageError, from_os_error

_TEMPLATES = Path(__file__).parent
# All but what is copied into the image stays out of what is sent to the daemon.
_IGNORE = "*\n!wheels\n!artifact\n!requirements.txt\n"


def write_docker_context(artifact: Artifact, *, out: Path, device: Literal["cpu", "cuda"] = "cpu") -> Path:
    """Write the folder, whole or not at all, and return it. Raises UsageError where it holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: is there already, and not empty", hint="name a new folder, or empty it")
    # An empty folder that is there stays the same one: it may be a mount, or where somebody's shell is.
    given = out.is_dir()
    partial = (out if given else out.parent) / f".dlops-{os.getpid()}.partial"
    try:
        _fill(partial, artifact, device)
        if given:
            for entry in partial.iterdir():
                os.replace(entry, out / entry.name)
        else:
            os.replace(partial, out)
    except OSError as error:
        raise from_os_error(error, doing=f"writing {out}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _fill(folder: Path, artifact: Artifact, device: Literal["cpu", "cuda"]) -> None:
    target = folder / "artifact"
    target.mkdir(parents=True)
    for name in (artifact.file_name, *(payload.path for payload in artifact.files.values())):
        shutil.copyfile(artifact.directory / name, target / name)
    write_wheel(folder / "wheels")
    (folder / "requirements.txt").write_text("\n".join(serving_requirements(artifact, device=device)) + "\n")
    shutil.copyfile(_TEMPLATES / f"Dockerfile.{device}", folder / "Dockerfile")
    (folder / ".dockerignore").write_text(_IGNORE)
