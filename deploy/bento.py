"""An artifact as a Bento: BentoML's own package, which `bentoml serve NAME:latest` runs and `bentoml containerize`
puts into an image.

The artifact goes into BentoML's model store as it is; the Bento holds a three-line service, our wheel, and the list of
what the artifact's format needs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dlops.artifact import Artifact
from dlops.deploy.requirements import serving_requirements
from dlops.deploy.wheel import write_wheel
from dlops.errors import MachineError, first_line, from_os_error, missing_package

if TYPE_CHECKING:
    import bentoml

_SERVICE = '''"""Serves the artifact that this Bento carries. Written by `dlops deploy bento`."""

import os

os.environ.setdefault("DLOPS_ARTIFACT", "bentoml:{model}")

from dlops.serve.service import Service  # noqa: E402

__all__ = ["Service"]
'''


# BentoML's limit for a tag's name, and for its version.
_TAG_CHARS = 63
_DIGEST_CHARS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class BentoInfo:
    """tag: for `bentoml serve`. path: in BentoML's store. archive: the .bento file, where one was asked for."""

    tag: str
    path: Path
    archive: Path | None = None


def build_bento(artifact: Artifact, *, out: Path | None = None, device: str = "cpu") -> BentoInfo:
    """Put the artifact into BentoML's model store and build a Bento around it.

    device: "cuda" asks for the runtimes' GPU builds.
    out: also write a .bento file there (a file name, or a folder), whole or not at all. The same artifact built twice
    shares its model. Raises MachineError where BentoML is missing or refuses, UsageError where nothing can be at `out`.
    """
    try:
        import bentoml
    except ModuleNotFoundError:
        raise missing_package("bentoml", extra="serve", needed_for="building a Bento") from None
    from bentoml.exceptions import BentoMLException

    try:
        with ExitStack() as stack:
            # Before anything is stored: where nothing can be written, nothing is built.
            place = None if out is None else stack.enter_context(_place_for(out))
            model = _store_model(artifact)
            context = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dlops-bento-")))
            _write_context(context, artifact, model, device=device)
            tag = _run_build(context)
            bento = bentoml.bentos.get(tag)
            archive = None if place is None else place.export(bento)
    except BentoMLException as error:
        raise MachineError(
            f"{artifact.title}: BentoML cannot package it: {first_line(error)}",
            hint="`bentoml models list` and `bentoml list` show what its store holds",
        ) from error
    except OSError as error:
        raise from_os_error(error, doing=f"building a Bento of {artifact.title}") from error
    return BentoInfo(tag=tag, path=Path(bento.path), archive=archive)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file is to be: in `folder`, by way of `beside`, which is in it. name: of the file; "" for BentoML's."""

    folder: Path
    beside: Path
    name: str

    def export(self, bento: bentoml.Bento) -> Path:
        """The file that was written: of that name, with BentoML's suffix where it has none."""
        # BentoML looks for the last slash.
        written = Path(bento.export(f"{self.beside}/{self.name}"))
        archive = self.folder / written.name
        written.replace(archive)
        return archive


@contextmanager
def _place_for(out: Path) -> Iterator[_Place]:
    # BentoML takes what is relative as below the root.
    out = out.absolute()
    folder = out if out.is_dir() else out.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dlops-bento-", dir=folder) as beside:
        yield _Place(folder, Path(beside), "" if out.is_dir() else out.name)


def _store_model(artifact: Artifact) -> str:
    """The tag of the artifact's copy in the model store, made where there is none."""
    import bentoml
    from bentoml.exceptions import NotFound

    # The manifest holds every payload's digest, so its own names the whole.
    digest = hashlib.sha256(artifact.to_json().encode()).hexdigest()[:_DIGEST_CHARS]
    which = f"{artifact.slug}-{digest}"
    tag = f"{_tag_part(artifact.name)}:{_tag_part(artifact.version, most=_TAG_CHARS - len(which) - 1)}-{which}"
    try:
        bentoml.models.get(tag)
    except NotFound:
        labels = {"format": artifact.variant.format, "precision": artifact.variant.precision, "task": artifact.task}
        with bentoml.models.create(tag, labels=labels) as model:
            for name in (artifact.file_name, *(payload.path for payload in artifact.files.values())):
                shutil.copyfile(artifact.directory / name, Path(model.path) / name)
    return tag


def _write_context(folder: Path, artifact: Artifact, model: str, *, device: str) -> None:
    wheel = write_wheel(folder / "wheels")
    (folder / "service.py").write_text(_SERVICE.format(model=model))
    options = {
        "service": "service:Service",
        "name": _tag_part(artifact.name),
        "labels": {"dlops-variant": artifact.slug, "dlops-version": artifact.version, "dlops-device": device},
        "include": ["service.py"],
        "models": [model],
        "python": {
            "packages": serving_requirements(artifact, device=device),
            "wheels": [f"wheels/{wheel.name}"],
            # Locking asks the network for versions that serving_requirements has pinned already.
            "lock_packages": False,
        },
        # In an image of `bentoml containerize` only: a container has a network of its own.
        "docker": {"env": {"BENTOML_HOST": "0.0.0.0"}},  # noqa: S104
    }
    (folder / "bentofile.yaml").write_text(yaml.safe_dump(options, sort_keys=False))


def _run_build(folder: Path) -> str:
    """The new Bento's tag. A process of its own, because building imports the service and sets its variables."""
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DLOPS_")}
    environment.setdefault("BENTOML_DO_NOT_TRACK", "True")
    # BentoML reads its options in the current folder only.
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines()
    prefix = "__tag__:"
    if ended.returncode or not lines or not lines[-1].startswith(prefix):
        said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
        raise MachineError(f"bentoml build failed: {said}")
    return lines[-1].removeprefix(prefix)


def _tag_part(text: str, *, most: int = _TAG_CHARS) -> str:
    """In BentoML's alphabet: lower case, a letter or digit at both ends, and at most so many characters.

    Where more has to be changed than that, it ends in a digest of `text`: what was told apart before is so after.
    """
    part = text.lower().rstrip("._-")
    if len(part) <= most and re.fullmatch(r"[a-z0-9][a-z0-9._-]*", part):
        return part
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]
    begin = re.sub(r"[^a-z0-9._-]", "-", part)[: most - len(digest) - 1].strip("._-")
    return f"{begin}-{digest}" if begin else digest
