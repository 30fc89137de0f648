"""What machine, driver, instruction set and versions a result was made with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from dlops.cgroups import allowed_cores, allowed_memory
from dlops.manifest import Record

_PACKAGES = (
    "dlops", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino",
    "executorch", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "torchao", "torch-pruning", "lightning-fabric",
    "bentoml", "numpy", "pillow",
)  # fmt: skip
# Those that decide which int8 and bf16 kernels a runtime picks.
_INSTRUCTION_SETS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


class Environment(Record):
    """The machine and the software that a result was made with."""

    system: str
    """Operating system and kernel."""
    machine: str
    """The processor's architecture."""
    cpu: str
    """The processor's name."""
    instruction_sets: tuple[str, ...]
    """Of it, those that decide which kernels a runtime picks."""
    cores: int
    """[processors] That this process may use."""
    memory_bytes: int
    """Of the machine, or of the container where that may use less."""
    python: str
    """Its version."""
    gpus: tuple[str, ...]
    """Name, driver and memory of each, as nvidia-smi tells them."""
    packages: dict[str, str]
    """Version by name, of those that are installed."""

    @property
    def cores_in_words(self) -> str:
        return f"{self.cores} core{'' if self.cores == 1 else 's'}"


@lru_cache(maxsize=1)
def describe_environment() -> Environment:
    """This machine, read once a process."""
    cpu, flags = _processor()
    return Environment(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=cpu,
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
        cores=available_cores(),
        memory_bytes=available_memory(),
        python=platform.python_version(),
        gpus=_gpus(),
        packages=installed_packages(_PACKAGES),
    )


def available_cores() -> int:
    """Cores that this process may use: its affinity, cut to the tightest CPU quota of the control groups around it."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = allowed_cores()
    return affinity if quota is None else max(1, min(affinity, round(quota)))


def available_memory() -> int:
    """Bytes that this process may use: the machine's memory, cut to the tightest limit of the groups around it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = allowed_memory()
    return physical if limit is None else min(physical, limit)


def installed_packages(names: tuple[str, ...]) -> dict[str, str]:
    """Name to version of those that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # macOS
        return platform.processor() or platform.machine(), frozenset()
    lines = (line.partition(":") for line in text.splitlines()[:64])
    fields = {key.strip(): value.strip() for key, _, value in lines if value}
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), frozenset(flags.split())


def _gpus() -> tuple[str, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(answer.stdout.strip().splitlines()) if answer.returncode == 0 else ()
