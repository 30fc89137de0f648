"""The installed dlops as a wheel, so that what is deployed carries the very code that was tested here.

Assembled from the installed package, an editable one too: no build tool, no network, and the stage folders' links are
followed, which `bentoml build` does not. The format: https://packaging.python.org/specifications/binary-distribution-format
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import dlops
from dlops.errors import MachineError

# What pyproject.toml names as package data, and the code.
_SUFFIXES = (".py", ".yaml", ".html", ".css", ".js", ".txt", ".cpp", ".hpp")
_NAMES = ("py.typed",)
_PREFIXES = ("Dockerfile",)
_WHEEL = "Wheel-Version: 1.0\nGenerator: dlops\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
# Zip knows no earlier time; a fixed one makes equal contents equal files.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_wheel(folder: Path) -> Path:
    """Write `dlops-<version>-py3-none-any.whl` into `folder` and return its path.

    Raises MachineError where dlops is run from a source tree that is not installed.
    """
    distribution = installed_distribution()
    info = f"dlops-{distribution.version}.dist-info"
    files = dict(_package_files())
    files[f"{info}/METADATA"] = _metadata(distribution).encode()
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    files[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"dlops-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return path


def installed_distribution() -> metadata.Distribution:
    """The metadata of the installed dlops."""
    try:
        return metadata.distribution("dlops")
    except metadata.PackageNotFoundError:
        raise MachineError(
            "dlops is not installed, so its dependencies are not known", hint="pip install -e ."
        ) from None


def _package_files() -> Iterator[tuple[str, bytes]]:
    root = Path(next(iter(dlops.__path__)))
    found = []
    for directory, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            if name.endswith(_SUFFIXES) or name in _NAMES or name.startswith(_PREFIXES):
                found.append(Path(directory) / name)
    for path in sorted(found):
        yield f"dlops/{path.relative_to(root).as_posix()}", path.read_bytes()


def _metadata(distribution: metadata.Distribution) -> str:
    # A source tree that setuptools has touched keeps the same text under its older name.
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    assert text, "an installed distribution has metadata"
    return text


def _record(files: dict[str, bytes], own_name: str) -> bytes:
    lines = []
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    return "\n".join([*lines, f"{own_name},,", ""]).encode()
