"""What must be installed to serve one artifact: dlops's dependencies, the serve extra, and the format's packages."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dlops.artifact import Artifact
from dlops.deploy.wheel import installed_distribution
from dlops.errors import UsageError

# Packages that bring the same module for other devices, in the same versions.
_ON_CUDA = {"onnxruntime": "onnxruntime-gpu"}
_TWINS = _ON_CUDA | {gpu: cpu for cpu, gpu in _ON_CUDA.items()}


def serving_requirements(artifact: Artifact, *, device: str = "cpu") -> list[str]:
    """Requirement lines without dlops itself, pinned to the versions installed here where they are.

    device: "cuda" takes the GPU builds. Raises UsageError where the artifact needs a package that dlops does not know.
    """
    declared = [Requirement(line) for line in installed_distribution().requires or ()]
    chosen = [r for r in declared if r.marker is None or _is_of_extra(r, "serve")]
    for package in artifact.requires:
        name = _ON_CUDA.get(package, package) if device == "cuda" else package
        found = next((r for r in declared if canonicalize_name(r.name) == canonicalize_name(name)), None)
        if found is None:
            raise UsageError(
                f"{artifact.title} needs {package}, which this dlops does not know",
                hint="upgrade dlops, or export again",
            )
        chosen.append(found)
    return sorted({_line(requirement) for requirement in chosen})


def _is_of_extra(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _line(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    # The gates ran on what is installed here, for whichever device it was built.
    for name in (requirement.name, _TWINS.get(requirement.name)):
        if name is not None and (version := _installed(name)) is not None:
            return f"{requirement.name}{extras}=={version}"
    return f"{requirement.name}{extras}{requirement.specifier}"


def _installed(name: str) -> str | None:
    """The version here, without a local label such as +cu130, which no public index has."""
    try:
        return Version(metadata.version(name)).public
    except metadata.PackageNotFoundError:
        return None
