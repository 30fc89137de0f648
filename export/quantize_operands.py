"""Operands of convolutions and matrix products rounded to 8 bits around the products alone, symmetric: fp8, or int8 for
TensorRT.

Weights have a scale a channel, activations one from calibration samples; biases, sums and all else stay as they are. It
is what GPUs multiply, and the form in which TensorRT takes it. ONNX Runtime's CPU provider rounds so and computes in
fp32, so that such a graph is checked anywhere. Scales put the largest magnitude at the largest number: fp8 keeps small
numbers apart by itself, and clipping would only lose large ones.

No zero points are written. Opset 21 does without; and where there is one of fp8, of value 0, ONNX Runtime (1.31) takes
it for that of uint8: it drops a ReLU before the rounding, which changes every answer, and makes a QLinearConv, which
has no fp8.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dlops.errors import GateError
from dlops.export.quantize import Notes, drop_unused, is_chosen
from dlops.export.quantize_static import Calibrated

Number = Literal["fp8", "int8"]
# The first opset whose QuantizeLinear says by an attribute what it rounds to.
OPSET = 21
# Of float8_e4m3fn, which has no infinity, and of a symmetric int8.
LARGEST: dict[Number, float] = {"fp8": 448.0, "int8": 127.0}
_TYPES: dict[Number, int] = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}
_NAMES: dict[Number, str] = {"fp8": "float8_e4m3fn", "int8": "int8"}
# Its parameters have another shape from that opset on.
_CHANGED = "GroupNormalization"
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_FP8_CHANNELS, _FP8_PLACES = 16, 32
_INT8_CHANNELS, _INT8_KERNEL = 16, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedOperands(Calibrated):
    """The graph and ranges that int8 is made of, quantized around products alone.

    stored: weights are written rounded, a quarter of their size. Without it the graph is for TensorRT: weights stay
    floats that are rounded where they are read, and convolutions that it has no such kernels for stay as they are.
    """

    precision: Number
    stored: bool

    @classmethod
    def of(cls, found: Calibrated, precision: Number, *, stored: bool) -> CalibratedOperands:
        return cls(
            model=found.model, ranges=found.ranges, samples=found.samples, method=found.method, title=found.title,
            precision=precision, stored=stored,
        )  # fmt: skip

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """The model with the operands of its products in 8 bits.

        only: names of the nodes to quantize, all if empty. excluded: names of those that stay as they are. Raises
        GateError where a node has no form in opset 21.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        _raise_opset(model, title=self.title)
        graph = model.graph
        largest = {name: _largest(data.range_value) for name, data in self.ranges.items()}
        made = _Made(graph, largest, self.precision, stored=self.stored)
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            wanted = node.op_type in _PRODUCTS and is_chosen(node, only, excluded)
            if wanted and made.has_both(node) and (self.stored or made.has_kernel(node)):
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
        name = _NAMES[self.precision]
        return {
            "calibration_samples": self.samples,
            "calibration_method": self.method,
            "activations": name,
            "weights": f"{name} per channel",
            "quantize_nodes": sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node),
        }


def to_fp8(weight: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """A weight as float8_e4m3fn and its scale for each index along `axis`: weight ≈ float8 × scale."""
    scale = _weight_scale(weight, axis, "fp8")
    return (weight / scale).astype(ml_dtypes.float8_e4m3fn), scale.reshape(-1)


class _Made:
    """What was added to a graph, each tensor rounded once however many nodes read it."""

    def __init__(self, graph: onnx.GraphProto, largest: dict[str, float], number: Number, *, stored: bool) -> None:
        self._graph, self._largest, self._number, self._stored = graph, largest, number, stored
        self._weights = {one.name: one for one in graph.initializer if one.data_type == TensorProto.FLOAT}
        self._names: dict[tuple[str, int | None], str] = {}

    def has_both(self, node: onnx.NodeProto) -> bool:
        """Whether both operands are fp32 weights or activations whose range is known."""
        return all(name in self._weights or name in self._largest for name in node.input[:2])

    def has_kernel(self, node: onnx.NodeProto) -> bool:
        """Whether TensorRT multiplies it in 8 bits: for others it builds no engine, or a slower one.

        The rules are those by which NVIDIA's Model Optimizer leaves convolutions out: for fp8 those of 16 channels or
        fewer in or out of a group, depthwise ones among them, and kernels of more than 32 places; for int8 those of
        less than 16, unless they are in blocks of 8.
        """
        weight = self._weights.get(node.input[1])
        if node.op_type != "Conv" or weight is None:
            return True
        out, per_group, *kernel = weight.dims
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if self._number == "fp8":
            return bool(out > _FP8_CHANNELS and per_group > _FP8_CHANNELS and math.prod(kernel) <= _FP8_PLACES)
        if out >= _INT8_CHANNELS and per_group >= _INT8_CHANNELS:
            return True
        if groups == 1:
            return (out % 8 == 0 or per_group % 8 == 0) and len(set(kernel)) == 1
        return bool(out % 8 == 0 and min(kernel, default=0) >= _INT8_KERNEL)

    def rounded(self, node: onnx.NodeProto, place: int) -> tuple[list[onnx.NodeProto], str]:
        """The nodes to put before `node`, none where they are there already, and the name it is to read."""
        name = node.input[place]
        axis = _channels(node, place, len(self._weights[name].dims)) if name in self._weights else None
        if (name, axis) in self._names:
            return [], self._names[name, axis]
        # Two nodes may read one weight along different axes.
        base = f"{name}_{self._number}" if axis is None else f"{name}_{axis}_{self._number}"
        self._names[name, axis] = f"{base}_dequantized"
        nodes = self._activation(name, base) if axis is None else self._weight(name, base, axis)
        return list(nodes), self._names[name, axis]

    def _activation(self, name: str, base: str) -> Iterator[onnx.NodeProto]:
        scale = _scale(np.float32(self._largest[name]), self._number)
        self._graph.initializer.append(numpy_helper.from_array(scale, f"{base}_scale"))
        yield self._quantize(name, base)
        yield helper.make_node("DequantizeLinear", [base, f"{base}_scale"], [f"{base}_dequantized"], f"{base}_back")

    def _weight(self, name: str, base: str, axis: int) -> Iterator[onnx.NodeProto]:
        weight = numpy_helper.to_array(self._weights[name])
        scale = _weight_scale(weight, axis, self._number)
        self._graph.initializer.append(numpy_helper.from_array(scale.reshape(-1), f"{base}_scale"))
        if not self._stored:
            yield self._quantize(name, base, axis=axis)
        elif self._number == "fp8":
            values = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
            self._graph.initializer.append(
                helper.make_tensor(base, TensorProto.FLOAT8E4M3FN, values.shape, values.tobytes(), raw=True)
            )
        else:
            self._graph.initializer.append(numpy_helper.from_array(np.rint(weight / scale).astype(np.int8), base))
        yield helper.make_node(
            "DequantizeLinear", [base, f"{base}_scale"], [f"{base}_dequantized"], f"{base}_back", axis=axis
        )

    def _quantize(self, name: str, base: str, *, axis: int = 1) -> onnx.NodeProto:
        """axis: of the scales, where there are several."""
        return helper.make_node(
            "QuantizeLinear", [name, f"{base}_scale"], [base], f"{base}_quantize", output_dtype=_TYPES[self._number],
            axis=axis,
        )  # fmt: skip


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


def _weight_scale(weight: NDArray[np.float32], axis: int, number: Number) -> NDArray[np.float32]:
    """Of the weight's number of dims, one along all but `axis`."""
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    return _scale(np.abs(weight).max(axis=others, keepdims=True, initial=0.0), number)


def _scale(largest: NDArray[np.float32] | np.float32, number: Number) -> NDArray[np.float32]:
    # What is always zero has no size to go by.
    return np.asarray(np.where(largest > 0, largest / LARGEST[number], 1), np.float32)
