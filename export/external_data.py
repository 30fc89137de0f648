"""ONNX models beyond what one protobuf message holds: the graph in one file, its weights in another beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx import TensorProto

from dlops.directory import payload_name

# Offsets of a page, so that ONNX Runtime maps the weights and does not copy them.
_PAGE = 4096


def weight_bytes(model: onnx.ModelProto) -> int:
    """What the initializers take. `ByteSize` would serialize the model, which fails where that is the question."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def write_in_two(model: onnx.ModelProto, into: Path) -> Path:
    """Write the graph to `into` and its weights to a file in the same folder, whose path is returned.

    That file's name holds its digest, as a payload's does, because the graph names it. Initializers smaller than a page
    stay in the graph. `model` is emptied of the others.
    """
    temporary = into.with_suffix(".data")
    digest = hashlib.sha256()
    moved: list[tuple[TensorProto, int, int]] = []
    end = 0
    with temporary.open("wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) < _PAGE:
                continue
            for content in (bytes(-end % _PAGE), tensor.raw_data):
                file.write(content)
                digest.update(content)
                end += len(content)
            moved.append((tensor, end - len(tensor.raw_data), len(tensor.raw_data)))
    weights = into.with_name(payload_name("weights.data", digest.hexdigest()))
    temporary.rename(weights)
    for tensor, offset, length in moved:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", weights.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    into.write_bytes(model.SerializeToString(deterministic=True))
    return weights
