"""Static int8 for ONNX Runtime: QDQ, weights per channel, ranges of activations from calibration samples."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from dlops.export.calibrate import PERCENTILE, activation_ranges
from dlops.export.formats import Calibration
from dlops.export.quantize import Notes, explained, name_nodes, quantizing, saturates, spread
from dlops.signature import Feed

# Ranges settle well before this many samples, and every one of them is run with all activations kept.
MAX_CALIBRATION_SAMPLES = 512
# All that ONNX Runtime's quantizer has a form for.
OPERATORS = frozenset(QDQRegistry) | frozenset(QLinearOpsRegistry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """An fp32 graph and the ranges of its activations: quantized as a whole or in part, from one calibration.

    model: batch norms folded, shapes inferred, every node with a name of its own. samples: how many gave the ranges,
    method: by which of the ways of `activation_ranges`.
    """

    model: onnx.ModelProto
    ranges: TensorsData
    samples: int
    method: Calibration
    title: str
    precision: Literal["int8", "fp8"] = "int8"
    operators: ClassVar[frozenset[str]] = OPERATORS

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """The model with int8 weights (symmetric, a scale a channel) and uint8 activations.

        only: names of the nodes to quantize, all if empty. excluded: names of those that stay in fp32. Weights s8 with
        activations u8 are what x86 multiplies in one instruction (VNNI). Raises GateError where ONNX Runtime cannot
        take the model.
        """
        # The quantizer writes into the model and into the ranges that it is given.
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        with explained(title=self.title):
            # As ONNX Runtime's quantize_static does, which takes no ranges from outside.
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=saturates(),
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=copy.deepcopy(self.ranges),
                nodes_to_quantize=list(only),
                nodes_to_exclude=list(excluded),
                op_types_to_quantize=sorted(OPERATORS),
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
            quantizer.quantize_model()
            # It appends its nodes at the end; the standard wants every node after what it reads.
            quantizer.model.topological_sort()
            quantized: onnx.ModelProto = quantizer.model.model
        return quantized

    def notes(self, quantized: onnx.ModelProto) -> Notes:
        """How it was made, for the provenance."""
        notes: Notes = {
            "calibration_samples": self.samples,
            "calibration_method": self.method,
            "activations": "uint8",
            "weights": "int8 per channel" + (", 7 bits" if saturates() else ""),
            "quantize_nodes": sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node),
        }
        return notes | ({"calibration_percentile": PERCENTILE} if self.method == "percentile" else {})


def calibrate(model: onnx.ModelProto, calibration: Feed, *, method: Calibration, title: str) -> Calibrated:
    """Prepare an fp32 model for quantization, with ranges from at most 512 of the samples.

    method: how the range of an activation comes from the samples, as `activation_ranges` says. Raises GateError where
    ONNX Runtime cannot take the model, MachineError where the disk is full.
    """
    samples = spread(calibration, MAX_CALIBRATION_SAMPLES)
    with quantizing(model, title=title) as (folder, prepared):
        named = onnx.load(prepared)
        name_nodes(named)
        onnx.save(named, prepared)
        ranges = activation_ranges(prepared, samples, method=method, operators=sorted(OPERATORS), folder=folder)
        shaped = load_model_with_shape_infer(prepared)
    return Calibrated(
        model=shaped, ranges=ranges, samples=len(next(iter(samples.values()))), method=method, title=title
    )
