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
}
# Between a weight and the operator that computes with it.
_PASSED_THROUGH = frozenset(
    {"Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """elements: number of weights in the file by ONNX type. users: the same by (type, operator that uses them)."""

    elements: Counter[str] = field(default_factory=Counter)
    users: Counter[tuple[str, str]] = field(default_factory=Counter)


def check_precision(model: onnx.ModelProto, precision: str, *, title: str, min_share: float = MIN_SHARE) -> None:
    """Raise GateError, naming the operators left over, unless `min_share` of the weights are in `precision`."""
    weights = stored_weights(model)
    total = weights.elements.total()
    if total == 0:
        raise GateError(f"{title}: {precision} was asked for, the written file holds no weights")
    quantized = any(node.op_type == "QuantizeLinear" for graph in _graphs(model.graph) for node in graph.node)
    kept = sum(count for kind, count in weights.elements.items() if kind in _STORED[precision])
    others = Counter({key: n for key, n in weights.users.items() if key[0] not in _STORED[precision]})
    if kept < min_share * total or quantized != (precision == "int8"):
        left = ", ".join(f"{user} ({count} in {kind})" for (kind, user), count in others.most_common(5))
        raise GateError(
            f"{title}: {precision} was asked for, {kept / total:.0%} of the weights in the written file are in it"
            f"{f'; left over: {left}' if left else ''}",
            hint=f"what is left over has no form in {precision} here: take another precision",
        )


def stored_weights(model: onnx.ModelProto) -> Weights:
    """Floats and quantized integers among the initializers; scales, zero points, shapes and indices are no weights."""
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
            count = math.prod(tensor.dims)
            found.elements[kind] += count
            for user in sorted(set(_users(tensor.name, readers))):
                found.users[kind, user] += count
    return found


def _is_weight(kind: str, uses: list[tuple[onnx.NodeProto, int]]) -> bool:
    scaling = [node.op_type in ("QuantizeLinear", "DequantizeLinear") and place > 0 for node, place in uses]
    if uses and all(scaling):
        return False
    if kind in _FLOATS:
        return True
    return kind in _STORED["int8"] and any(
        node.op_type == "DequantizeLinear" or "Integer" in node.op_type or node.op_type.startswith("QLinear")
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
