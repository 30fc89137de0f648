"""The few calls of the CUDA runtime library that measuring takes, through ctypes: a stream, events on it, and which
GPU a device number means.

Streams belong to the device, not to a library: events recorded here on a stream of torch's or ONNX Runtime's time what
either of them puts there.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

from dlops.errors import MachineError

_NAMES = ("libcudart.so.13", "libcudart.so.12")
_NON_BLOCKING = 1


class Stream:
    """A stream of the current device that does not wait for the default one. handle: what the runtimes call it by."""

    def __init__(self) -> None:
        pointer = ctypes.c_void_p()
        _call("cudaStreamCreateWithFlags", ctypes.byref(pointer), ctypes.c_uint(_NON_BLOCKING))
        self.handle = pointer.value or 0

    def synchronize(self) -> None:
        """Wait until all that was put on it is done."""
        _call("cudaStreamSynchronize", ctypes.c_void_p(self.handle))

    def close(self) -> None:
        _call("cudaStreamDestroy", ctypes.c_void_p(self.handle))


class Stopwatch:
    """Device time between two points of a stream, to about half a microsecond (cudaEventElapsedTime)."""

    def __init__(self, stream: int) -> None:
        """stream: its handle; 0 for the default one."""
        self._stream = ctypes.c_void_p(stream)
        self._events = ctypes.c_void_p(), ctypes.c_void_p()
        for event in self._events:
            _call("cudaEventCreate", ctypes.byref(event))

    def start(self) -> None:
        _call("cudaEventRecord", self._events[0], self._stream)

    def stop(self) -> None:
        _call("cudaEventRecord", self._events[1], self._stream)

    def elapsed_ns(self) -> int:
        """Between the last start and the last stop. Raises MachineError until the stream has come to the stop."""
        milliseconds = ctypes.c_float()
        _call("cudaEventElapsedTime", ctypes.byref(milliseconds), *self._events)
        return round(milliseconds.value * 1e6)

    def close(self) -> None:
        for event in self._events:
            _call("cudaEventDestroy", event)


def pci_address(device: int) -> str:
    """Where the GPU is that CUDA numbers so in this process, such as "0000:3b:00.0".

    CUDA numbers the fastest first unless CUDA_DEVICE_ORDER says otherwise, and only those in CUDA_VISIBLE_DEVICES; NVML
    numbers all by their place on the bus. The address is the same for both. Raises MachineError where CUDA knows none.
    """
    text = ctypes.create_string_buffer(32)
    _call("cudaDeviceGetPCIBusId", text, ctypes.c_int(len(text)), ctypes.c_int(device))
    return text.value.decode()


def _call(name: str, *arguments: object) -> None:
    library = _library()
    status = getattr(library, name)(*arguments)
    if status != 0:
        raise MachineError(f"{name}: {library.cudaGetErrorString(status).decode()}", hint="dlops doctor shows the GPU")


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that a runtime has loaded already, the system's, or that of the nvidia-cuda-runtime package."""
    for name in (*_NAMES, *_packaged()):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cudaGetErrorString.restype = ctypes.c_char_p
        return library
    raise MachineError(
        f"no {' or '.join(_NAMES)} on this machine: the CUDA runtime library times work on a GPU",
        hint="pip install nvidia-cuda-runtime",
    )


def _packaged() -> list[str]:
    spec = find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return [str(path) for folder in folders for name in _NAMES for path in sorted(Path(folder).glob(f"*/lib/{name}"))]
