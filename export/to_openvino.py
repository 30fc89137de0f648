"""OpenVINO IR: our ONNX graph, quantized by us for int8, as the .xml and .bin that OpenVINO's own tools read.

docs/decisions/006-openvino-through-onnx.md says why int8 goes through our own quantization.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import torch
from openvino import opset13 as opset

from dlops.artifact import Precision
from dlops.embedded import RT_INFO
from dlops.errors import GateError, MachineError, UsageError
from dlops.export.formats import Exported, ExportRequest, check_embedded
from dlops.export.precision import MIN_REPAIRED_SHARE, MIN_SHARE
from dlops.export.to_onnx import calibrated, fp32_graph, strip
from dlops.runtimes.openvino import reason_of
from dlops.signature import Signature, TensorSpec

_UNSUPPORTED = re.compile(r"No conversion rule found for operations: (.+)")
_LARGEST_HALF = 65504.0
_INTEGERS = ("i8", "u8")
_STORED: dict[Precision, tuple[str, ...]] = {
    "fp32": ("f32", "f64"),
    "fp16": ("f16",),
    "bf16": ("bf16",),
    "int8": _INTEGERS,
}
_FLOATS = ("f64", "f32", "f16", "bf16")
# Biases and scales stay in fp32 there: matrices decide.
_MATRICES_ALONE = ("bf16", "int8")
# Between a weight and the operator that computes with it.
_PASSED_THROUGH = frozenset({"Convert", "Reshape", "Squeeze", "Subtract", "Transpose", "Unsqueeze"})
_ON_ACTIVATIONS = "FakeQuantize"


def export(request: ExportRequest) -> Exported:
    """Write the module to `request.into`, an .xml, and its weights beside it, and check on both what was asked for.

    Raises UsageError where the module has what ONNX or OpenVINO cannot hold (the operator is named), GateError where
    the written files' names, dtypes, dims or weights are others than those asked for.
    """
    graph, notes = fp32_graph(request), {"openvino": ov.__version__}
    precision = request.variant.precision
    if precision == "int8":
        ranges = calibrated(request)
        graph = ranges.quantize(excluded=request.excluded)
        notes |= ranges.notes(graph)
    model = _converted(graph, request)
    match precision:
        case "fp16":
            _check_range(model, title=request.title)
        case "bf16":
            _narrow(model)
    weights = _save(model, request.into, half=precision == "fp16", title=request.title)
    written = ov.Core().read_model(request.into, weights)
    check_written(
        written, request.signature, precision=precision, title=request.title,
        min_share=MIN_REPAIRED_SHARE if request.excluded else MIN_SHARE,
    )  # fmt: skip
    check_embedded(request)
    if request.excluded:
        _check_smaller(request, weights)
    return Exported(path=request.into, extra={"weights": weights}, together=True, notes=notes)


def check_written(
    model: ov.Model, signature: Signature, *, precision: Precision, title: str, min_share: float = MIN_SHARE
) -> None:
    """Raise GateError unless the model has the names, dtypes, dims and precision that were asked for.

    min_share: of the weights, the fraction that must be stored in the precision.
    """
    for kind, specs, ports in (
        ("input", signature.inputs, model.inputs), ("output", signature.outputs, model.outputs),
    ):  # fmt: skip
        if len(specs) != len(ports):
            raise GateError(f"{title}: {len(specs)} {kind}s asked for, the written file has {len(ports)}")
        for spec, port in zip(specs, ports, strict=True):
            found = f"{'/'.join(sorted(port.get_names()))}: {port.element_type.to_dtype().name}{port.partial_shape}"
            if spec.name not in port.get_names() or not _fits(port, spec, signature, exact=kind == "input"):
                raise GateError(
                    f"{title}: {kind} {spec.name}: {spec.dtype}[{', '.join(map(str, spec.shape))}] was asked for, "
                    f"the written file has {found}"
                )
    _check_precision(model, precision, title=title, min_share=min_share)


def _converted(graph: onnx.ModelProto, request: ExportRequest) -> ov.Model:
    """Read by OpenVINO's own ONNX front end; `openvino.convert_model` would do the same and report that it did."""
    strip(graph)
    try:
        # A core for each: the model holds what it needs of it.
        model = ov.Core().read_model(graph.SerializeToString())
        # The ranges of named dims go into the file: then OpenVINO refuses a batch beyond them, too.
        model.reshape({spec.name: _bounded(spec, request.signature) for spec in request.signature.inputs})
    except RuntimeError as error:
        lacking = _UNSUPPORTED.search(str(error))
        problem = f"has no form of the operator {lacking[1]} in" if lacking else f"cannot take ({reason_of(error)})"
        raise UsageError(
            f"{request.title}: OpenVINO {problem} this module",
            hint="replace it by operators that OpenVINO has, or export to onnx",
        ) from error
    known = {name for node in graph.graph.node for name in (node.name, *node.input, *node.output)}
    known |= {value.name for value in (*graph.graph.input, *graph.graph.initializer)}
    _rename(model, known)
    if request.embedded is not None:
        for key, text in request.embedded.to_texts().items():
            model.set_rt_info(text, [RT_INFO, key])
    return model


def _rename(model: ov.Model, known: set[str]) -> None:
    """Number the operators that OpenVINO added: it counts on through a process, so that each export had other names.

    known: names in the ONNX graph, which stay, and the first part of what OpenVINO made of them.
    """
    nodes = model.get_ordered_ops()
    added = [node for node in nodes if node.friendly_name.partition("/")[0] not in known]
    taken = {node.friendly_name for node in nodes} - {node.friendly_name for node in added}
    counts: Counter[str] = Counter()
    for node in added:
        kind = node.get_type_name()
        while (name := f"{kind}_{counts[kind]}") in taken:
            counts[kind] += 1
        taken.add(name)
        node.set_friendly_name(name)


def _bounded(spec: TensorSpec, signature: Signature) -> ov.PartialShape:
    return ov.PartialShape([ov.Dimension(*_range(dim, signature)) for dim in spec.shape])


def _range(dim: int | str, signature: Signature) -> tuple[int, int]:
    if isinstance(dim, int):
        return dim, dim
    limits = signature.dims[dim]
    return limits.min, limits.max


def _fits(port: Any, spec: TensorSpec, signature: Signature, *, exact: bool) -> bool:
    """exact: named dims have their very ranges; of outputs OpenVINO may know less, but never one size alone."""
    shape = port.partial_shape
    if port.element_type.to_dtype().name != spec.dtype or shape.rank.is_dynamic or len(shape) != len(spec.shape):
        return False
    for found, dim in zip(shape, spec.shape, strict=True):
        low, high = _range(dim, signature)
        same = (found.get_min_length(), found.get_max_length()) == (low, high)
        if not same and (exact or isinstance(dim, int) or found.is_static):
            return False
    return True


def _save(model: ov.Model, path: Path, *, half: bool, title: str) -> Path:
    """Write the pair; the path of the weights. Raises MachineError where the disk is full."""
    try:
        ov.save_model(model, path, compress_to_fp16=half)
    except RuntimeError as error:
        raise MachineError(
            f"{title}: OpenVINO cannot write it: {reason_of(error)}", hint="free some space and run it again"
        ) from error
    return path.with_suffix(".bin")


def _check_range(model: ov.Model, *, title: str) -> None:
    """Raise GateError for a weight that half precision cannot hold: OpenVINO would clip it."""
    for node in _constants(model):
        if _kind(node) == "f32" and node.get_byte_size():
            largest = float(np.abs(node.get_data()).max())
            if largest > _LARGEST_HALF:
                raise GateError(f"{title}: a weight does not fit half precision: {largest:.4g} in {node.friendly_name}")


def _narrow(model: ov.Model) -> None:
    """Store weights in bfloat16 and widen them where they are read. OpenVINO's own compression knows fp16 alone."""
    for node in _constants(model):
        if _kind(node) != "f32" or not _is_matrix(node):
            continue
        readers = list(node.output(0).get_target_inputs())
        values = torch.tensor(node.get_data()).to(torch.bfloat16)
        # numpy has no bfloat16: its bits as whole numbers.
        shared = ov.Tensor(values.view(torch.int16).numpy(), ov.Shape(values.shape), ov.Type.bf16)
        stored = ov.op.Constant(shared, shared_memory=False)
        stored.set_friendly_name(node.friendly_name)
        widened = opset.convert(stored, "f32", name=f"{node.friendly_name}/widened")
        for reader in readers:
            reader.replace_source_output(widened.output(0))
    model.validate_nodes_and_infer_types()


def _check_precision(model: ov.Model, precision: Precision, *, title: str, min_share: float) -> None:
    elements: Counter[str] = Counter()
    users: Counter[tuple[str, str]] = Counter()
    for node in _constants(model):
        kind = _kind(node)
        if kind in _INTEGERS or (kind in _FLOATS and (precision not in _MATRICES_ALONE or _is_matrix(node))):
            count = int(np.prod(tuple(node.get_output_shape(0))))
            elements[kind] += count
            for user in sorted(set(_users(node, scaled=kind in _INTEGERS))):
                users[kind, user] += count
    total = elements.total()
    if not total and precision != "fp32":
        raise GateError(f"{title}: {precision} was asked for, the written file holds no weights")
    kept = sum(count for kind, count in elements.items() if kind in _STORED[precision])
    if kept < min_share * total:
        left = [(kind, user, n) for (kind, user), n in users.most_common() if kind not in _STORED[precision]][:5]
        named = ", ".join(f"{user} ({count} in {kind})" for kind, user, count in left)
        raise GateError(
            f"{title}: {precision} was asked for, {kept / total:.0%} of the weights in the written file are in it"
            f"{f'; left over: {named}' if named else ''}",
            hint=f"what is left over has no form in {precision} here: take another precision",
        )
    rounds = any(node.get_type_name() == _ON_ACTIVATIONS for node in model.get_ops())
    if rounds != (precision == "int8"):
        raise GateError(
            f"{title}: {precision} was asked for, and the written file "
            f"{'quantizes' if rounds else 'does not quantize'} activations"
        )


def _is_matrix(node: Any) -> bool:
    return sum(int(size) > 1 for size in node.get_output_shape(0)) > 1


def _constants(model: ov.Model) -> Iterator[Any]:
    return (node for node in model.get_ordered_ops() if node.get_type_name() == "Constant")


def _kind(node: Any) -> str:
    return str(node.get_output_element_type(0).get_type_name())


def _users(node: Any, *, scaled: bool) -> Iterator[str]:
    """Types of the operators that compute with a constant, past those that only reshape, widen or scale it back."""
    for target in node.output(0).get_target_inputs():
        reader = target.get_node()
        if reader.get_type_name() in _PASSED_THROUGH or (scaled and reader.get_type_name() == "Multiply"):
            yield from _users(reader, scaled=scaled)
        else:
            yield reader.get_type_name()


def _check_smaller(request: ExportRequest, weights: Path) -> None:
    """Raise GateError where int8 with layers left in fp32 no longer saves anything."""
    with tempfile.TemporaryDirectory(prefix="dlops-export-") as folder:
        path = Path(folder, "whole.xml")
        whole = _save(_converted(fp32_graph(request), request), path, half=False, title=request.title)
        dense = path.stat().st_size + whole.stat().st_size
    quantized = request.into.stat().st_size + weights.stat().st_size
    if quantized >= dense:
        raise GateError(
            f"{request.title}: with {len(request.excluded)} operators left in fp32 the files have {quantized} bytes, "
            f"and all in fp32 they have {dense}: int8 in name only"
        )
