"""What the weights of an ONNX file are stored in, by operator: the precision that was asked for must be theirs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx

from dlops.errors import GateError

# Norms, embeddings of a few rows and the like may stay wider; the weights that make the size and the speed may not.
MIN_SHARE = 0.9
# Where layers were returned to fp32 on purpose: below this the file is int8 in name only.
MIN_REPAIRED_SHARE = 0.5
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
_STORED = {
    "fp32": frozenset({"FLOAT", "DOUBLE"}),
    "fp16": frozenset({"FLOAT16"}),
    # Biases of quantized layers are int32, in the scale of their products.
    "int8": frozenset({"INT8", "UINT8", "INT32"}),
    "int8dyn": frozenset({"INT8", "UINT8"}),
    "int8wo": frozenset({"INT8"}),
    "fp8": frozenset({"FLOAT8E4M3FN"}),
}
_QUANTIZED = _STORED["int8"] | _STORED["fp8"]
# Where arithmetic leaves the narrow type before a bias is added, biases and scales are fp32 by design: matrices decide.
_MATRICES_ALONE = frozenset({"int8dyn", "int8wo", "fp8"})
# The operators that round activations, one of which the file must have, and no other.
_DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeLSTM"})
_STATIC = frozenset({"QuantizeLinear"})
_QUANTIZING = {"int8": _STATIC, "fp8": _STATIC, "int8dyn": _DYNAMIC}
# Between a weight and the operator that computes with it.
_PASSED_THROUGH = frozenset(
    {"Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)
# The first input of these that is a scale or a zero point; all after it are, too.
_FIRST_SCALE = {
    "QuantizeLinear": 1, "DequantizeLinear": 1, "ConvInteger": 2, "MatMulInteger": 2, "DynamicQuantizeLSTM": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """elements: number of weights in the file by ONNX type. users: the same by (type, operator that uses them)."""

    elements: Counter[str] = field(default_factory=Counter)
    users: Counter[tuple[str, str]] = field(default_factory=Counter)


def check_precision(model: onnx.ModelProto, precision: str, *, title: str, min_share: float = MIN_SHARE) -> None:
    """Raise GateError, naming the operators left over, unless the file is what `precision` says.

    `min_share` of the weights must be stored in it, and activations quantized as it says or not at all.
    """
    weights = stored_weights(model, matrices_alone=precision in _MATRICES_ALONE)
    total = weights.elements.total()
    if total == 0 and precision != "fp32":
        raise GateError(f"{title}: {precision} was asked for, the written file holds no weights")
    kept = sum(count for kind, count in weights.elements.items() if kind in _STORED[precision])
    others = Counter({key: n for key, n in weights.users.items() if key[0] not in _STORED[precision]})
    if kept < min_share * total:
        left = ", ".join(f"{user} ({count} in {kind})" for (kind, user), count in others.most_common(5))
        raise GateError(
            f"{title}: {precision} was asked for, {kept / total:.0%} of the weights in the written file are in it"
            f"{f'; left over: {left}' if left else ''}",
            hint=f"what is left over has no form in {precision} here: take another precision",
        )
    wanted = _QUANTIZING.get(precision, frozenset())
    found = {node.op_type for graph in _graphs(model.graph) for node in graph.node} & {"QuantizeLinear", *_DYNAMIC}
    if not found <= wanted or bool(found) != bool(wanted):
        raise GateError(
            f"{title}: {precision} was asked for, and the written file quantizes activations by "
            f"{', '.join(sorted(found)) or 'nothing'}, not by {' or '.join(sorted(wanted)) or 'nothing'}"
        )


def rounded_share(model: onnx.ModelProto) -> float:
    """Of the weights that are matrices, the share that is read through a QuantizeLinear alone; 0 without any."""
    matrices = {one.name: math.prod(one.dims) for one in model.graph.initializer if _is_matrix(one)}
    readers = Counter(
        (name, node.op_type == "QuantizeLinear") for node in model.graph.node for name in node.input if name in matrices
    )
    rounded = sum(size for name, size in matrices.items() if readers[name, True] and not readers[name, False])
    return float(rounded / max(1, sum(matrices.values())))


def stored_weights(model: onnx.ModelProto, *, matrices_alone: bool = False) -> Weights:
    """Floats and quantized numbers among the initializers; scales, zero points, shapes and indices are no weights.

    matrices_alone: without the floats that are a vector, along whichever axis.
    """
    found = Weights()
    for graph in _graphs(model.graph):
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in graph.node:
            for place, name in enumerate(node.input):
                readers.setdefault(name, []).append((node, place))
        for tensor in graph.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            uses = readers.get(tensor.name, [])
            if not _is_weight(kind, uses):
                continue
            if matrices_alone and kind in _FLOATS and not _is_matrix(tensor):
                continue
            count = math.prod(tensor.dims)
            found.elements[kind] += count
            for user in sorted(set(_users(tensor.name, readers))):
                found.users[kind, user] += count
    return found


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    """A float that is more than a vector, along whichever axis."""
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    return kind in _FLOATS and sum(dim > 1 for dim in tensor.dims) > 1


def _is_weight(kind: str, uses: list[tuple[onnx.NodeProto, int]]) -> bool:
    if uses and all(place >= _FIRST_SCALE.get(node.op_type, math.inf) for node, place in uses):
        return False
    if kind in _FLOATS:
        return True
    return kind in _QUANTIZED and any(
        node.op_type in _FIRST_SCALE or "Integer" in node.op_type or node.op_type.startswith("QLinear")
        for node, _ in uses
    )


def _users(name: str, readers: dict[str, list[tuple[onnx.NodeProto, int]]]) -> Iterator[str]:
    """Types of the operators that compute with a tensor, past those that only reshape or convert it."""
    for node, _ in readers.get(name, []):
        if node.op_type in _PASSED_THROUGH:
            for output in node.output:
                yield from _users(output, readers)
        else:
            yield node.op_type


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)
