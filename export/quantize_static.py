"""Static int8 for ONNX Runtime: QDQ, weights per channel, ranges of activations from calibration samples."""

from __future__ import annotations

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from dlops.export.calibrate import PERCENTILE, activation_ranges
from dlops.export.formats import Calibration
from dlops.export.quantize import Notes, quantizing, saturates, spread
from dlops.signature import Feed

# Ranges settle well before this many samples, and every one of them is run with all activations kept.
MAX_CALIBRATION_SAMPLES = 512


def quantize_static(
    model: onnx.ModelProto, calibration: Feed, *, method: Calibration, title: str
) -> tuple[onnx.ModelProto, Notes]:
    """The model with int8 weights (symmetric, a scale a channel) and uint8 activations, and how it was made.

    Weights s8 with activations u8 are what x86 multiplies in one instruction (VNNI). method: how the range of an
    activation comes from the samples, as `activation_ranges` says.
    """
    samples = spread(calibration, MAX_CALIBRATION_SAMPLES)
    reduce_range = saturates()
    operators = sorted({*QLinearOpsRegistry, *QDQRegistry})
    with quantizing(model, title=title) as (folder, prepared):
        ranges = activation_ranges(prepared, samples, method=method, operators=operators, folder=folder)
        # As ONNX Runtime's quantize_static does, which takes no ranges from outside.
        quantizer = QDQQuantizer(
            load_model_with_shape_infer(prepared),
            per_channel=True,
            reduce_range=reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=operators,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        result = quantizer.model.model
    notes: Notes = {
        "calibration_samples": len(next(iter(samples.values()))),
        "calibration_method": method,
        "activations": "uint8",
        "weights": "int8 per channel" + (", 7 bits" if reduce_range else ""),
        "quantize_nodes": sum(node.op_type == "QuantizeLinear" for node in result.graph.node),
    }
    return result, notes | ({"calibration_percentile": PERCENTILE} if method == "percentile" else {})
