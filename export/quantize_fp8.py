"""Static fp8 (E4M3) in ONNX: QDQ around convolutions and matrix products, weights with a scale a channel.

What GPUs of compute capability 8.9 and later multiply; ONNX Runtime's CPU provider rounds to fp8 and computes in fp32,
so that such a file is checked anywhere. Scales put the largest magnitude at the largest number of the format: a float
keeps small numbers apart by itself, and clipping would only lose large ones.

No zero points are written. Opset 21 does without; and where there is one, of value 0, ONNX Runtime (1.31) takes it for
that of uint8: it drops a ReLU before the rounding, which changes every answer, and makes a QLinearConv, which has no
fp8.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dlops.errors import GateError
from dlops.export.quantize import Notes, drop_unused
from dlops.export.quantize_static import Calibrated

# Of float8_e4m3fn, which has no infinity.
LARGEST = 448.0
# The first whose QuantizeLinear says by an attribute what it rounds to.
OPSET = 21
# Its parameters have another shape from that opset on.
_CHANGED = "GroupNormalization"
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedFp8(Calibrated):
    """The same graph and ranges, quantized to fp8 instead of int8."""

    precision: ClassVar[str] = "fp8"

    @classmethod
    def of(cls, found: Calibrated) -> CalibratedFp8:
        """From what int8 is made of."""
        return cls(
            model=found.model, ranges=found.ranges, samples=found.samples, method=found.method, title=found.title
        )

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """The model with the operands of its products in fp8; biases, sums and all else stay in fp32.

        only: names of the nodes to quantize, all if empty. excluded: names of those that stay in fp32. Raises GateError
        where a node has no form in opset 21.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        _raise_opset(model, title=self.title)
        graph = model.graph
        made = _Made(graph, {name: _largest(data.range_value) for name, data in self.ranges.items()})
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            wanted = node.op_type in _PRODUCTS and node.name not in excluded and (not only or node.name in only)
            if wanted and made.has_both(node):
                for place in (0, 1):
                    added, node.input[place] = made.rounded(node, place)
                    nodes += added
            nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unused(graph)
        return model

    def notes(self, quantized: onnx.ModelProto) -> Notes:
        """How it was made, for the provenance."""
        return {
            "calibration_samples": self.samples,
            "calibration_method": self.method,
            "activations": "float8_e4m3fn",
            "weights": "float8_e4m3fn per channel",
            "quantize_nodes": sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node),
        }


def to_fp8(weight: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """A weight as float8_e4m3fn and its scale for each index along `axis`: weight ≈ float8 × scale."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    scale = _scale(np.abs(weight).max(axis=others, keepdims=True, initial=0.0))
    return (weight / scale).astype(ml_dtypes.float8_e4m3fn), scale.reshape(-1)


class _Made:
    """What was added to a graph, each tensor rounded once however many nodes read it."""

    def __init__(self, graph: onnx.GraphProto, largest: dict[str, float]) -> None:
        self._graph, self._largest = graph, largest
        self._weights = {one.name: one for one in graph.initializer if one.data_type == TensorProto.FLOAT}
        self._names: dict[tuple[str, int | None], str] = {}

    def has_both(self, node: onnx.NodeProto) -> bool:
        """Whether both operands are fp32 weights or activations whose range is known."""
        return all(name in self._weights or name in self._largest for name in node.input[:2])

    def rounded(self, node: onnx.NodeProto, place: int) -> tuple[list[onnx.NodeProto], str]:
        """The nodes to put before `node`, none where they are there already, and the name it is to read."""
        name = node.input[place]
        axis = _channels(node, place, len(self._weights[name].dims)) if name in self._weights else None
        if (name, axis) in self._names:
            return [], self._names[name, axis]
        # Two nodes may read one weight along different axes.
        base = name if axis is None else f"{name}_{axis}"
        self._names[name, axis] = f"{base}_fp8_dequantized"
        nodes = list(self._weight(name, base, axis) if axis is not None else self._activation(name, base))
        return nodes, self._names[name, axis]

    def _activation(self, name: str, base: str) -> Iterator[onnx.NodeProto]:
        scale, fp8 = f"{base}_fp8_scale", f"{base}_fp8"
        self._graph.initializer.append(numpy_helper.from_array(_scale(np.float32(self._largest[name])), scale))
        yield helper.make_node(
            "QuantizeLinear", [name, scale], [fp8], name=f"{fp8}_quantize", output_dtype=TensorProto.FLOAT8E4M3FN
        )
        yield helper.make_node("DequantizeLinear", [fp8, scale], [f"{fp8}_dequantized"], name=f"{fp8}_back")

    def _weight(self, name: str, base: str, axis: int) -> Iterator[onnx.NodeProto]:
        values, scales = to_fp8(numpy_helper.to_array(self._weights[name]), axis=axis)
        scale, fp8 = f"{base}_fp8_scale", f"{base}_fp8"
        self._graph.initializer.append(
            helper.make_tensor(fp8, TensorProto.FLOAT8E4M3FN, values.shape, values.tobytes(), raw=True)
        )
        self._graph.initializer.append(numpy_helper.from_array(scales, scale))
        yield helper.make_node("DequantizeLinear", [fp8, scale], [f"{fp8}_dequantized"], name=f"{fp8}_back", axis=axis)


def _raise_opset(model: onnx.ModelProto, *, title: str) -> None:
    """Beside the one that is refused, opset 21 adds types to the operators of the one before."""
    if any(node.op_type == _CHANGED for node in model.graph.node):
        raise GateError(
            f"{title}: {_CHANGED} has another form in opset {OPSET}, which fp8 takes", hint="take onnx-int8"
        )
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = max(OPSET, entry.version)


def _channels(node: onnx.NodeProto, place: int, dims: int) -> int:
    """The axis along which a weight has the channels of the node's output."""
    if node.op_type == "Conv":
        return 0
    first, last = max(0, dims - 2), dims - 1
    if node.op_type == "MatMul":
        return last if place == 1 else first
    flag = "transB" if place == 1 else "transA"
    transposed = any(attribute.name == flag and attribute.i for attribute in node.attribute)
    return (first if transposed else last) if place == 1 else (last if transposed else first)


def _largest(ends: tuple[NDArray[np.float32], NDArray[np.float32]]) -> float:
    return max(abs(float(np.asarray(end).item())) for end in ends)


def _scale(largest: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    # What is always zero has no size to go by.
    return np.asarray(np.where(largest > 0, largest / LARGEST, 1), np.float32)
