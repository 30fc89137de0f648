"""Detectors as ONNX, by torch's tracing exporter: torch.export does not take their loops over what was found."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import torch

from dlops.checkpoint import example_inputs
from dlops.errors import UsageError
from dlops.export.formats import ExportRequest


def trace_detector(request: ExportRequest, *, opset: int) -> onnx.ModelProto:
    """The fp32 graph with suppression of overlapping boxes in it, for one image at a time.

    Sizes that the signature leaves open stay open. torchvision writes its detectors so that tracing takes them; that
    nothing was baked in is for the parity gate to show. Raises UsageError where the exporter gives up.
    """
    signature = request.signature
    axes = {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str) and signature.is_free(dim)}
        for spec in (*signature.inputs, *signature.outputs)
    }
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                request.module,
                example_inputs(signature, batch=1),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=opset,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_axes={name: named for name, named in axes.items() if named},
                do_constant_folding=True,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UsageError(
            f"{request.title}: torch's tracing exporter cannot take this detector: "
            f"{lines[0][:300] if lines else type(error).__name__}",
            hint="export to torchscript",
        ) from error
    model = onnx.load_from_string(buffer.getvalue())
    # Tracing knows no size behind a concatenation and a cut: the signature's, which every run then has to keep.
    for spec, value in zip(signature.outputs, model.graph.output, strict=True):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        value.CopyFrom(onnx.helper.make_tensor_value_info(spec.name, kind, list(signature.declared(spec))))
    return model
