"""Preprocessing and probabilities as ONNX nodes around a finished graph, so that every precision has the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dlops.export.raw_inputs import RawInputs
from dlops.export.resampling import FIXED_POINT, resampling_weights, taken_pixels
from dlops.preprocess import CenterCrop, Normalize, Resize, Scale, Step, crop_start, resized_size
from dlops.tasks.classification import LABEL, PROBABILITIES

_PREFIX = "dlops_raw"


def graft(model: onnx.ModelProto, raw: RawInputs) -> onnx.ModelProto:
    """The model, changed in place: from raw inputs, through the steps inside, to probabilities and labels.

    Resizing is Pillow's, bit for bit, by two products in float64; the other steps are float32 in the order of
    `Preprocess`.
    """
    graph = model.graph
    spec = raw.signature.inputs[0]
    tensor, logits = graph.input[0].name, graph.output[0].name
    before = _Nodes()
    name = spec.name
    if spec.dtype == "uint8":
        height, width = (int(dim) for dim in spec.shape[1:3])
        name = before.add("Transpose", [name], perm=[0, 3, 1, 2])
        name = _geometry(before, name, raw.inside, (height, width))
        name = before.add("Cast", [name], to=TensorProto.FLOAT)
    axes = 2 if spec.dtype == "uint8" else 0
    for step in raw.inside:
        if isinstance(step, (Scale, Normalize)):
            name = _rescale(before, name, step, axes)
    before.nodes.append(helper.make_node("Identity", [name], [tensor]))
    after = _Nodes()
    after.nodes.append(helper.make_node("Softmax", [logits], [PROBABILITIES], axis=-1))
    after.nodes.append(helper.make_node("ArgMax", [logits], [LABEL], axis=1, keepdims=0))
    nodes = [*before.nodes, *graph.node, *after.nodes]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    for values, specs in ((graph.input, raw.signature.inputs), (graph.output, raw.signature.outputs)):
        for one in specs:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(one.dtype))
            values.append(helper.make_tensor_value_info(one.name, kind, list(one.shape)))
    return model


class _Nodes:
    """Nodes in order, each with one output of a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{_PREFIX}_{len(self.nodes)}_{kind.lower()}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, array: NDArray[np.generic]) -> str:
        """A node and no initializer: these are no weights of the model, and its precision is not theirs."""
        return self.add("Constant", [], value=numpy_helper.from_array(array))


def _geometry(nodes: _Nodes, name: str, steps: Sequence[Step], size: tuple[int, int]) -> str:
    """Resizes and crops of (n, channels, height, width) whose size is known, on whole numbers from 0 to 255."""
    height, width = size
    for step in steps:
        if isinstance(step, Resize):
            wide, high = resized_size(step, width, height)
            for axis, source, target in ((3, width, wide), (2, height, high)):
                name = _resized(nodes, name, axis, source, target, step)
            height, width = high, wide
        elif isinstance(step, CenterCrop):
            name = _cropped(nodes, name, (height, width), step.size)
            height, width = step.size
    return name


def _resized(nodes: _Nodes, name: str, axis: int, source: int, target: int, step: Resize) -> str:
    if source == target:
        return name
    if step.interpolation == "nearest":
        return nodes.add("Gather", [name, nodes.constant(taken_pixels(source, target))], axis=axis)
    weights = resampling_weights(source, target, step.interpolation)
    wide = nodes.add("Cast", [name], to=TensorProto.DOUBLE)
    # Whole numbers below 2^53 all along, so the sums are exact in whatever order they are made.
    if axis == 3:
        summed = nodes.add("MatMul", [wide, nodes.constant(np.ascontiguousarray(weights.T))])
    else:
        summed = nodes.add("MatMul", [nodes.constant(weights), wide])
    rounded = nodes.add("Add", [summed, nodes.constant(np.array(FIXED_POINT / 2))])
    whole = nodes.add("Floor", [nodes.add("Mul", [rounded, nodes.constant(np.array(1 / FIXED_POINT))])])
    return nodes.add("Clip", [whole, nodes.constant(np.array(0.0)), nodes.constant(np.array(255.0))])


def _cropped(nodes: _Nodes, name: str, size: tuple[int, int], wanted: tuple[int, int]) -> str:
    starts = [crop_start(now, then) for now, then in zip(size, wanted, strict=True)]
    first = [max(start, 0) for start in starts]
    last = [min(start + then, now) for start, then, now in zip(starts, wanted, size, strict=True)]
    bounds = [nodes.constant(np.array(values, np.int64)) for values in (first, last, [2, 3])]
    name = nodes.add("Slice", [name, *bounds])
    missing = [max(-start, 0) for start in starts]
    behind = [max(start + then - now, 0) for start, then, now in zip(starts, wanted, size, strict=True)]
    if not any((*missing, *behind)):
        return name
    # In float64: what a resize gives already, and what all versions of the operator have.
    wide = nodes.add("Cast", [name], to=TensorProto.DOUBLE)
    return nodes.add("Pad", [wide, nodes.constant(np.array([0, 0, *missing, 0, 0, *behind], np.int64))])


def _rescale(nodes: _Nodes, name: str, step: Scale | Normalize, axes: int) -> str:
    if isinstance(step, Scale):
        return nodes.add("Mul", [name, nodes.constant(np.array(step.factor, np.float32))])
    mean, std = (np.array(values, np.float32).reshape(-1, *[1] * axes) for values in (step.mean, step.std))
    return nodes.add("Div", [nodes.add("Sub", [name, nodes.constant(mean)]), nodes.constant(std)])
