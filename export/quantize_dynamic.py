"""Dynamic int8 for ONNX Runtime: weights with a scale a channel, activations with one that each call takes anew."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic
from onnxruntime.quantization.onnx_model import ONNXModel

from dlops.errors import GateError
from dlops.export.quantize import (
    Notes,
    drop_unused,
    explained,
    float_weights,
    is_chosen,
    name_nodes,
    quantizing,
    rounded,
    saturates,
)

# What ONNX Runtime's own quantizer turns into operators that have kernels on the CPU; Gemm becomes MatMul before.
_PRODUCTS = ("MatMul", "LSTM")
INTEGER_OPERATORS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM")
# ConvInteger's CPU kernel takes unsigned weights with one zero point alone.
_MIDDLE = 128
_MIDDLE_NAME = "dlops_weight_zero_point"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """An fp32 graph whose products can be put on integers, with the range of an activation from each call's whole
    batch: a `Quantizer`."""

    model: onnx.ModelProto
    title: str
    precision: Literal["int8dyn"] = "int8dyn"
    operators: ClassVar[frozenset[str]] = frozenset({*_PRODUCTS, "Conv"})

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """The model with its matrix products, LSTMs and convolutions on integers.

        Raises GateError where it has none of those operators with weights of its own.
        """
        # The quantizer writes into the model that it is given.
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        with tempfile.TemporaryDirectory(prefix="dlops-quantize-") as name:
            folder, products = Path(name), Path(name, "products.onnx")
            with explained(title=self.title, folder=folder, model_bytes=model.ByteSize()):
                ort_quantize_dynamic(
                    model,
                    products,
                    op_types_to_quantize=list(_PRODUCTS),
                    nodes_to_quantize=list(only),
                    nodes_to_exclude=list(excluded),
                    per_channel=True,
                    reduce_range=saturates(),
                    weight_type=QuantType.QInt8,
                    extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True},
                )
                result = onnx.load(products)
        _quantize_convolutions(result.graph, lambda node: is_chosen(node, only, excluded))
        kinds = _kinds(result)
        if not any(kinds[kind] for kind in INTEGER_OPERATORS):
            raise GateError(
                f"{self.title}: int8dyn has nothing to quantize: no MatMul, Gemm, LSTM or Conv with weights of its own "
                f"among its operators ({', '.join(sorted(kinds))})",
                hint="take another precision: onnx-fp16, say",
            )
        return result

    def notes(self, quantized: onnx.ModelProto) -> Notes:
        """How it was made, for the provenance."""
        kinds = _kinds(quantized)
        # Products of unsigned with unsigned, as in the convolutions, do not overflow.
        reduced = saturates() and kinds["ConvInteger"] < sum(kinds[kind] for kind in INTEGER_OPERATORS)
        return {
            "activations": "uint8, a scale each call",
            "weights": "int8 per channel" + (", 7 bits in matrix products" if reduced else ""),
            **{f"{kind}_nodes": kinds[kind] for kind in INTEGER_OPERATORS if kinds[kind]},
        }


def prepare_dynamic(model: onnx.ModelProto, *, title: str) -> Dynamic:
    """Prepare an fp32 model for dynamic int8. Raises GateError where ONNX Runtime cannot take the model."""
    with quantizing(model, title=title) as (_, prepared):
        whole = ONNXModel(onnx.load(prepared))
        # The quantizer would do so by itself, and its nodes would have other names than those that are kept out.
        whole.replace_gemm_with_matmul()
    named = _without_shapes_of_weights(whole.model)
    name_nodes(named)
    return Dynamic(model=named, title=title)


def _kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _without_shapes_of_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """ONNX Runtime's quantizer transposes the weight of a Gemm and leaves its old shape written down beside it."""
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return model


def _quantize_convolutions(graph: onnx.GraphProto, is_wanted: Callable[[onnx.NodeProto], bool]) -> None:
    """Each convolution that is wanted and has a weight of its own as ConvInteger, in place.

    ONNX Runtime's quantizer gives the whole weight one scale; here each output channel has its own, which is multiplied
    in afterwards, beside the activation's.
    """
    weights = float_weights(graph)
    nodes: list[onnx.NodeProto] = []
    added: dict[str, onnx.TensorProto] = {}
    quantized: set[str] = set()
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in weights or not is_wanted(node):
            nodes.append(node)
            continue
        source, name, output = node.input[0], node.input[1], node.output[0]
        if source not in quantized:
            quantized.add(source)
            pieces = [f"{source}_{piece}" for piece in ("dlops_uint8", "dlops_scale", "dlops_zero_point")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [source], pieces))
        values, scale = rounded(numpy_helper.to_array(weights[name]), axis=0)
        across = [1, len(scale), *[1] * (values.ndim - 2)]
        added |= {
            f"{name}_uint8": numpy_helper.from_array((values.astype(np.int16) + _MIDDLE).astype(np.uint8)),
            f"{name}_scale": numpy_helper.from_array(scale.reshape(across)),
            _MIDDLE_NAME: numpy_helper.from_array(np.array(_MIDDLE, np.uint8)),
        }
        integer = helper.make_node(
            "ConvInteger",
            [f"{source}_dlops_uint8", f"{name}_uint8", f"{source}_dlops_zero_point", _MIDDLE_NAME],
            [f"{output}_int32"],
        )
        integer.attribute.extend(node.attribute)
        biased = len(node.input) > 2 and bool(node.input[2])
        nodes += [
            integer,
            helper.make_node("Cast", [f"{output}_int32"], [f"{output}_sum"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{source}_dlops_scale", f"{name}_scale"], [f"{output}_scales"]),
            helper.make_node(
                "Mul", [f"{output}_sum", f"{output}_scales"], [f"{output}_scaled" if biased else output]
            ),
        ]  # fmt: skip
        if biased:
            shape = f"{output}_bias_shape"
            added[shape] = numpy_helper.from_array(np.array([1, -1, *[1] * (values.ndim - 2)], np.int64))
            nodes += [
                helper.make_node("Reshape", [node.input[2], shape], [f"{output}_bias"]),
                helper.make_node("Add", [f"{output}_scaled", f"{output}_bias"], [output]),
            ]
    for name, tensor in added.items():
        tensor.name = name
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added.values())
    drop_unused(graph)
