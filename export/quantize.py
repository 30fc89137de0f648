"""Static int8 for ONNX Runtime: QDQ, weights per channel, ranges from calibration samples."""

from __future__ import annotations

import copy
import logging
import platform
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from dlops.environment import describe_environment
from dlops.errors import GateError, from_os_error
from dlops.signature import Array, Feed

# Ranges settle well before this many samples, and every one of them is run with all activations kept.
MAX_CALIBRATION_SAMPLES = 512
_CALIBRATION_BATCH = 32
# All that ONNX Runtime's quantizer has a form for.
OPERATORS = frozenset(QDQRegistry) | frozenset(QLinearOpsRegistry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """An fp32 graph and the ranges of its activations: quantized as a whole or in part, from one calibration.

    model: batch norms folded, shapes inferred, every node with a name of its own. samples: how many gave the ranges.
    """

    model: onnx.ModelProto
    ranges: Any
    samples: int
    title: str

    def quantize(self, *, only: Collection[str] = (), excluded: Collection[str] = ()) -> onnx.ModelProto:
        """The model with int8 weights (symmetric, a scale a channel) and uint8 activations.

        only: names of the nodes to quantize, all if empty. excluded: names of those that stay in fp32. Weights s8 with
        activations u8 are what x86 multiplies in one instruction (VNNI).
        """
        # The quantizer writes into the model and into the ranges that it is given.
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        with _explained(self.title), _strict_and_quiet():
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=saturates(),
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=copy.deepcopy(self.ranges),
                nodes_to_quantize=list(only),
                nodes_to_exclude=list(excluded),
                op_types_to_quantize=list(OPERATORS),
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
            quantizer.quantize_model()
            # It appends its nodes at the end; the standard wants every node after what it reads.
            quantizer.model.topological_sort()
            quantized: onnx.ModelProto = quantizer.model.model
        return quantized

    def notes(self, quantized: onnx.ModelProto) -> dict[str, str | int | float | bool]:
        """How it was made, for the provenance."""
        return {
            "calibration_samples": self.samples,
            "calibration_method": "minmax",
            "activations": "uint8",
            "weights": "int8 per channel" + (", 7 bits" if saturates() else ""),
            "quantize_nodes": sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node),
        }


def calibrate(model: onnx.ModelProto, calibration: Feed, *, title: str) -> Calibrated:
    """Prepare an fp32 model for quantization, with ranges from at most 512 of the samples.

    Ranges are the minimum and maximum that the samples give: on a ResNet-18 the 99.999th percentile and the entropy
    method came out within 0.1 dB of it, and both want batches of one size. Raises GateError where ONNX Runtime cannot
    take the model, MachineError where the disk is full.
    """
    samples = spread(calibration, MAX_CALIBRATION_SAMPLES)
    with tempfile.TemporaryDirectory(prefix="dlops-quantize-") as name:
        folder = Path(name)
        source, prepared, augmented = (folder / f"{stage}.onnx" for stage in ("source", "prepared", "augmented"))
        source.write_bytes(model.SerializeToString())
        with _explained(title, folder, model.ByteSize()), _strict_and_quiet():
            # Symbolic inference is for transformers, and adds nothing to shapes that the exporter already inferred.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            whole = onnx.load(prepared)
            _name_nodes(whole)
            onnx.save(whole, prepared)
            calibrator = create_calibrator(
                prepared, list(OPERATORS), augmented_model_path=str(augmented),
                calibrate_method=CalibrationMethod.MinMax,
            )  # fmt: skip
            calibrator.collect_data(_Reader(samples))
            ranges = calibrator.compute_data()
            shaped = save_and_reload_model_with_shape_infer(whole)
    return Calibrated(model=shaped, ranges=ranges, samples=len(next(iter(samples.values()))), title=title)


def spread(feed: Feed, limit: int) -> dict[str, Array]:
    """At most `limit` samples, evenly over the whole set: sets are often sorted by class."""
    count = len(next(iter(feed.values())))
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
    return {name: array[chosen] for name, array in feed.items()}


def saturates() -> bool:
    """Whether this CPU adds u8 × s8 products in 16 bits, which overflow unless weights keep to 7 bits."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not {"avx512_vnni", "avx_vnni"} & set(describe_environment().instruction_sets)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own: nodes are kept out of quantization by name, and names may be left out."""
    taken = {""}
    for place, node in enumerate(model.graph.node):
        if node.name in taken:
            node.name = f"{node.op_type}_{place}"
        taken.add(node.name)


@contextmanager
def _explained(title: str, folder: Path | None = None, model_bytes: int = 0) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ORT raises classes of its own beside ValueError, RuntimeError and AssertionError
        if folder is not None:
            _check_room(error, folder, model_bytes, title=title)
        raise GateError(f"{title}: ONNX Runtime cannot quantize it: {error}") from error


def _check_room(error: BaseException, folder: Path, model_bytes: int, *, title: str) -> None:
    """Raise MachineError where `error` comes from a disk that is full.

    ORT's own writer says nothing where it runs out of space, and the cut file then fails to parse: so a file that is
    large enough for the next step is tried beside it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            raise from_os_error(cause, doing=f"quantizing {title}") from error
        cause = cause.__cause__ or cause.__context__
    try:
        Path(folder, "room").write_bytes(bytes(2 * model_bytes))
    except OSError as full:
        raise from_os_error(full, doing=f"quantizing {title}") from error


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._count = len(next(iter(feed.values())))
        self.rewind()

    def rewind(self) -> None:
        self._starts = iter(range(0, self._count, _CALIBRATION_BATCH))

    def get_next(self) -> dict[str, Array] | None:
        start = next(self._starts, None)
        if start is None:
            return None
        return {name: array[start : start + _CALIBRATION_BATCH] for name, array in self._feed.items()}


class _Raise(logging.Handler):
    """ORT's pre-processing logs that it failed and carries on with the model as it was."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(record.getMessage())


@contextmanager
def _strict_and_quiet() -> Iterator[None]:
    """What ORT's quantizer logs as an error is raised; its advice (to pre-process first, which is done) is dropped."""
    handler = _Raise(level=logging.ERROR)
    logger = logging.getLogger("onnxruntime.quantization")
    disabled = logging.root.manager.disable
    logger.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logging.disable(disabled)
        logger.removeHandler(handler)
