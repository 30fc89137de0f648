"""The few calls of the CUDA runtime library that measuring and TensorRT's engines take, through ctypes: a stream,
events and graphs on it, memory, and which GPU a device number means.

Streams belong to the device, not to a library: events recorded here on a stream of torch's or ONNX Runtime's time what
either of them puts there.
"""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dlops.errors import MachineError
from dlops.signature import Array

_NAMES = ("libcudart.so.13", "libcudart.so.12")
_NON_BLOCKING = 1
# cudaMemcpyKind.
_TO_DEVICE, _TO_HOST = 1, 2
# cudaStreamCaptureModeThreadLocal: what other threads do meanwhile is no concern of the graph's.
_THIS_THREAD = 1
# More than a cudaDeviceProp takes in any version.
_PROPERTIES_BYTES = 8192
# cudaDevAttrComputeCapabilityMajor and Minor.
_CAPABILITY = (75, 76)


class Stream:
    """A stream of the current device that does not wait for the default one. handle: what the runtimes call it by."""

    def __init__(self) -> None:
        pointer = ctypes.c_void_p()
        _call("cudaStreamCreateWithFlags", ctypes.byref(pointer), ctypes.c_uint(_NON_BLOCKING))
        self.handle = pointer.value or 0
        # What nobody closes, because a call failed before or its holder was dropped, is freed with the object.
        self._free = weakref.finalize(self, _free, "cudaStreamDestroy", pointer)

    def synchronize(self) -> None:
        """Wait until all that was put on it is done."""
        _call("cudaStreamSynchronize", ctypes.c_void_p(self.handle))

    def close(self) -> None:
        self._free()


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


class DeviceBuffer:
    """Memory of the current device. address: where it begins; size: in bytes."""

    def __init__(self, size: int) -> None:
        """Raises MachineError where there is not so much left."""
        self.size = size
        pointer = ctypes.c_void_p()
        # Of nothing there would be no address.
        _call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)))
        self.address = pointer.value or 0
        self._free = weakref.finalize(self, _free, "cudaFree", pointer)

    def write(self, array: Array, stream: Stream) -> None:
        """Copy a contiguous array to the device, in the order of the stream; keep it until that was synchronized."""
        self._copy(self.address, array.ctypes.data, array.nbytes, _TO_DEVICE, stream)

    def read_into(self, array: Array, stream: Stream) -> None:
        """Copy to a contiguous array, which holds it once the stream was synchronized."""
        self._copy(array.ctypes.data, self.address, array.nbytes, _TO_HOST, stream)

    def close(self) -> None:
        self._free()

    @staticmethod
    def _copy(to: int, source: int, size: int, direction: int, stream: Stream) -> None:
        _call(
            "cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), direction,
            ctypes.c_void_p(stream.handle),
        )  # fmt: skip


class HostBuffer:
    """Memory of the host that stays where it is (page-locked), from which the device copies by itself: out of any other
    the driver copies it into such memory first. array: of zeros, valid as long as this is held."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        """Raises MachineError where there is not so much left."""
        size = math.prod(shape) * dtype.itemsize
        pointer = ctypes.c_void_p()
        _call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(max(1, size)), ctypes.c_uint(0))
        memory = (ctypes.c_char * size).from_address(pointer.value or 0)
        self.array: Array = np.frombuffer(memoryview(memory).cast("B"), dtype).reshape(shape)
        self.array[...] = 0
        self._free = weakref.finalize(self, _free, "cudaFreeHost", pointer)

    def close(self) -> None:
        self._free()


class Graph:
    """What was put on a stream within `record`, to be launched again as a whole."""

    def __init__(self, stream: Stream, record: Callable[[], None]) -> None:
        """Raises MachineError where something of it cannot be captured."""
        self._stream = ctypes.c_void_p(stream.handle)
        self._graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cudaStreamBeginCapture", self._stream, _THIS_THREAD)
        try:
            record()
        except BaseException:
            # That the capture failed follows from it.
            _library().cudaStreamEndCapture(self._stream, ctypes.byref(self._graph))
            raise
        _call("cudaStreamEndCapture", self._stream, ctypes.byref(self._graph))
        self._free_graph = weakref.finalize(self, _free, "cudaGraphDestroy", self._graph)
        _call("cudaGraphInstantiate", ctypes.byref(self._executable), self._graph, ctypes.c_ulonglong(0))
        self._free_executable = weakref.finalize(self, _free, "cudaGraphExecDestroy", self._executable)

    def launch(self) -> None:
        _call("cudaGraphLaunch", self._executable, self._stream)

    def close(self) -> None:
        self._free_executable()
        self._free_graph()


def device_name(device: int) -> str:
    """As CUDA numbers devices in this process, such as "NVIDIA H100 80GB HBM3". Raises MachineError for none."""
    properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
    library = _library()
    # The name comes first in every version of the structure; of CUDA 12 the one without _v2 is an older, smaller one.
    call = "cudaGetDeviceProperties_v2" if hasattr(library, "cudaGetDeviceProperties_v2") else "cudaGetDeviceProperties"
    _call(call, properties, ctypes.c_int(device))
    return properties.value.decode()


def compute_capability(device: int) -> tuple[int, int]:
    """(9, 0) for an H100, say. Raises MachineError where CUDA knows no such device."""
    found = []
    for attribute in _CAPABILITY:
        number = ctypes.c_int()
        _call("cudaDeviceGetAttribute", ctypes.byref(number), ctypes.c_int(attribute), ctypes.c_int(device))
        found.append(number.value)
    return found[0], found[1]


def pci_address(device: int) -> str:
    """Where the GPU is that CUDA numbers so in this process, such as "0000:3b:00.0".

    CUDA numbers the fastest first unless CUDA_DEVICE_ORDER says otherwise, and only those in CUDA_VISIBLE_DEVICES; NVML
    numbers all by their place on the bus. The address is the same for both. Raises MachineError where CUDA knows none.
    """
    text = ctypes.create_string_buffer(32)
    _call("cudaDeviceGetPCIBusId", text, ctypes.c_int(len(text)), ctypes.c_int(device))
    return text.value.decode()


def _free(name: str, pointer: ctypes.c_void_p) -> None:
    """Without looking at the status: at the end of a process CUDA may be gone before what was allocated of it."""
    getattr(_library(), name)(pointer)


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
