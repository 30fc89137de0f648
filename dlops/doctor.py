"""What really works on this machine, found by running a tiny model on every device and provider.

A library that lists a provider may still fail to load it, or run on the CPU in silence. So each probe runs a model with
a known answer in a process of its own, and says whether the answer was right and what gave it; a driver that crashes or
hangs takes that process down and nothing else.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dlops import doctor_probes
from dlops.environment import Environment, available_cores, describe_environment, installed_packages
from dlops.manifest import Record

if TYPE_CHECKING:
    from rich.console import RenderableType

Status = Literal["ok", "failed", "absent", "untried"]
# Starting CUDA on a cold machine, and building a TensorRT engine, take tens of seconds.
PROBE_TIMEOUT_S = 120.0
SERVE_PORT = 3000
# The CUDA builds of torch and ONNX Runtime with an export of a large model come to about as much.
_LOW_DISK_BYTES = 10 * 1024**3
_NOT_FOR_USERS = ("all", "dev")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?.*extra == ['\"]([a-z]+)['\"]")
_GPU_PROBES = ("onnxruntime cuda", "onnxruntime tensorrt", "tensorrt cuda", "torch cuda")
# A container may have the device and not nvidia-smi. The second is the one of WSL.
_GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
# Builds of one library: either brings the module that the other is asked for.
_STAND_INS = {"onnxruntime": "onnxruntime-gpu"}


class Extra(Record):
    """One of our optional dependency sets. installed: package to version. missing: those that are not there."""

    name: str
    installed: dict[str, str]
    missing: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        return not self.missing


class Probe(Record):
    """A tiny model run on one device or provider. absent: there is nothing to run on, which may be as wanted.
    untried: what it takes works, and running a model would take long.
    """

    name: str
    status: Status
    reason: str
    advice: str | None = None


class Disk(Record):
    path: str
    free_bytes: int
    total_bytes: int


class Port(Record):
    number: int
    used_by: str
    free: bool


class Findings(Record):
    """All that `dlops doctor` found. notes: what one should know about this machine, in full sentences."""

    environment: Environment
    extras: tuple[Extra, ...]
    probes: tuple[Probe, ...]
    disk: Disk
    ports: tuple[Port, ...]
    notes: tuple[str, ...]


def examine(*, compiling: bool = False, timeout_s: float = PROBE_TIMEOUT_S) -> Findings:
    """Probe everything. Nothing here raises for what is broken: that is what it reports.

    compiling: run also a model that has to be compiled first, half a minute. timeout_s: for one probe.
    """
    environment = describe_environment()
    extras = _extras()
    with ThreadPoolExecutor(max_workers=min(4, available_cores())) as pool:
        probes = tuple(
            pool.map(
                lambda name: _probe(
                    name, environment, timeout_s, compiling=compiling and name in doctor_probes.COMPILING
                ),
                doctor_probes.PROBES,
            )
        )
    usage = shutil.disk_usage(Path.cwd())
    disk = Disk(path=str(Path.cwd()), free_bytes=usage.free, total_bytes=usage.total)
    return Findings(
        environment=environment,
        extras=extras,
        probes=probes,
        disk=disk,
        ports=(Port(number=SERVE_PORT, used_by="dlops serve", free=_port_is_free(SERVE_PORT)),),
        notes=tuple(_notes(environment, extras, disk)),
    )


def render(findings: Findings) -> RenderableType:
    """The findings for a terminal: probes first, for they are what one came for."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "failed": "bold red", "absent": "dim", "untried": "yellow"}
    probes = Table(
        "runs a model", "", "what happened", "what to do", title="Devices and providers", title_justify="left"
    )
    for probe in findings.probes:
        probes.add_row(
            probe.name, Text(probe.status, styles[probe.status]), Text(probe.reason), Text(probe.advice or "")
        )
    extras = Table("extra", "", "packages", title="Optional packages", title_justify="left")
    for extra in findings.extras:
        state = Text("complete", "green") if extra.is_complete else Text("incomplete", "dim")
        have = ", ".join(f"{name} {version}" for name, version in extra.installed.items())
        lack = f"missing: {', '.join(extra.missing)}" if extra.missing else ""
        extras.add_row(extra.name, state, Text("; ".join(part for part in (have, lack) if part)))
    facts = Table(show_header=False, title="Machine", title_justify="left")
    for name, value in _facts(findings):
        facts.add_row(name, Text(value))
    return Group(probes, extras, facts, *(Text(f"• {note}") for note in findings.notes))


def _facts(findings: Findings) -> list[tuple[str, str]]:
    environment, disk = findings.environment, findings.disk
    return [
        ("system", f"{environment.system} ({environment.machine}), Python {environment.python}"),
        (
            "CPU",
            f"{environment.cpu}, {environment.cores_in_words} to use, {environment.memory_bytes / 1024**3:.1f} GiB",
        ),
        ("instructions", ", ".join(environment.instruction_sets) or "unknown"),
        ("GPU", "; ".join(environment.gpus) or "none"),
        ("disk", f"{disk.free_bytes / 1024**3:.1f} of {disk.total_bytes / 1024**3:.1f} GiB free at {disk.path}"),
        *((f"port {port.number}", f"{'free' if port.free else 'in use'} ({port.used_by})") for port in findings.ports),
    ]


def _probe(name: str, environment: Environment, timeout_s: float, *, compiling: bool = False) -> Probe:
    if name in _GPU_PROBES and not environment.gpus and not any(path.exists() for path in _GPU_DEVICES):
        return Probe(name=name, status="absent", reason="no NVIDIA GPU here")
    # The child must find the same dlops, which may be a source tree that is not installed.
    paths = [str(Path(__file__).absolute().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        child = subprocess.run(
            [sys.executable, "-m", "dlops.doctor_probes", *name.split(), *(["--compile"] if compiling else [])],
            capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Probe(name=name, status="failed", reason=f"no answer in {timeout_s:g} s", advice=_advice(name))
    return _answer_of(name, child)


def _answer_of(name: str, child: subprocess.CompletedProcess[str]) -> Probe:
    if child.returncode < 0:
        number = -child.returncode
        known = number in {member.value for member in signal.Signals}
        cause = f"crashed ({signal.Signals(number).name if known else f'signal {number}'})"
        return Probe(name=name, status="failed", reason=cause, advice=_advice(name))
    # Libraries may print to stdout too; our answer is the last line.
    lines = child.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
        return Probe(
            name=name, status=answer["status"], reason=answer["reason"],
            advice=None if answer["status"] == "ok" else _advice(name, answer["status"]),
        )  # fmt: skip
    except (IndexError, KeyError, TypeError, ValueError):
        said = (child.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
        return Probe(name=name, status="failed", reason=f"exit status {child.returncode}: {said}", advice=_advice(name))


def _advice(name: str, status: Status = "failed") -> str:
    library, _, target = name.partition(" ")
    absent = status == "absent"
    gpu_build = "the GPU build: pip uninstall onnxruntime, then pip install 'dlops[gpu]'"
    match library, target:
        case "onnxruntime", "cpu":
            return "pip install 'dlops[cpu]', or 'dlops[gpu]' beside an NVIDIA GPU"
        case "onnxruntime", "cuda":
            return gpu_build if absent else "pip install 'dlops[gpu]', and a driver that its CUDA takes (nvidia-smi)"
        case "onnxruntime", _:
            return gpu_build if absent else "install TensorRT of the version that ONNX Runtime was built with"
        case (("openvino" | "executorch" | "tensorrt"), _):
            return f"pip install 'dlops[{library}]'"
        case "torch", "cuda" if not absent:
            return "install the torch build that fits the driver: https://pytorch.org/get-started/locally"
        case "aotinductor", _ if status == "untried":
            return "dlops doctor --compile runs a model, in half a minute"
        case "aotinductor", _:
            return "apt install g++, or name a compiler in the variable CXX"
        case "torch", "mps":
            return "only on Apple silicon"
        case _:
            return "pip install 'dlops[train]', or 'dlops[export]'; torch and torchvision in matching versions"


def _extras() -> tuple[Extra, ...]:
    try:
        requirements = metadata.requires("dlops") or []
    except metadata.PackageNotFoundError:  # run from a source tree; `_notes` says so
        return ()
    wanted: dict[str, list[str]] = {}
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        if match and match[2] not in _NOT_FOR_USERS:
            wanted.setdefault(match[2], []).append(match[1])
    found = {
        name: installed_packages((*packages, *(_STAND_INS[p] for p in packages if p in _STAND_INS)))
        for name, packages in wanted.items()
    }
    return tuple(
        Extra(name=name, installed=found[name], missing=_missing(packages, found[name]))
        for name, packages in wanted.items()
    )


def _missing(packages: list[str], found: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in packages if name not in found and _STAND_INS.get(name) not in found)


def _notes(environment: Environment, extras: tuple[Extra, ...], disk: Disk) -> list[str]:
    notes = [_int8_note(environment)]
    if not extras:
        notes.append("dlops itself is not installed as a package, so which extras are complete is not known.")
    if len(installed_packages(("onnxruntime", "onnxruntime-gpu"))) == 2:
        notes.append(
            "Both onnxruntime and onnxruntime-gpu are installed and overwrite each other's files: "
            "uninstall both and install one."
        )
    if disk.free_bytes < _LOW_DISK_BYTES:
        notes.append(f"Only {disk.free_bytes / 1024**3:.1f} GiB of disk are free: large exports may not fit.")
    return notes


def _int8_note(environment: Environment) -> str:
    having = set(environment.instruction_sets)
    fast = [name for name in ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp") if name in having]
    if fast:
        return f"int8 is fast on this CPU ({', '.join(fast)})."
    if not having:
        return "Which instructions this CPU has is not known here, so measure int8 before choosing it."
    return (
        "This CPU has no 8-bit dot product (VNNI): int8 may be slower than fp32, and products of u8 and s8 can "
        "saturate. Verify and measure int8 before choosing it."
    )


def _port_is_free(number: int) -> bool:
    with socket.socket() as listener:
        # As servers do, or a connection that was just closed would make the port look taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            return False
    return True
