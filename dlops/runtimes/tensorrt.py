"""A TensorRT engine: native code for one kind of GPU and one version of TensorRT, loaded into this process.

Without torch: memory, streams and graphs come from the CUDA runtime library. The calls of TensorRT are those of its
Python API from 10.0 on (IExecutionContext.execute_async_v3).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorrt as trt

from dlops.artifact import Artifact
from dlops.cudart import DeviceBuffer, Graph, Stream, device_name
from dlops.errors import CorruptError, MachineError
from dlops.runtimes.session import Placement, SessionOptions, check_bound, graph_provider
from dlops.signature import Array, Feed, Signature
from dlops.trust import trusted_model

# Chooses kernels in the first runs, none of which may be captured.
_WARMUP_RUNS = 3
_SPARSITY = "(Sparsity)"


class Log(trt.ILogger):  # type: ignore[misc]
    """What TensorRT says is wrong, instead of on stderr. sparsity: what it says of weights with zeros."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._error = self._warning = ""
        self.sparsity: list[str] = []

    def log(self, severity: object, message: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self._error = message
        elif severity == trt.ILogger.WARNING:
            self._warning = message
        elif message.startswith(_SPARSITY):
            self.sparsity.append(message.removeprefix(_SPARSITY).strip())

    @property
    def reason(self) -> str:
        """The last error in one line; without any the last warning, which is all that a failing CUDA may give."""
        return " ".join((self._error or self._warning).split())[:300] or "it does not say why"


def made(make: Callable[[Log], Any], log: Log) -> Any:
    """A builder or a runtime. Raises MachineError where CUDA does not start, which is a TypeError there."""
    try:
        return make(log)
    except TypeError as error:
        raise MachineError(
            f"TensorRT {trt.__version__} does not start: {log.reason}",
            hint="CUDA 13 takes driver 580 or later; dlops doctor shows the GPU",
        ) from error


class TensorrtSession:
    """An engine, and as many execution contexts as there are threads that call it at once."""

    def __init__(
        self, engine: bytes, *, signature: Signature, precision: str, options: SessionOptions, title: str
    ) -> None:
        """Raises CorruptError where TensorRT cannot load the engine, or it is not what the signature says."""
        self.signature = signature
        self._title = title
        self._log = Log()
        # Held for as long as the engine is.
        self._runtime = made(trt.Runtime, self._log)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise CorruptError(
                f"{title}: TensorRT {trt.__version__} cannot load it: {self._log.reason}",
                hint="export it again on this machine",
            )
        _check_names(self._engine, signature, title=title)
        self._lock = threading.Lock()
        self._idle: list[_Caller] = []
        self._graph = options.cuda_graph
        self.placement = Placement(
            runtime="tensorrt", device="cuda:0", provider=graph_provider("TensorRT", options), precision=precision,
            threads=1,
        )  # fmt: skip

    def run(self, feed: Feed) -> Feed:
        with self._lock:
            caller = self._idle.pop() if self._idle else None
        caller = caller or self._caller()
        # After an error it is dropped, and its memory with it: what its stream holds then is anyone's guess.
        caller.copy_in(feed)
        caller.enqueue()
        outputs = caller.copy_out()
        with self._lock:
            self._idle.append(caller)
        return outputs

    def bind(self, feed: Feed) -> TensorrtBound:
        return TensorrtBound(self._caller(), feed, graph=self._graph)

    def close(self) -> None:
        with self._lock:
            for caller in self._idle:
                caller.close()
            self._idle.clear()
        del self._engine, self._runtime

    def _caller(self) -> _Caller:
        context = self._engine.create_execution_context()
        if context is None:
            raise MachineError(
                f"{self._title}: TensorRT cannot make an execution context: {self._log.reason}",
                hint="memory of the GPU is the usual reason: fewer callers at once",
            )
        return _Caller(context, self.signature, log=self._log, title=self._title)


class TensorrtBound:
    """One execution context over buffers that stay where they are, or a CUDA graph of it."""

    def __init__(self, caller: _Caller, feed: Feed, *, graph: bool) -> None:
        self._caller = caller
        self._like = {spec.name: feed[spec.name] for spec in caller.signature.inputs}
        caller.copy_in(feed)
        for _ in range(_WARMUP_RUNS):
            caller.enqueue()
        caller.stream.synchronize()
        self._graph = Graph(caller.stream, caller.enqueue) if graph else None
        self.run()
        self.synchronize()

    @property
    def stream(self) -> int | None:
        return self._caller.stream.handle

    @property
    def enqueues(self) -> bool:
        return True

    def copy_in(self, feed: Feed) -> None:
        check_bound(self._like, feed)
        self._caller.copy_in(feed)
        self.synchronize()

    def run(self) -> None:
        if self._graph is not None:
            self._graph.launch()
        else:
            self._caller.enqueue()

    def synchronize(self) -> None:
        self._caller.stream.synchronize()

    def copy_out(self) -> Feed:
        return self._caller.copy_out()


class _Caller:
    """An execution context with a stream and a buffer for every tensor of its own: one call at a time."""

    def __init__(self, context: trt.IExecutionContext, signature: Signature, *, log: Log, title: str) -> None:
        self.signature, self.stream = signature, Stream()
        self._context, self._log, self._title = context, log, title
        self._buffers: dict[str, DeviceBuffer] = {}
        # Until the stream was synchronized: a copy may read them after it was asked for.
        self._given: dict[str, Array] = {}
        self._outputs: dict[str, tuple[int, ...]] = {}

    def copy_in(self, feed: Feed) -> None:
        """Put a feed on the device, and have room for what it will give."""
        for spec in self.signature.inputs:
            array = self._given[spec.name] = np.asarray(feed[spec.name], order="C")
            if not self._context.set_input_shape(spec.name, array.shape):
                raise MachineError(
                    f"{self._title}: TensorRT does not take {spec.name}{list(array.shape)}: {self._log.reason}"
                )
            self._buffer(spec.name, array.nbytes).write(array, self.stream)
        for spec in self.signature.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if any(dim < 0 for dim in shape):
                raise MachineError(
                    f"{self._title}: the size of {spec.name}{list(shape)} depends on the data",
                    hint="engines give outputs of known sizes here; take the onnx artifact",
                )
            self._outputs[spec.name] = shape
            self._buffer(spec.name, int(np.prod(shape)) * np.dtype(spec.dtype).itemsize)

    def enqueue(self) -> None:
        """Put one inference on the stream."""
        if not self._context.execute_async_v3(self.stream.handle):
            raise MachineError(f"{self._title}: TensorRT did not run it: {self._log.reason}")

    def copy_out(self) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for spec in self.signature.outputs:
            found[spec.name] = np.empty(self._outputs[spec.name], spec.dtype)
            self._buffers[spec.name].read_into(found[spec.name], self.stream)
        self.stream.synchronize()
        return found

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self.stream.close()
        del self._context

    def _buffer(self, name: str, size: int) -> DeviceBuffer:
        """The tensor's own, at the same address for as long as it is large enough."""
        found = self._buffers.get(name)
        if found is not None and found.size >= size:
            return found
        if found is not None:
            self.stream.synchronize()
            found.close()
        buffer = self._buffers[name] = DeviceBuffer(size)
        if not self._context.set_tensor_address(name, buffer.address):
            raise MachineError(f"{self._title}: TensorRT takes no buffer for {name}: {self._log.reason}")
        return buffer


def open_session(artifact: Artifact, options: SessionOptions) -> TensorrtSession:
    """Raises UsageError where the engine was not made here and is not trusted, MachineError where it is for another GPU
    or TensorRT than those of this machine, or the CPU is asked for.
    """
    if options.device == "cpu":
        raise MachineError(
            f"{artifact.title}: an engine runs on a GPU alone", hint="--device cuda, or the onnx artifact on the CPU"
        )
    check_gpu(title=artifact.title)
    with trusted_model(artifact, options) as path:
        _check_machine(artifact)
        return TensorrtSession(
            path.read_bytes(), signature=artifact.signature, precision=artifact.variant.precision, options=options,
            title=artifact.title,
        )  # fmt: skip


def check_gpu(*, title: str) -> str:
    """The name of the GPU here. Raises MachineError where there is none."""
    try:
        return device_name(0)
    except MachineError as error:
        raise MachineError(
            f"{title}: TensorRT's engines are built and run on an NVIDIA GPU, and CUDA finds none: {error.message}",
            hint="dlops doctor shows what works; onnx artifacts run on the CPU",
        ) from None


def _check_machine(artifact: Artifact) -> None:
    notes: Mapping[str, object] = artifact.provenance.notes
    here = {"tensorrt": str(trt.__version__), "gpu": check_gpu(title=artifact.title)}
    for what, found in here.items():
        if notes.get(what) != found:
            raise MachineError(
                f"{artifact.title}: the engine was built for {what} {notes.get(what, 'unknown')}, and here is {found}",
                hint="export it again on this machine; onnx artifacts run on any",
            )


def _check_names(engine: trt.ICudaEngine, signature: Signature, *, title: str) -> None:
    found = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
    for wanted, mode in ((signature.inputs, trt.TensorIOMode.INPUT), (signature.outputs, trt.TensorIOMode.OUTPUT)):
        names = [name for name in found if engine.get_tensor_mode(name) == mode]
        if sorted(names) != sorted(spec.name for spec in wanted):
            raise CorruptError(
                f"{title}: the signature has {', '.join(spec.name for spec in wanted)}, the engine {', '.join(names)}"
            )
        for spec in wanted:
            found_dtype = engine.get_tensor_dtype(spec.name)
            try:
                fits = np.dtype(trt.nptype(found_dtype)) == np.dtype(spec.dtype)
            except TypeError:  # one that numpy has not
                fits = False
            if not fits:
                raise CorruptError(
                    f"{title}: {spec.name} is {spec.dtype} by the signature, {found_dtype} in the engine"
                )
