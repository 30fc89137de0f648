"""The written file is asserted on, so each kind of wrong file must be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from dlops.artifact import Artifact
from dlops.errors import GateError
from dlops.export.quantize import spread
from dlops.export.to_onnx import OPSET, check_written, to_half


def written(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.path("model"))


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    model.graph.node[-1].output[0] = "scores"


def fix_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def lower_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = OPSET - 1


def drop_node(model: onnx.ModelProto) -> None:
    del model.graph.node[0]


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (rename_output, "outputs asked for"),
        (fix_batch, "inputs asked for|not valid"),
        (lower_opset, "opset 20 was asked for"),
        (drop_node, "not valid ONNX"),
    ],
)
def test_a_file_other_than_asked_for_is_refused(
    exported_dense: dict[str, Artifact], alter: Callable[[onnx.ModelProto], None], said: str, tmp_path: Path
) -> None:
    artifact = exported_dense["onnx-fp32"]
    model = written(artifact)
    check_written(artifact.path("model"), artifact.signature, precision="fp32", title="it")
    alter(model)
    (tmp_path / "it.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(GateError, match=said):
        check_written(tmp_path / "it.onnx", artifact.signature, precision="fp32", title="it")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_in_another_precision_is_refused(exported_dense: dict[str, Artifact], precision: str) -> None:
    artifact = exported_dense["onnx-fp32"]
    with pytest.raises(GateError, match=f"{precision} was asked for"):
        check_written(artifact.path("model"), artifact.signature, precision=precision, title="it")


def test_int8_weights_have_a_scale_for_each_channel_and_activations_are_unsigned(
    exported_dense: dict[str, Artifact],
) -> None:
    model = written(exported_dense["onnx-int8"])
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in arrays]
    matrices = [node for node in weights if arrays[node.input[0]].dtype.name == "int8"]
    assert len(matrices) == 4
    for node in matrices:
        values, scale, zero = (arrays[name] for name in node.input)
        assert scale.size in values.shape
        assert scale.size > 1
        assert not zero.any()
    points = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(points) >= 4
    assert {arrays[node.input[2]].dtype.name for node in points} == {"uint8"}


def test_fp16_keeps_the_dtypes_of_inputs_and_outputs(exported_dense: dict[str, Artifact]) -> None:
    model = written(exported_dense["onnx-fp16"])
    ends = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert ends == [onnx.TensorProto.FLOAT] * 2


def test_calibration_is_spread_over_the_whole_set() -> None:
    import numpy as np

    chosen = spread({"x": np.arange(1000)}, 5)["x"]
    assert chosen.tolist() == [0, 250, 500, 749, 999]
    assert spread({"x": np.arange(3)}, 5)["x"].tolist() == [0, 1, 2]


def test_a_weight_that_half_precision_cannot_hold_is_refused_and_casts_are_written_once() -> None:
    def graph(scale: float) -> onnx.ModelProto:
        weight = np.full((4, 4), scale, np.float32)
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Relu", ["m"], ["r"]),
            # Two operators that ONNX Runtime's conversion leaves in fp32, on one tensor.
            helper.make_node("Min", ["r", "r"], ["low"]),
            helper.make_node("Max", ["r", "r"], ["high"]),
            helper.make_node("Add", ["low", "high"], ["y"]),
        ]
        made = helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
            [onnx.numpy_helper.from_array(weight, "w")],
        )  # fmt: skip
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)

    with pytest.raises(GateError, match=r"it: w holds 1e\+06, and half precision ends at 65504"):
        to_half(graph(1e6), title="it")
    onnx.checker.check_model(to_half(graph(1.0), title="it"), full_check=True)
