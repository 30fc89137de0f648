"""ONNX through torch.export: named dims, checked names, no trace of the machine, in the precision asked for."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from dlops.adapters import Detector
from dlops.blame import code_line, where
from dlops.checkpoint import example_inputs
from dlops.errors import GateError, UsageError, first_line
from dlops.export import quantize_operands
from dlops.export.external_data import weight_bytes, write_in_two
from dlops.export.formats import EXAMPLE_BATCH, Exported, ExportRequest, check_embedded
from dlops.export.graft import graft
from dlops.export.plan import UNCALIBRATED
from dlops.export.precision import MIN_REPAIRED_SHARE, MIN_SHARE, check_precision
from dlops.export.quantize import Quantizer
from dlops.export.quantize_dynamic import Dynamic, prepare_dynamic
from dlops.export.quantize_operands import CalibratedOperands
from dlops.export.quantize_static import Calibrated, calibrate
from dlops.export.quantize_weights import WeightsAlone, prepare_weights
from dlops.export.trace_onnx import trace_detector
from dlops.signature import DimRange, Signature

# What torch's exporter writes without converting, and what every ONNX Runtime that we allow reads (1.17 and later).
OPSET = 20
PRODUCER = "dlops"
_LARGEST_HALF = 65504.0
# Weights beyond this go to a second file: one protobuf message ends at 2 GiB, and the graph takes some of it.
MAX_INLINE_BYTES = 2**31 - 64 * 2**20
_UNSUPPORTED = re.compile(r"(?:No ONNX function found for|Unsupported[^<]*)\s*<OpOverload\(op='([^']+)'", re.I)
_ANY_OP = re.compile(r"\b((?:aten|torchvision|prims)[.:]+[A-Za-z0-9_.]+)")


def export(request: ExportRequest) -> Exported:
    """Write the module to `request.into`, and check on the written file that it is what was asked for.

    Raises UsageError where the module has what ONNX cannot hold (the operator is named), GateError where the written
    file's opset, names, dtypes, named dims or weights are others than those asked for.
    """
    model = fp32_graph(request)
    notes: dict[str, str | int | float | bool] = {"opset": opset_of(request.variant.precision)}
    match request.variant.precision:
        case "fp16":
            model = to_half(model, title=request.title)
        case "int8" | "fp8" | "int8dyn" | "int8wo":
            quantizer = quantizer_of(request)
            model = quantizer.quantize(excluded=request.excluded)
            notes |= quantizer.notes(model)
    if request.raw is not None:
        model = graft(model, request.raw)
    _label(model, request)
    extra = {}
    if weight_bytes(model) > MAX_INLINE_BYTES:
        extra["weights"] = write_in_two(model, request.into)
        notes["weights_file"] = "apart: more than one ONNX file holds"
    else:
        # Deterministic: maps sorted by key, so that the same checkpoint gives the same bytes.
        request.into.write_bytes(model.SerializeToString(deterministic=True))
    signature = request.signature if request.raw is None else request.raw.signature
    check_written(
        request.into, signature, precision=request.variant.precision, title=request.title,
        min_share=MIN_REPAIRED_SHARE if request.excluded else MIN_SHARE,
    )  # fmt: skip
    check_embedded(request)
    if request.excluded:
        _check_smaller(request)
    return Exported(path=request.into, extra=extra, notes=notes)


def opset_of(precision: str) -> int:
    """That a file of a precision is written in."""
    return quantize_operands.OPSET if precision == "fp8" else OPSET


def fp32_graph(request: ExportRequest) -> onnx.ModelProto:
    """The module as an ONNX graph in fp32, captured once for all variants of it.

    Raises UsageError where the module has what ONNX cannot hold; the operator is named.
    """
    if "onnx" not in request.captured:
        model = _to_fp32(request)
        if (size := weight_bytes(model)) > MAX_INLINE_BYTES:
            if request.variant.slug.startswith("onnx-fp32"):
                return model
            wanted = request.variant.precision if request.variant.format == "onnx" else request.variant.slug
            raise UsageError(
                f"{request.title}: its weights take {size:,} bytes in fp32, and what converts an ONNX model to "
                f"{wanted} takes it as one protobuf message, which ends at 2 GiB",
                hint="onnx-fp32 is written in two files",
            )
        request.captured["onnx"] = model.SerializeToString(deterministic=True)
    return onnx.load_from_string(request.captured["onnx"])


def quantizer_of(request: ExportRequest) -> Quantizer:
    """What makes the request's variant of its fp32 graph, once for a module."""
    precision = request.variant.precision
    if precision not in UNCALIBRATED:
        return calibrated(request)
    if (key := f"onnx {precision}") not in request.captured:
        prepare = prepare_dynamic if precision == "int8dyn" else prepare_weights
        request.captured[key] = prepare(fp32_graph(request), title=request.title)
    found: Dynamic | WeightsAlone = request.captured[key]
    return replace(found, title=request.title)


def calibrated(request: ExportRequest) -> Calibrated:
    """The fp32 graph with the ranges that its int8 or fp8 form is made of, once for a module and a way to choose
    ranges."""
    key = f"ranges {request.calibration_method}"
    if key not in request.captured:
        assert request.calibration is not None
        request.captured[key] = calibrate(
            fp32_graph(request), request.calibration, method=request.calibration_method, title=request.title
        )
    found: Calibrated = replace(request.captured[key], title=request.title)
    match request.variant.format, request.variant.precision:
        case "tensorrt", "int8" | "fp8" as number:
            return CalibratedOperands.of(found, number, stored=False)
        case _, "fp8":
            return CalibratedOperands.of(found, "fp8", stored=True)
    return found


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter says about its source: stack traces, docs, node metadata; name us as producer."""
    model.producer_name, model.producer_version = PRODUCER, ""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    for function in model.functions:
        function.ClearField("metadata_props")
        function.ClearField("doc_string")
        for node in function.node:
            _strip_node(node)
    _strip_graph(model.graph)


def check_written(
    path: Path, signature: Signature, *, precision: str, title: str, min_share: float = MIN_SHARE
) -> None:
    """Raise GateError unless the file has the opset, names, dtypes, dims and precision that were asked for.

    min_share: of the weights, the fraction that must be stored in the precision.
    """
    model = onnx.load(path, load_external_data=False)
    try:
        # By its path, which is what finds the weights where they are in a second file.
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{title}: the written file is not valid ONNX: {first_line(error)}") from error
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != opset_of(precision):
        raise GateError(f"{title}: opset {opset_of(precision)} was asked for, the file has {opsets.get('')}")
    for kind, specs, values in (
        ("inputs", signature.inputs, model.graph.input),
        ("outputs", signature.outputs, model.graph.output),
    ):
        wanted = [(spec.name, spec.dtype, signature.declared(spec)) for spec in specs]
        found = [_described(value) for value in values]
        if wanted != found:
            raise GateError(f"{title}: {kind} asked for: {wanted}; in the written file: {found}")
    check_precision(model, precision, title=title, min_share=min_share)


def _label(model: onnx.ModelProto, request: ExportRequest) -> None:
    """Let it say of itself what was asked for and nothing else."""
    strip(model)
    if request.embedded is not None:
        onnx.helper.set_model_props(model, request.embedded.to_entries())


def _check_smaller(request: ExportRequest) -> None:
    """Raise GateError where a quantized file with layers left in fp32 no longer saves anything."""
    whole = fp32_graph(request)
    _label(whole, request)
    quantized, dense = request.into.stat().st_size, whole.ByteSize()
    if quantized >= dense:
        raise GateError(
            f"{request.title}: with {len(request.excluded)} operators left in fp32 the file has {quantized} bytes, "
            f"and all in fp32 it has {dense}: {request.variant.precision} in name only"
        )


def _to_fp32(request: ExportRequest) -> onnx.ModelProto:
    if isinstance(request.module, Detector):
        return trace_detector(request, opset=OPSET)
    signature = request.signature
    dims = {name: _dim(name, limits) for name, limits in signature.dims.items()}
    # What can have one size only is none.
    shapes = tuple(
        {axis: dims[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and signature.is_free(dim)}
        for spec in signature.inputs
    )
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                request.module,
                example_inputs(signature, batch=EXAMPLE_BATCH),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise _explained(error, request.title) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _name_dims(model, signature)
    return model


def _dim(name: str, limits: DimRange) -> Any:
    """As torch.export wants it: the batch without an upper end, which a module may not state; multiples by a factor."""
    if name == "batch":
        return torch.export.Dim(name, min=limits.min)
    if limits.step == 1:
        return torch.export.Dim(name, min=limits.min, max=limits.max)
    steps = torch.export.Dim(f"{name}_steps", min=limits.min // limits.step, max=limits.max // limits.step)
    return limits.step * steps


def _name_dims(model: onnx.ModelProto, signature: Signature) -> None:
    """Call the open dims as the signature does, which the exporter calls by their formulas: a fixed one stays fixed."""
    for spec, value in zip(
        (*signature.inputs, *signature.outputs), (*model.graph.input, *model.graph.output), strict=True
    ):
        for axis, dim in zip(spec.shape, value.type.tensor_type.shape.dim, strict=False):
            if isinstance(axis, str) and axis != "batch" and dim.dim_param:
                dim.dim_param = axis


def to_half(model: onnx.ModelProto, *, title: str) -> onnx.ModelProto:
    """Weights and arithmetic in half precision, inputs and outputs cast from and to the checkpoint's dtypes.

    Raises GateError where a weight does not fit.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # It clips what half precision cannot hold; below the smallest number that is harmless.
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.ByteSize():
            largest = float(np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0.0))
            if largest > _LARGEST_HALF:
                raise GateError(
                    f"{title}: {tensor.name} holds {largest:g}, and half precision ends at {_LARGEST_HALF:g}",
                    hint="take fp32 or bf16",
                )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float32 number .* will be truncated")
        converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    _drop_twins(converted.graph)
    # The casts are appended at the end; the standard wants every node after what it reads.
    OnnxModel.graph_topological_sort(converted.graph, is_deterministic=True)
    return converted


def _drop_twins(graph: onnx.GraphProto) -> None:
    """Of nodes that give the same tensor the first: a cast is written once for each of its readers."""
    seen: set[str] = set()
    kept = []
    for node in graph.node:
        if node.op_type == "Cast" and node.output[0] in seen:
            continue
        seen.update(node.output)
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's announcements and progress; what it refuses it raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            # Several inputs have one batch, under one name; what the file names its dims is checked once it is written.
            warnings.filterwarnings("ignore", message="# The axis name: .* will not be used", category=UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _explained(error: Exception, title: str) -> UsageError:
    chain = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    unsupported = _UNSUPPORTED.search(text)
    line = where(code_line(error))
    if unsupported:
        return UsageError(
            f"{title}: ONNX has no form of the operator {unsupported[1]} in this module{line}",
            hint="replace it by operators that ONNX has, or export to torchscript",
        )
    reason = next((line.strip() for line in reversed(chain) if line.strip()), type(error).__name__)
    named = _ANY_OP.search(reason)
    about = f" (at {named[1]})" if named else ""
    return UsageError(
        f"{title}: torch.export cannot take this module{about}{line}: {reason.splitlines()[0][:300]}",
        hint="branches on tensor values and fixed batch sizes are the usual reasons; torchscript may still take it",
    )


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.name = PRODUCER
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    node.ClearField("doc_string")
    node.ClearField("metadata_props")
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer:
                _strip_graph(graph)


def _described(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims
