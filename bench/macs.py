"""Multiply-accumulates of an ONNX graph, from the shapes of its convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

Shape = Sequence[int]
# Where the input and the weights stand among a node's inputs; what else an operator computes is not counted.
_CONVOLUTIONS = {"Conv": (0, 1), "FusedConv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3)}
_PRODUCTS = {
    "MatMul": (0, 1), "FusedMatMul": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "Gemm": (0, 1),
    "QGemm": (0, 3),
}  # fmt: skip
# These run as one operator whose multiplications no shape here tells.
_UNCOUNTED = (
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "LSTM", "DynamicQuantizeLSTM", "GRU", "RNN",
    "Einsum", "Loop", "Scan", "If",
)  # fmt: skip


class UncountedError(Exception):
    """Why the MACs of a graph are not known."""


def count_onnx_macs(path: Path, *, batch: int) -> int:
    """Of one call of the model in that file, every input's symbolic first dimension being `batch`.

    Raises UncountedError where onnx is not installed, a shape stays open, or an operator is not counted.
    """
    try:
        import onnx
        from onnx import inliner, shape_inference
    except ModuleNotFoundError:
        raise UncountedError("the package onnx is not installed") from None
    try:
        # Weights beside the file are not needed: their shapes are in it.
        model = inliner.inline_local_functions(onnx.load(str(path), load_external_data=False))
        _fix_batch(model, batch)
        # With values propagated, as reshapes compute their shapes from constants.
        model = shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # noqa: BLE001 - onnx raises classes of protobuf and of its own
        raise UncountedError(f"onnx cannot infer its shapes: {str(error).splitlines()[0][:200]}") from None
    return graph_macs(model.graph)


def graph_macs(graph: onnx.GraphProto) -> int:
    """Of a graph whose shapes are inferred. Raises UncountedError where one that is needed stays open."""
    shapes = _shapes(graph)
    total = 0
    for node in graph.node:
        if node.op_type in _UNCOUNTED:
            raise UncountedError(f"its {node.op_type} is not counted")
        if node.op_type in _CONVOLUTIONS:
            _, weight = (_known(shapes, node, node.input[place]) for place in _CONVOLUTIONS[node.op_type])
            output = _known(shapes, node, node.output[0])
            # Every output value is the sum over the weights of one output channel.
            total += math.prod(output) * math.prod(weight[1:])
        elif node.op_type == "ConvTranspose":
            taken, weight = (_known(shapes, node, name) for name in node.input[:2])
            # Every input value goes through the weights of its channel.
            total += math.prod(taken) * math.prod(weight[1:])
        elif node.op_type in _PRODUCTS:
            left, _ = (_known(shapes, node, node.input[place]) for place in _PRODUCTS[node.op_type])
            output = _known(shapes, node, node.output[0])
            transposed = _attribute(node, "transA")
            total += math.prod(output) * left[-2 if transposed and len(left) > 1 else -1]
    return total


def _fix_batch(model: onnx.ModelProto, batch: int) -> None:
    """The symbols that stand first in an input become `batch` wherever they stand."""
    weights = {one.name for one in model.graph.initializer}
    symbols = set()
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in weights and dims and not dims[0].HasField("dim_value"):
            symbols.add(dims[0].dim_param)
            dims[0].dim_value = batch
    for value in (*model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in symbols:
                dim.dim_value = batch
    if any(symbol for symbol in symbols):
        # What the exporter wrote down for one symbol may be an expression of it: inference finds it anew.
        del model.graph.value_info[:]


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int | None]]:
    shapes: dict[str, list[int | None]] = {one.name: list(one.dims) for one in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and value.name not in shapes:
            shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return shapes


def _known(shapes: Mapping[str, Sequence[int | None]], node: onnx.NodeProto, name: str) -> list[int]:
    dims = shapes.get(name)
    if dims is None or any(dim is None for dim in dims):
        raise UncountedError(f"the shape of {name!r} at {node.op_type} {node.name!r} stays open")
    return [dim for dim in dims if dim is not None]


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((one.i for one in node.attribute if one.name == name), 0)
