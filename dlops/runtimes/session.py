"""The shape of what runs an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from dlops.errors import MachineError
from dlops.signature import Feed, Signature

Device = Literal["auto", "cpu", "cuda", "tensorrt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """device: "auto" takes CUDA where it works and says so in the placement; "cuda" fails where it does not; "tensorrt"
    is CUDA's device by ONNX Runtime's TensorRT provider, for ONNX artifacts.

    threads: for one operator; None for as many as this process may use. spin: whether idle threads spin between runs,
    which is faster for one model alone on a machine and slower for everything beside it. profile_prefix: how the path
    of the profile begins that ONNX Runtime is to record; the other runtimes are profiled from outside. own_stream: on
    CUDA, one that the session alone uses, so that bound calls return before they are done and can be timed.
    stream_per_thread: on CUDA, runs of several threads at once are each on a stream of their own, and so may overlap;
    not together with own_stream, which has one for all. cuda_graph: bound calls replay a CUDA graph that is captured
    when they are bound; refused on the CPU. trust: run native code that was made elsewhere.
    """

    device: Device = "auto"
    threads: int | None = None
    spin: bool = True
    profile_prefix: Path | None = None
    own_stream: bool = False
    stream_per_thread: bool = False
    cuda_graph: bool = False
    trust: bool = False

    def __post_init__(self) -> None:
        if self.own_stream and self.stream_per_thread:
            raise ValueError("a session has one stream for all threads, or one for each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What truly runs: runtime "onnxruntime", device "cpu" or "cuda:0", provider "CPUExecutionProvider", say.

    precision: what the kernels compute in, which may be wider than what the file stores. nodes: for each provider how
    many nodes of the graph it was given, by operator; empty where the runtime does not tell.
    """

    runtime: str
    device: str
    provider: str
    precision: str
    threads: int
    nodes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class Session(Protocol):
    """Open until `close`. `run` may be called by several threads at once; where a runtime cannot (ExecuTorch), the
    calls wait for one another."""

    @property
    def signature(self) -> Signature: ...

    @property
    def placement(self) -> Placement: ...

    def run(self, feed: Feed) -> Feed:
        """Outputs by name. The feed must fit the signature: check it where it comes in, not here."""

    def bind(self, feed: Feed) -> Bound:
        """A call for feeds of this one's shapes, this one copied in. Runs once, to learn the shapes of outputs."""

    def close(self) -> None: ...


class Bound(Protocol):
    """A call whose inputs and outputs lie where the model runs, at one address for as long as it is held.

    Used from one thread, while its session is open. An output with a named dim that no input has is made anew by each
    run, the others are written where the last run wrote them.
    """

    @property
    def stream(self) -> int | None:
        """The handle of the CUDA stream that runs are put on; None where there is none to time."""

    @property
    def enqueues(self) -> bool:
        """Whether `run` returns once the inference is enqueued, and so before it is done."""

    def copy_in(self, feed: Feed) -> None:
        """Copy a feed to the inputs; the copy is complete when this returns.

        Raises ValueError where shapes or dtypes are not those that were bound.
        """

    def run(self) -> None:
        """One inference on what was copied in. On a GPU it may return before that is done."""

    def synchronize(self) -> None:
        """Wait until the inference is done; at once on the CPU."""

    def copy_out(self) -> Feed:
        """The outputs of the last run, after `synchronize`, as arrays on the host that no later run changes."""


def check_graph(options: SessionOptions, device: str) -> None:
    """Raise MachineError where a CUDA graph is asked for and the device is none of CUDA's."""
    if options.cuda_graph and not device.startswith("cuda"):
        raise MachineError(
            "a CUDA graph was asked for, and this would run on the CPU",
            hint="leave --cuda-graph out; dlops doctor shows whether CUDA works here",
        )


def check_cpu(options: SessionOptions, *, title: str, runtime: str) -> None:
    """Raise MachineError where CUDA, or a graph of it, is asked for of a runtime that has only the CPU."""
    if options.device in ("cuda", "tensorrt"):
        asked = "CUDA" if options.device == "cuda" else "TensorRT"
        raise MachineError(
            f"{title}: {asked} was asked for, which {runtime} does not run on",
            hint="--device cpu; onnx and torchscript artifacts run on CUDA, onnx on TensorRT",
        )
    check_graph(options, "cpu")


def graph_provider(provider: str, options: SessionOptions) -> str:
    """What a placement calls the provider: rows that replay a graph are told from those that do not."""
    return f"{provider}, CUDA graph" if options.cuda_graph else provider


def check_bound(bound: Feed, feed: Feed) -> None:
    """Raise ValueError unless the feed has the shapes and dtypes of the one that was bound.

    Runtimes would cast, or copy the bytes of another dtype as they are.
    """
    for name, like in bound.items():
        array = feed[name]
        if array.shape != like.shape or array.dtype != like.dtype:
            raise ValueError(
                f"{name}: {array.dtype}{list(array.shape)} given, {like.dtype}{list(like.shape)} was bound: bind each"
                " shape on its own"
            )
