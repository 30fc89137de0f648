"""What every quantization of an ONNX file shares: its form, its preparation, weights as integers, and its failures."""

from __future__ import annotations

import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.shape_inference import quant_pre_process

from dlops.environment import describe_environment
from dlops.errors import GateError, from_os_error
from dlops.signature import Array, Feed

Notes = dict[str, str | int | float | bool]
# Symmetric, so that zero is exact and no zero point is added in the products.
_LARGEST = 127


class Quantizer(Protocol):
    """An fp32 graph and what makes its quantized form, whole or in part.

    model: batch norms folded, every node with a name of its own. operators: the types of those that it quantizes.
    """

    @property
    def model(self) -> onnx.ModelProto: ...
    @property
    def title(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def operators(self) -> frozenset[str]: ...

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """A new graph. only: names of the nodes to quantize, all if empty. excluded: of those that stay in fp32.

        Raises GateError where nothing of it can be quantized.
        """
        ...

    def notes(self, quantized: onnx.ModelProto) -> Notes:
        """How a graph of it was made, for the provenance."""
        ...


def is_chosen(node: onnx.NodeProto, only: Collection[str], excluded: Collection[str]) -> bool:
    """Whether `Quantizer.quantize` is to take this node, by its name."""
    return node.name not in excluded and (not only or node.name in only)


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own: nodes are kept out of quantization by name, and names may be left out."""
    taken = {""}
    for place, node in enumerate(model.graph.node):
        if node.name in taken:
            node.name = f"{node.op_type}_{place}"
        taken.add(node.name)


@contextmanager
def quantizing(model: onnx.ModelProto, *, title: str) -> Iterator[tuple[Path, Path]]:
    """A temporary folder and in it the prepared model's file: batch norms are folded into the layers before them.

    Inside it ONNX Runtime's quantizer prints nothing. What it raises or logs as an error comes out as GateError, or
    MachineError where the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="dlops-quantize-") as name:
        folder = Path(name)
        source, prepared = folder / "source.onnx", folder / "prepared.onnx"
        source.write_bytes(model.SerializeToString())
        with explained(title=title, folder=folder, model_bytes=model.ByteSize()):
            # Symbolic inference is for transformers, and adds nothing to shapes that the exporter already inferred.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            yield folder, prepared


@contextmanager
def explained(*, title: str, folder: Path | None = None, model_bytes: int = 0) -> Iterator[None]:
    """Let ONNX Runtime's quantizer print nothing, and make a GateError of what it raises or logs as an error.

    folder: where it writes, if it does: then MachineError where the disk has no room for twice `model_bytes`.
    """
    try:
        with _strict_and_quiet():
            yield
    except Exception as error:  # ORT raises classes of its own beside ValueError, RuntimeError and AssertionError
        if folder is not None:
            _check_room(error, folder, model_bytes, title=title)
        raise GateError(f"{title}: ONNX Runtime cannot quantize it: {error}") from error


def rounded(weight: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight as int8 from -127 to 127 and its scale for each index along `axis`: weight ≈ int8 × scale."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    # A channel of zeros has no size to go by.
    scale = np.where(largest > 0, largest / _LARGEST, 1).astype(np.float32)
    values = np.clip(np.rint(weight / scale), -_LARGEST, _LARGEST).astype(np.int8)
    return values, scale.reshape(-1)


def float_weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The float32 initializers by name that are more than a vector: what a scale a channel makes smaller."""
    return {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and sum(dim > 1 for dim in tensor.dims) > 1
    }


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads and no output gives."""
    used = {name for node in graph.node for name in _read(node)} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def spread(feed: Feed, limit: int) -> dict[str, Array]:
    """At most `limit` samples, evenly over the whole set: sets are often sorted by class."""
    count = len(next(iter(feed.values())))
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
    return {name: array[chosen] for name, array in feed.items()}


def saturates() -> bool:
    """Whether this CPU adds u8 × s8 products in 16 bits, which overflow unless weights keep to 7 bits."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not {"avx512_vnni", "avx_vnni"} & set(describe_environment().instruction_sets)


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those inside its branches among them."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for part in inner.node:
                yield from _read(part)
            yield from (value.name for value in inner.output)


def _check_room(error: BaseException, folder: Path, model_bytes: int, *, title: str) -> None:
    """Raise MachineError where `error` comes from a disk that is full.

    ORT's own writer says nothing where it runs out of space, and the cut file then fails to parse: so a file that is
    large enough for the next step is tried beside it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            raise from_os_error(cause, doing=f"quantizing {title}") from error
        cause = cause.__cause__ or cause.__context__
    try:
        Path(folder, "room").write_bytes(bytes(2 * model_bytes))
    except OSError as full:
        raise from_os_error(full, doing=f"quantizing {title}") from error


class _Raise(logging.Handler):
    """ORT's pre-processing logs that it failed and carries on with the model as it was."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(record.getMessage())


@contextmanager
def _strict_and_quiet() -> Iterator[None]:
    """What ORT's quantizer logs as an error is raised.

    Its advice (to pre-process first, which is done) and the progress that it prints are dropped.
    """
    handler = _Raise(level=logging.ERROR)
    logger = logging.getLogger("onnxruntime.quantization")
    disabled = logging.root.manager.disable
    logger.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logging.disable(disabled)
        logger.removeHandler(handler)
