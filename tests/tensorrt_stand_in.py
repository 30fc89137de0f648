"""In place of TensorRT and the CUDA runtime library, where there is no GPU: engines are graphs, memory is the host's.

It holds to what the documentation of both says of the calls that dlops makes, and no more: tests/gpu runs the real.
"""

# ruff: noqa: N802 - CUDA names its calls so

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dlops import cudart

MAGIC = b"ftrt"
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class Cuda:
    """The calls of libcudart that dlops makes. capability: of the device. recording: what a stream captures."""

    def __init__(self) -> None:
        self.capability, self.name = (9, 0), b"NVIDIA H100 80GB HBM3"
        self.buffers: dict[int, Any] = {}
        self.streams = self.open_streams = self.copies = self.launches = self.locked = 0
        self.room = 2**40
        self.recording: list[Callable[[], None]] | None = None
        self._graphs: dict[int, list[Callable[[], None]]] = {}

    def cudaGetErrorString(self, status: int) -> bytes:
        return b"out of memory"

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        if size.value > self.room:
            return 2
        buffer = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(buffer)
        self.buffers[pointer._obj.value] = buffer
        return 0

    def cudaFree(self, address: Any) -> int:
        del self.buffers[address.value]
        return 0

    def cudaHostAlloc(self, pointer: Any, size: Any, flags: Any) -> int:
        self.locked += 1
        return self.cudaMalloc(pointer, size)

    def cudaFreeHost(self, address: Any) -> int:
        self.locked -= 1
        return self.cudaFree(address)

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, direction: int, stream: Any) -> int:
        device = to.value if direction == 1 else source.value
        assert size.value <= len(self.buffers[device])
        assert direction in (1, 2)
        ctypes.memmove(to.value, source.value, size.value)
        self.copies += 1
        return 0

    def cudaStreamCreateWithFlags(self, pointer: Any, flags: Any) -> int:
        self.streams += 1
        self.open_streams += 1
        pointer._obj.value = self.streams
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:
        self.open_streams -= 1
        return 0

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> int:
        self.recording = []
        return 0

    def cudaStreamEndCapture(self, stream: Any, graph: Any) -> int:
        assert self.recording is not None
        graph._obj.value = len(self._graphs) + 1
        self._graphs[graph._obj.value] = self.recording
        self.recording = None
        return 0

    def cudaGraphInstantiate(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = graph.value
        return 0

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> int:
        self.launches += 1
        for work in self._graphs[executable.value]:
            work()
        return 0

    def cudaDeviceGetAttribute(self, number: Any, attribute: Any, device: Any) -> int:
        number._obj.value = self.capability[attribute.value - 75]
        return 0

    def cudaGetDeviceProperties(self, properties: Any, device: Any) -> int:
        properties.value = self.name
        return 0 if self.name else 100

    def cudaGraphDestroy(self, graph: Any) -> int:
        del self._graphs[graph.value]
        return 0

    def cudaGraphExecDestroy(self, executable: Any) -> int:
        return 0


class _Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

    def __init__(self) -> None:
        pass


class _Monitor:
    def __init__(self) -> None:
        pass


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, name: str, *sizes: tuple[int, ...]) -> None:
        self.shapes[name] = sizes


class _Config:
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[_Profile] = []
        self.flags: list[str] = []

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return 0


class _Error:
    def __init__(self, operator: str) -> None:
        self._operator = operator

    def node_operator(self) -> str:
        return self._operator

    def desc(self) -> str:
        return "no importer registered"


class _Parser:
    """refuses: operators that there is no importer of."""

    refuses: tuple[str, ...] = ()

    def __init__(self, network: Any, logger: Any) -> None:
        self._network = network
        self._errors: list[_Error] = []

    def parse(self, model: bytes) -> bool:
        self._network["graph"] = model
        kinds = [node.op_type for node in onnx.load_from_string(model).graph.node]
        self._errors = [_Error(kind) for kind in kinds if kind in self.refuses]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, place: int) -> _Error:
        return self._errors[place]


class _Builder:
    """last: what was built last, for tests to look at. fails: what it says instead. starts: whether CUDA does."""

    last: tuple[onnx.ModelProto, _Config] | None = None
    fails = ""
    starts = True

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        if not self.starts:
            logger.log(_Logger.WARNING, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int) -> dict[str, bytes]:
        assert flags == 1
        return {}

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: dict[str, bytes], config: _Config) -> bytes | None:
        type(self).last = onnx.load_from_string(network["graph"]), config
        if self.fails:
            self._logger.log(_Logger.ERROR, self.fails)
            return None
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building", None, 4)
            for step in range(4):
                config.progress_monitor.phase_start("Tactics", "Building", 2)
                config.progress_monitor.phase_finish("Tactics")
                if not config.progress_monitor.step_complete("Building", step):
                    self._logger.log(_Logger.ERROR, "cancelled")
                    return None
        if "sparse" in config.flags:
            # As TensorRT logs it: https://github.com/NVIDIA/TensorRT/issues/2169
            for words in (
                "Layers eligible for sparse math: Conv_2 + Relu_3, Gemm_9",
                "TRT inference plan picked sparse implementation for layers: Gemm_9",
            ):
                self._logger.log(_Logger.INFO, f"(Sparsity) {words}")
        return MAGIC + network["graph"]


class _Context:
    def __init__(self, engine: _Engine, cuda: Cuda) -> None:
        self._engine, self._cuda = engine, cuda
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return all(size > 0 for size in shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        found = self._engine.session.run([name], self._feed(zeros=True))[0]
        return tuple(found.shape)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream > 0
        if self._cuda.recording is not None:
            self._cuda.recording.append(self._execute)
        else:
            self._execute()
        return True

    def _feed(self, *, zeros: bool = False) -> dict[str, np.ndarray]:
        feed = {}
        for one in self._engine.session.get_inputs():
            shape, dtype = self._shapes[one.name], np.dtype(_DTYPES[one.type])
            array = np.zeros(shape, dtype)
            if not zeros:
                ctypes.memmove(array.ctypes.data, self._addresses[one.name], array.nbytes)
            feed[one.name] = array
        return feed

    def _execute(self) -> None:
        names = [one.name for one in self._engine.session.get_outputs()]
        for name, array in zip(names, self._engine.session.run(names, self._feed()), strict=True):
            ctypes.memmove(self._addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)


class _Engine:
    def __init__(self, graph: bytes, cuda: Cuda) -> None:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
        self.session = ort.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])
        self._cuda = cuda
        self.contexts = 0

    @property
    def num_io_tensors(self) -> int:
        return len(self._all())

    def get_tensor_name(self, place: int) -> str:
        return self._all()[place].name

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in [one.name for one in self.session.get_inputs()] else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return next(_DTYPES[one.type] for one in self._all() if one.name == name)

    def create_execution_context(self) -> _Context:
        self.contexts += 1
        return _Context(self, self._cuda)

    def _all(self) -> list[Any]:
        return [*self.session.get_inputs(), *self.session.get_outputs()]


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Cuda]:
    """Put the stand-ins in place for a test; gives the module and the library."""
    cuda = Cuda()
    monkeypatch.setattr(cudart, "_library", lambda: cuda)
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = "10.13.3"
    module.ILogger, module.IProgressMonitor = _Logger, _Monitor
    module.Builder = type("Builder", (_Builder,), {})
    module.OnnxParser = type("OnnxParser", (_Parser,), {})
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=0)
    module.BuilderFlag = types.SimpleNamespace(SPARSE_WEIGHTS="sparse")
    module.TensorIOMode = types.SimpleNamespace(INPUT="input", OUTPUT="output")
    module.nptype = lambda dtype: dtype
    module.engines = []

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, engine: bytes) -> _Engine | None:
            if not engine.startswith(MAGIC):
                self._logger.log(_Logger.ERROR, "Magic tag does not match")
                return None
            module.engines.append(_Engine(engine.removeprefix(MAGIC), cuda))
            return module.engines[-1]

    module.Runtime = Runtime
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for name in ("dlops.runtimes.tensorrt", "dlops.export.to_tensorrt"):
        # Imported anew, and gone again after the test: setitem notes what was there, or that nothing was.
        monkeypatch.setitem(sys.modules, name, module)
        del sys.modules[name]
    return module, cuda
