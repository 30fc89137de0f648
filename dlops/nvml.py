"""NVIDIA's management library, through the package nvidia-ml-py."""

from __future__ import annotations

from typing import Any


class NvmlError(Exception):
    """It tells nothing; the message says why."""


def open_nvml() -> tuple[Any, list[Any]]:
    """The module `pynvml`, and a handle of every GPU of this machine in order. Raises NvmlError."""
    try:
        import pynvml as nvml
    except ModuleNotFoundError:
        raise NvmlError("nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        raise NvmlError(f"NVML: {error}") from None


def text(name: bytes | str) -> str:
    """What NVML calls something: older versions of the package give bytes."""
    return name.decode() if isinstance(name, bytes) else name
