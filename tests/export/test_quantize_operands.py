"""Static fp8: what the file stores, that ONNX Runtime computes it as the standard says, and that it can be repaired."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, MachineError, UsageError
from dlops.export.pipeline import export_variants, rank_variant
from dlops.export.precision import check_precision, stored_weights
from dlops.export.quantize_operands import LARGEST, CalibratedOperands, to_fp8
from dlops.export.quantize_static import calibrate
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.tensorrt_provider import provider_options

from .conftest import SmallNet

CPU = SessionOptions(device="cpu", threads=1)


def test_every_matrix_is_stored_in_fp8_and_every_product_reads_rounded_operands(
    exported_dense: dict[str, Artifact],
) -> None:
    model = onnx.load(exported_dense["onnx-fp8"].path("model"))
    weights = stored_weights(model)
    assert weights.elements["FLOAT8E4M3FN"] == 32 * 9 + 64 * 32 * 9 + 64 * 64 * 9 + 640
    # The biases, into which the batch norms were folded.
    assert weights.elements["FLOAT"] == 32 + 64 + 64 + 10
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    rounded = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) == 4
    for node in products:
        activation, weight = (rounded[name] for name in node.input[:2])
        assert arrays[activation.input[1]].shape == ()
        values, scale = (arrays[name] for name in weight.input)
        (axis,) = (attribute.i for attribute in weight.attribute if attribute.name == "axis")
        assert scale.shape == (values.shape[axis],)
        others = tuple(i for i in range(values.ndim) if i != axis)
        assert np.abs(values.astype(np.float32)).max(axis=others).tolist() == [LARGEST["fp8"]] * len(scale)
    # A zero point of fp8 is what ONNX Runtime takes for one of uint8.
    assert all(len(node.input) == 2 for node in model.graph.node if node.op_type.endswith("QuantizeLinear"))


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_onnx_runtime_computes_the_same_however_far_it_optimizes(
    level: str, exported_dense: dict[str, Artifact]
) -> None:
    """As others would open the file, without our options."""
    artifact = exported_dense["onnx-fp8"]
    feed = artifact.samples().feed(artifact.signature, artifact.preprocess)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(artifact.path("model"), settings, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, dict(feed))
    expected = artifact.samples().outputs["logits"]
    assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(logits - expected)) > 20


def test_the_session_widens_the_weights_once_and_says_what_it_computes_in(exported_dense: dict[str, Artifact]) -> None:
    session = open_session(exported_dense["onnx-fp8"], CPU)
    assert session.placement.precision == "fp32"
    session.close()


def test_a_weight_comes_back_within_a_sixteenth_of_itself_and_zeros_stay() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3)).astype(np.float32)
    weight *= np.logspace(-3, 3, 5, dtype=np.float32)[None, :, None]
    weight[:, 2] = 0
    values, scale = to_fp8(weight, axis=1)
    back = values.astype(np.float32) * scale[None, :, None]
    # Three bits of mantissa, and the smallest number of all is 2^-9.
    assert np.all(np.abs(back - weight) <= np.maximum(np.abs(weight) / 16, scale[None, :, None] / 2**10) * 1.0001)
    assert not values[:, 2].astype(np.float32).any()
    assert np.isfinite(scale).all()


def _two_readers() -> onnx.ModelProto:
    """One weight read along both of its axes, one activation read twice, and a product of two activations."""
    draw = np.random.default_rng(0)
    weight = numpy_helper.from_array(draw.standard_normal((8, 8)).astype(np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Gemm", ["x", "w"], ["b"], name="second", transB=1),
            helper.make_node("Gemm", ["a", "b"], ["y"], name="third", transB=1),
        ],
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "n"])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _fp8(values: np.ndarray) -> np.ndarray:
    scale = np.abs(values).max() / LARGEST["fp8"]
    return (values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def test_what_several_nodes_read_is_rounded_once_for_each_axis_and_equals_numpys() -> None:
    model = _two_readers()
    x = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    calibrated = CalibratedOperands.of(calibrate(model, {"x": x}, method="minmax", title="it"), "fp8", stored=True)
    quantized = calibrated.quantize()
    assert sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node) == 3
    onnx.checker.check_model(quantized, full_check=True)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    by_column, columns = to_fp8(weight, axis=1)
    by_row, rows = to_fp8(weight, axis=0)
    a = _fp8(x) @ (by_column.astype(np.float32) * columns)
    b = _fp8(x) @ (by_row.astype(np.float32) * rows[:, None]).T
    # Ranges are those of the fp32 graph.
    scales = [np.abs(x @ weight).max() / LARGEST["fp8"], np.abs(x @ weight.T).max() / LARGEST["fp8"]]
    a, b = (
        np.clip(one / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        for one, scale in zip((a, b), scales, strict=True)
    )
    settings = ort.SessionOptions()
    # As dlops opens it: else a product between two roundings becomes a QLinearMatMul, and is refused for its types.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(quantized.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    # A sum in another order may fall on the other side of a rounding.
    assert np.linalg.norm(y - a @ b.T) <= 0.01 * np.linalg.norm(y)


def test_layers_can_be_ranked_and_left_out(checkpoint: Checkpoint) -> None:
    ranking = rank_variant(checkpoint, variant="onnx-fp8", model=SmallNet)
    assert len(ranking.layers) == 4
    assert sum(error.share for error in ranking.layers) == pytest.approx(1)
    model = _two_readers()
    x = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    calibrated = CalibratedOperands.of(calibrate(model, {"x": x}, method="minmax", title="it"), "fp8", stored=True)
    some = calibrated.quantize(excluded=("third",))
    assert sum(node.op_type == "QuantizeLinear" for node in some.graph.node) == 1
    assert not [
        node
        for node in calibrated.quantize(excluded=("first", "second", "third")).graph.node
        if "Linear" in node.op_type
    ]
    one = calibrated.quantize(only=("first",))
    assert stored_weights(one).elements == {"FLOAT8E4M3FN": 64, "FLOAT": 64}


@pytest.mark.parametrize("other", ["onnx-fp32", "onnx-int8", "onnx-int8wo"])
def test_fp8_is_told_from_the_others(other: str, exported_dense: dict[str, Artifact]) -> None:
    check_precision(onnx.load(exported_dense["onnx-fp8"].path("model")), "fp8", title="it")
    with pytest.raises(GateError, match="it: fp8 was asked for"):
        check_precision(onnx.load(exported_dense[other].path("model")), "fp8", title="it")


def test_what_has_another_form_in_its_opset_is_refused() -> None:
    model = _two_readers()
    x = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    calibrated = CalibratedOperands.of(calibrate(model, {"x": x}, method="minmax", title="it"), "fp8", stored=True)
    calibrated.model.graph.node.append(helper.make_node("GroupNormalization", ["y", "s", "b"], ["z"], num_groups=2))
    with pytest.raises(GateError, match="it: GroupNormalization has another form in opset 21"):
        calibrated.quantize()


def test_sparse_and_raw_forms_hold(checkpoint: Checkpoint, tmp_path) -> None:
    artifacts = export_variants(
        checkpoint, variants=["onnx-fp8-sparse24", "onnx-fp8-raw"], out=tmp_path, model=SmallNet, max_drop=5.0
    )
    assert [artifact.slug for artifact in artifacts] == ["onnx-fp8-sparse24", "onnx-fp8-raw"]
    assert artifacts[0].provenance.notes["sparse_zeros"] >= artifacts[0].provenance.notes["sparse_weights"] // 3


def test_its_ranges_are_those_of_minmax_and_onnx_runtimes_tensorrt_has_none_of_it(
    checkpoint: Checkpoint, exported_dense: dict[str, Artifact]
) -> None:
    with pytest.raises(UsageError, match="onnx-fp8 has ranges by minmax alone"):
        export_variants(checkpoint, variants=["onnx-int8", "onnx-fp8"], model=SmallNet, calibration_method="entropy")
    with pytest.raises(MachineError, match="cannot be told to compute in fp8"):
        provider_options(exported_dense["onnx-fp8"].signature, "fp8", folder=None)
