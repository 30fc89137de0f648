"""How static int8 chooses the ranges of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dlops.checkpoint import Checkpoint
from dlops.export.formats import CALIBRATIONS, Calibration
from dlops.export.pipeline import export_variants
from dlops.export.quantize_static import calibrate


def _convolution() -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((4, 1, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 64, 64])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _input_range(rows: np.ndarray, method: Calibration) -> tuple[float, dict[str, object]]:
    """The width of the range that the input is quantized over, and the notes."""
    calibrated = calibrate(_convolution(), {"x": rows}, method=method, title="it")
    model = calibrated.quantize()
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x")
    return float(arrays[node.input[1]]) * 255, dict(calibrated.notes(model))


def test_a_few_outliers_widen_the_range_of_minmax_alone() -> None:
    # Not a multiple of the batch, so the last one is smaller.
    rows = np.random.default_rng(0).standard_normal((75, 1, 64, 64)).astype(np.float32)
    rows[70, 0, 0, 0] = 100
    widths = {}
    for method in CALIBRATIONS:
        widths[method], notes = _input_range(rows, method)
        assert notes["calibration_method"] == method
        assert notes["calibration_samples"] == 75
        assert notes.get("calibration_percentile") == (99.999 if method == "percentile" else None)
    assert widths["minmax"] == pytest.approx(100 - rows.min(), rel=0.01)
    assert 8 < widths["percentile"] < 11
    assert 4 < widths["entropy"] < 20


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_the_samples_of_a_last_smaller_batch_count(method: Calibration) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (70, 1, 64, 64)).astype(np.float32)
    without, _ = _input_range(rows, method)
    rows[64:] *= 4
    assert _input_range(rows, method)[0] > 2 * without


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_a_histogram_method_makes_an_artifact_that_says_so(
    checkpoint: Checkpoint, small_net: type[nn.Module], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    method: Calibration,
) -> None:  # fmt: skip
    (made,) = export_variants(
        checkpoint, variants=["onnx-int8"], out=tmp_path, model=small_net, max_drop=2.0, calibration_method=method
    )
    assert made.provenance.notes["calibration_method"] == method
    assert made.accuracy is not None
    # What ONNX Runtime prints about its histograms does not end among the results.
    assert capfd.readouterr().out == ""
