"""Static int8 for ONNX Runtime: QDQ, weights per channel, ranges from calibration samples."""

from __future__ import annotations

import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from dlops.environment import describe_environment
from dlops.errors import GateError, from_os_error
from dlops.signature import Array, Feed

# Ranges settle well before this many samples, and every one of them is run with all activations kept.
MAX_CALIBRATION_SAMPLES = 512
_CALIBRATION_BATCH = 32


def quantize(
    model: onnx.ModelProto, calibration: Feed, *, title: str
) -> tuple[onnx.ModelProto, dict[str, str | int | float | bool]]:
    """The model with int8 weights (symmetric, a scale a channel) and uint8 activations, and how it was made.

    Weights s8 with activations u8 are what x86 multiplies in one instruction (VNNI). Activation ranges are the minimum
    and maximum that the calibration samples give: on a ResNet-18 the 99.999th percentile and the entropy method came
    out within 0.1 dB of it, and both want batches of one size.
    """
    samples = spread(calibration, MAX_CALIBRATION_SAMPLES)
    count = len(next(iter(samples.values())))
    reduce_range = saturates()
    with tempfile.TemporaryDirectory(prefix="dlops-quantize-") as folder, _strict_and_quiet():
        source, prepared, quantized = (Path(folder, f"{stage}.onnx") for stage in ("source", "prepared", "quantized"))
        source.write_bytes(model.SerializeToString())
        try:
            # Symbolic inference is for transformers, and adds nothing to shapes that the exporter already inferred.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                onnx.load(prepared),
                quantized,
                _Reader(samples),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
            )
            result = onnx.load(quantized)
        except Exception as error:  # ORT raises classes of its own beside ValueError, RuntimeError and AssertionError
            _check_room(error, Path(folder), model.ByteSize(), title=title)
            raise GateError(f"{title}: ONNX Runtime cannot quantize it: {error}") from error
    nodes = sum(node.op_type == "QuantizeLinear" for node in result.graph.node)
    return result, {
        "calibration_samples": count,
        "calibration_method": "minmax",
        "activations": "uint8",
        "weights": "int8 per channel" + (", 7 bits" if reduce_range else ""),
        "quantize_nodes": nodes,
    }


def spread(feed: Feed, limit: int) -> dict[str, Array]:
    """At most `limit` samples, evenly over the whole set: sets are often sorted by class."""
    count = len(next(iter(feed.values())))
    chosen = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
    return {name: array[chosen] for name, array in feed.items()}


def saturates() -> bool:
    """Whether this CPU adds u8 × s8 products in 16 bits, which overflow unless weights keep to 7 bits."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and not {"avx512_vnni", "avx_vnni"} & set(describe_environment().instruction_sets)


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
