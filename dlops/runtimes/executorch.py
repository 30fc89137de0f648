"""ExecuTorch on the CPU through its Python bindings, which need torch: what a phone runs, tried on this machine."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

# The compiled module itself: the Python around it imports the whole exporter for the sake of one warning, eight seconds
# of every process that loads a model. The version is pinned, and what is used of it is tested.
from executorch.extension.pybindings import _C as bindings  # noqa: N811

from dlops.artifact import Artifact
from dlops.environment import available_cores
from dlops.errors import CorruptError, MachineError, first_line
from dlops.model_file import format_of
from dlops.runtimes.session import Placement, SessionOptions, check_bound, check_cpu
from dlops.signature import Feed, Signature

if TYPE_CHECKING:
    from executorch.extension.pybindings.pybindings import ExecuTorchMethod, ExecuTorchProgram

METHOD = "forward"
DELEGATE = "XnnpackBackend"
# The provenance's note of which operators run where, and what runs those that no delegate took.
NODES, PORTABLE = "nodes", "portable kernels"


class ExecuTorchSession:
    """One loaded method. Calls from several threads wait for one another: its buffers are planned once."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        check_cpu(options, title=artifact.title, runtime="ExecuTorch's XNNPACK")
        # One pool a process, as torch's: what it says afterwards is what it has.
        bindings._unsafe_reset_threadpool(options.threads or available_cores())
        self._program = load_program(artifact.path("model"), title=artifact.title)
        self._method = load_method(self._program, title=artifact.title)
        self._lock = threading.Lock()
        self.signature = artifact.signature
        check_ports(self._method, self.signature, title=artifact.title)
        nodes = _recorded_nodes(artifact)
        self.placement = Placement(
            runtime="executorch",
            device="cpu",
            provider=PORTABLE if nodes and DELEGATE not in nodes else DELEGATE,
            precision=artifact.variant.precision,
            threads=int(bindings._threadpool_get_thread_count()),
            nodes=nodes,
        )

    def run(self, feed: Feed) -> Feed:
        tensors = [torch.from_numpy(_contiguous(feed[spec.name])) for spec in self.signature.inputs]
        with self._lock:
            results = self._method(tensors)
        return {spec.name: one.numpy() for spec, one in zip(self.signature.outputs, results, strict=True)}

    def bind(self, feed: Feed) -> ExecuTorchBound:
        return ExecuTorchBound(self, feed)

    def close(self) -> None:
        del self._method, self._program


class ExecuTorchBound:
    """Arrays that stay in place. ExecuTorch copies them into the memory that it planned, and its outputs out of it."""

    stream: int | None = None
    enqueues = False

    def __init__(self, session: ExecuTorchSession, feed: Feed) -> None:
        self._session = session
        self._inputs = {spec.name: np.array(feed[spec.name], order="C") for spec in session.signature.inputs}
        self.run()

    def copy_in(self, feed: Feed) -> None:
        check_bound(self._inputs, feed)
        for name, array in self._inputs.items():
            array[...] = feed[name]

    def run(self) -> None:
        self._outputs = self._session.run(self._inputs)

    def synchronize(self) -> None:
        """`run` has waited already."""

    def copy_out(self) -> Feed:
        # Each run gives arrays of its own.
        return self._outputs


def open_session(artifact: Artifact, options: SessionOptions) -> ExecuTorchSession:
    return ExecuTorchSession(artifact, options)


def load_program(path: Path, *, title: str) -> ExecuTorchProgram:
    """Raises CorruptError for a file that is none of ExecuTorch's, or cut short."""
    if format_of(path) != "executorch":
        raise CorruptError(f"{title}: {path} is not an ExecuTorch program", hint="export it again")
    try:
        return bindings._load_program(
            str(path), enable_etdump=False, debug_buffer_size=0,
            program_verification=bindings.Verification.InternalConsistency,
        )  # fmt: skip
    except RuntimeError as error:
        raise CorruptError(f"{title}: ExecuTorch cannot load it: {first_line(error)}") from error


def load_method(program: ExecuTorchProgram, *, title: str) -> ExecuTorchMethod:
    """Raises CorruptError where it has no such method, MachineError where this build lacks what the method needs."""
    if METHOD not in [program.get_method_name(number) for number in range(program.num_methods())]:
        raise CorruptError(f"{title}: it has no method {METHOD!r}", hint="export it again")
    try:
        return program.load_method(METHOD)
    except RuntimeError as error:
        raise MachineError(
            f"{title}: this ExecuTorch cannot run it: {first_line(error)}",
            hint="it lacks an operator or a delegate that the file needs: use the version that exported it",
        ) from error


def check_ports(method: ExecuTorchMethod, signature: Signature, *, title: str) -> None:
    """Raise CorruptError unless it takes and gives as many tensors as the signature, in those sizes at most."""
    meta = method.method_meta()
    for kind, specs, count, of in (
        ("inputs", signature.inputs, meta.num_inputs(), meta.input_tensor_meta),
        ("outputs", signature.outputs, meta.num_outputs(), meta.output_tensor_meta),
    ):
        if len(specs) != count:
            raise CorruptError(f"{title}: it has {count} {kind}, the signature {len(specs)}", hint="export it again")
        for place, spec in enumerate(specs):
            room = tuple(of(place).sizes())
            wanted = [signature.dims[dim].max if isinstance(dim, str) else dim for dim in spec.shape]
            short = len(room) != len(wanted) or any(has < need for has, need in zip(room, wanted, strict=True))
            if short and kind == "inputs":
                raise CorruptError(
                    f"{title}: {spec.name} has room for {list(room)}, the signature allows {wanted}",
                    hint="export it again",
                )


def _recorded_nodes(artifact: Artifact) -> Mapping[str, Mapping[str, int]]:
    """Which operators run where was decided at export: the file tells the runtime, and not us."""
    noted = artifact.provenance.notes.get(NODES)
    if not isinstance(noted, dict):
        return {}
    return {
        provider: {name: count for name, count in counts.items() if isinstance(count, int)}
        for provider, counts in noted.items()
        if isinstance(counts, dict)
    }


def _contiguous(array: np.ndarray) -> np.ndarray:
    # torch warns about arrays that are read-only, as those that a server parsed out of a body are.
    return np.array(array, order="C") if not (array.flags.writeable and array.flags.c_contiguous) else array
