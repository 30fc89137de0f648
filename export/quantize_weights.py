"""Weight-only int8: weights stored with a scale a channel and a DequantizeLinear in front, arithmetic in fp32."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx
from onnx import helper, numpy_helper

from dlops.errors import GateError
from dlops.export.quantize import Notes, drop_unused, float_weights, is_chosen, name_nodes, quantizing, rounded

# Which input of an operator is a weight, and along which of its axes lie the output channels.
_WEIGHT_AXES: dict[str, tuple[tuple[int, int], ...]] = {
    "Conv": ((1, 0),),
    "ConvTranspose": ((1, 1),),
    "MatMul": ((0, -2), (1, -1)),
    "Gather": ((0, 0),),
    "GRU": ((1, 1), (2, 1)),
    "LSTM": ((1, 1), (2, 1)),
    "RNN": ((1, 1), (2, 1)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsAlone:
    """An fp32 graph whose weights can be stored as int8, to be widened before they are used: a `Quantizer`."""

    model: onnx.ModelProto
    title: str
    precision: Literal["int8wo"] = "int8wo"
    operators: ClassVar[frozenset[str]] = frozenset({*_WEIGHT_AXES, "Gemm"})

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """The model with int8 weights. Vectors (biases, norms) stay in fp32.

        Raises GateError where the model has no weight to quantize.
        """
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        graph = result.graph
        weights = float_weights(graph)
        widened: dict[str, onnx.NodeProto] = {}
        for node in graph.node:
            if not is_chosen(node, only, excluded):
                continue
            for place, axis in _places(node):
                name = node.input[place]
                if name not in weights:
                    continue
                if name not in widened:
                    values, scale = rounded(numpy_helper.to_array(weights[name]), axis=axis)
                    pieces = [f"{name}_int8", f"{name}_scale"]
                    graph.initializer.append(numpy_helper.from_array(values, pieces[0]))
                    graph.initializer.append(numpy_helper.from_array(scale, pieces[1]))
                    widened[name] = helper.make_node(
                        "DequantizeLinear", pieces, [f"{name}_fp32"], axis=axis % values.ndim
                    )
                node.input[place] = f"{name}_fp32"
        if not widened:
            kinds = ", ".join(sorted({node.op_type for node in graph.node}))
            raise GateError(
                f"{self.title}: int8wo has nothing to quantize: no operator with a matrix of weights among {kinds}",
                hint="take another precision: onnx-fp16, say",
            )
        nodes = [*widened.values(), *graph.node]
        del graph.node[:]
        graph.node.extend(nodes)
        drop_unused(graph)
        return result

    def notes(self, quantized: onnx.ModelProto) -> Notes:
        """How it was made, for the provenance."""
        widened = sum(node.op_type == "DequantizeLinear" for node in quantized.graph.node)
        return {"weights": "int8 per channel", "arithmetic": "fp32", "dequantize_nodes": widened}


def prepare_weights(model: onnx.ModelProto, *, title: str) -> WeightsAlone:
    """Prepare an fp32 model for int8 weights. Raises GateError where ONNX Runtime cannot take the model."""
    with quantizing(model, title=title) as (_, prepared):
        named = onnx.load(prepared)
    name_nodes(named)
    return WeightsAlone(model=named, title=title)


def _places(node: onnx.NodeProto) -> Iterator[tuple[int, int]]:
    """(input, axis of its output channels) for each weight that the operator takes."""
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        yield 1, 0 if transposed else 1
        return
    yield from _WEIGHT_AXES.get(node.op_type, ())
