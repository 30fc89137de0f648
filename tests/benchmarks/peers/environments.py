"""The peers' own environments: made once under `.peers/` (or $DLOPS_PEERS), again when the pins change.

`python tests/benchmarks/peers/environments.py` makes them all; the experiment makes what it needs. perf_analyzer is no
peer but a client, and schemathesis neither.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).with_name("requirements")
_ROOT = Path(__file__).resolve().parents[3]
_INSTALL_TIMEOUT_S = 1200
_STAMP = "made-from.txt"


class UnavailableError(Exception):
    """A peer cannot be installed or started here; the message's first line says why."""


def is_made(name: str) -> bool:
    """Whether the environment is there, as requirements/<name>.txt has it now."""
    stamp = _folder(name) / _STAMP
    return stamp.is_file() and stamp.read_text() == _made_from(name)


def environment(name: str) -> Path:
    """The folder of the environment with what requirements/<name>.txt pins. Raises UnavailableError."""
    folder, pins = _folder(name), PINS / f"{name}.txt"
    if is_made(name):
        return folder
    print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    if shutil.which("uv"):
        _run("uv", "venv", "--quiet", "--python", sys.executable, str(folder))
        _run("uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", python, "--requirement", str(pins))
    else:
        _run(sys.executable, "-m", "venv", str(folder))
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement", str(pins))
    (folder / _STAMP).write_text(_made_from(name))
    return folder


def version(name: str) -> str:
    """Of the package that gives the peer its name, as it is pinned."""
    package = {"tritonserver": "nvidia-pytriton"}.get(name, name)
    (found,) = [line for line in (PINS / f"{name}.txt").read_text().splitlines() if line.startswith(f"{package}==")]
    return found.replace("==", " ")


def _folder(name: str) -> Path:
    return Path(os.environ.get("DLOPS_PEERS") or _ROOT / ".peers").resolve() / name


def _made_from(name: str) -> str:
    return f"Python {sys.version}\n{(PINS / f'{name}.txt').read_text()}"


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"its environment cannot be made here ({type(error).__name__})") from None
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr, flush=True)
        raise UnavailableError("its environment cannot be made here: the installer's words are in the log")


if __name__ == "__main__":
    for _pins in sorted(PINS.glob("*.txt")):
        print(environment(_pins.stem))
