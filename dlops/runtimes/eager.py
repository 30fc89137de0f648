"""A torch module run as it is: the reference that parity and speed-ups are counted from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from dlops.environment import available_cores
from dlops.errors import MachineError
from dlops.runtimes.session import Placement, SessionOptions, check_bound, check_graph, graph_provider
from dlops.signature import Feed, Signature
from dlops.tensors import to_array, to_tensor

# Libraries choose algorithms and TorchScript compiles in the first runs; none of that may be captured.
_WARMUP_RUNS = 3


class ModuleSession:
    """Any callable module, eager or scripted. Outputs come back as numpy arrays on the host."""

    def __init__(
        self, module: Callable[..., object], *, signature: Signature, runtime: str, precision: str,
        device: torch.device, options: SessionOptions | None = None,
    ) -> None:  # fmt: skip
        options = options or SessionOptions()
        self._module = module
        self._graph = options.cuda_graph
        self._device = device
        per_thread = options.stream_per_thread and device.type == "cuda"
        self._streams = ThreadStreams(lambda: torch.cuda.Stream(device)) if per_thread else None  # type: ignore[no-untyped-call]
        self.signature = signature
        count = options.threads or available_cores()
        # torch has one thread count a process, so it is set here and not at every run.
        torch.set_num_threads(count)
        self.placement = Placement(
            runtime=runtime, device=str(device), provider=graph_provider(device.type, options), precision=precision,
            threads=count,
        )  # fmt: skip

    def run(self, feed: Feed) -> Feed:
        # Arrays that a server parsed out of a body are read-only; torch warns about those, and nothing writes here.
        tensors = [to_tensor(_writable(feed[spec.name])) for spec in self.signature.inputs]
        # The copies of the results belong to the same stream: they wait for it, and for no other thread's.
        with torch.inference_mode(), self._own_stream():
            result = self._module(*(tensor.to(self._device) for tensor in tensors))
            return outputs_by_name(result, self.signature)

    def bind(self, feed: Feed) -> ModuleBound:
        return ModuleBound(self._module, feed, signature=self.signature, device=self._device, graph=self._graph)

    def close(self) -> None:
        del self._module

    def _own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._streams is None else torch.cuda.stream(self._streams.mine())


class ThreadStreams:
    """A CUDA stream for each thread that asks, made when it first does: torch has all threads on the default one."""

    def __init__(self, make: Callable[[], torch.cuda.Stream]) -> None:
        self._make, self._kept = make, threading.local()

    def mine(self) -> torch.cuda.Stream:
        if not hasattr(self._kept, "stream"):
            self._kept.stream = self._make()
        stream: torch.cuda.Stream = self._kept.stream
        return stream


class ModuleBound:
    """Input tensors that stay on the device; the module allocates its outputs there in each run, or a graph once."""

    def __init__(
        self, module: Callable[..., object], feed: Feed, *, signature: Signature, device: torch.device,
        graph: bool = False,
    ) -> None:  # fmt: skip
        self._module, self._signature, self._device = module, signature, device
        self._like = {spec.name: feed[spec.name] for spec in signature.inputs}
        self._inputs = [to_tensor(_writable(array)).to(device, copy=True) for array in self._like.values()]
        self._result: object = None
        self._graph = self._capture() if graph else None
        self.run()
        self.synchronize()

    @property
    def stream(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    @property
    def enqueues(self) -> bool:
        return self._device.type == "cuda"

    def copy_in(self, feed: Feed) -> None:
        check_bound(self._like, feed)
        for name, tensor in zip(self._like, self._inputs, strict=True):
            tensor.copy_(to_tensor(_writable(feed[name])))

    def run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        with torch.inference_mode():
            self._result = self._module(*self._inputs)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The inference as a graph over the inputs' addresses, after warming up on a stream other than the default."""
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(_WARMUP_RUNS):
                self._module(*self._inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            self._result = self._module(*self._inputs)
        return graph

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def copy_out(self) -> Feed:
        # On the CPU the arrays above share memory with the module's results, which may be its inputs.
        return {name: np.array(array) for name, array in outputs_by_name(self._result, self._signature).items()}


def open_eager(module: torch.nn.Module, signature: Signature, options: SessionOptions | None = None) -> ModuleSession:
    """A session over an eager module, put into eval mode."""
    options = options or SessionOptions()
    device = choose_device(options)
    return ModuleSession(
        module.to(device).eval(), signature=signature, runtime="eager", precision="fp32", device=device,
        options=options,
    )  # fmt: skip


def open_compiled(
    module: torch.nn.Module, signature: Signature, options: SessionOptions | None = None
) -> ModuleSession:
    """The same through torch.compile, whose first call for each shape compiles: it takes seconds to minutes."""
    options = options or SessionOptions()
    device = choose_device(options)
    compiled = torch.compile(module.to(device).eval())
    return ModuleSession(
        compiled, signature=signature, runtime="torch.compile", precision="fp32", device=device,
        options=options,
    )  # fmt: skip


def choose_device(options: SessionOptions) -> torch.device:
    available = torch.cuda.is_available()
    if options.device == "tensorrt":
        raise MachineError(
            "TensorRT was asked for, which torch's modules do not run on here",
            hint="--device cuda; ONNX artifacts run on TensorRT",
        )
    if options.device == "cuda" and not available:
        raise MachineError(
            "CUDA was asked for, and torch finds no GPU here",
            hint="dlops doctor shows what works; --device cpu runs on the CPU",
        )
    device = torch.device("cuda:0" if available and options.device != "cpu" else "cpu")
    check_graph(options, device.type)
    return device


def outputs_by_name(result: object, signature: Signature) -> dict[str, np.ndarray]:
    """A module's return value as arrays under the signature's names. Raises as `ordered_outputs` does."""
    values = ordered_outputs(result, signature)
    return {spec.name: to_array(value.detach().cpu()) for spec, value in zip(signature.outputs, values, strict=True)}


def ordered_outputs(result: object, signature: Signature) -> list[torch.Tensor]:
    """A module's return value (tensor, sequence or mapping) as tensors in the signature's order.

    Raises ValueError where it gives another number of outputs.
    """
    if isinstance(result, torch.Tensor):
        values = [result]
    elif isinstance(result, Mapping):
        values = [result[spec.name] for spec in signature.outputs]
    elif isinstance(result, (tuple, list)):
        values = list(result)
    else:
        raise TypeError(f"a module returned {type(result).__name__}, not tensors")
    if len(values) != len(signature.outputs):
        raise ValueError(f"it gives {len(values)} outputs, the signature has {len(signature.outputs)}")
    return values


def _writable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()
