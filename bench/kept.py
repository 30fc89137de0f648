"""Calibrations kept between runs: one a machine, in the person's cache folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from dlops.bench.calibrate import this_machine
from dlops.directory import write_json
from dlops.errors import CorruptError, MachineError, UsageError, from_os_error
from dlops.manifest import Manifest, read_manifest
from dlops.report import Calibration, Machine


class KeptCalibration(Manifest):
    """calibration.json: a calibration with the digest of its content."""

    file_name: ClassVar[str] = "calibration.json"

    kind: Literal["calibration"] = "calibration"
    schema_version: int = Field(1, alias="schema", ge=1)
    calibration: Calibration


def keep(calibration: Calibration) -> Path:
    """Replace what was kept for its machine; the file. Raises MachineError where the cache cannot be written."""
    path = _directory(calibration.machine) / KeptCalibration.file_name
    try:
        write_json(path, KeptCalibration(created=calibration.created, calibration=calibration).to_json())
    except UsageError as error:
        # A folder that is a file, or cannot be: of this machine, whatever the command line says.
        raise MachineError(error.message, hint="set XDG_CACHE_HOME to a folder that can be written to") from None
    return path


def kept() -> Calibration | None:
    """What was kept for this machine, None where nothing was.

    Raises CorruptError where that is damaged or newer, MachineError where it cannot be read.
    """
    machine = this_machine()
    directory = _directory(machine)
    path = directory / KeptCalibration.file_name
    try:
        there = path.exists()
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    if not there:
        return None
    calibration = read_manifest(directory, KeptCalibration).calibration
    if calibration.machine != machine:
        raise CorruptError(f"{path}: made on another machine")
    return calibration


def _directory(machine: Machine) -> Path:
    digest = hashlib.sha256(machine.model_dump_json().encode()).hexdigest()[:16]
    return _cache() / "dlops" / f"machine-{digest}"


def _cache() -> Path:
    # The XDG base directory specification has relative paths ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise MachineError("there is no home folder to keep a calibration in", hint="set XDG_CACHE_HOME") from None
