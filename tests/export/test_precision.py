"""What a file's weights are stored in decides whether it is what its name says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dlops.artifact import Artifact
from dlops.errors import GateError
from dlops.export.pipeline import export_variants
from dlops.export.precision import check_precision, stored_weights
from dlops.saving import save_checkpoint


class _Recurrent(nn.Module):
    """Most of its weights are in an LSTM, which ONNX Runtime does not quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_int8_of_a_model_whose_weights_stay_fp32_is_refused_naming_the_operator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = np.random.default_rng(0).standard_normal((40, 8, 8)).astype(np.float32)
    targets = np.arange(20) % 10
    checkpoint = save_checkpoint(
        _Recurrent(), tmp_path / "run", evaluation=(inputs[:20], targets), calibration=(inputs[20:], targets),
        max_batch=4,
    )  # fmt: skip
    with pytest.raises(GateError, match=r"int8 was asked for, \d% of the weights .* left over: LSTM \(\d+ in FLOAT\)"):
        export_variants(
            checkpoint, variants=["onnx-fp32", "onnx-int8"], out=tmp_path / "out", model=_Recurrent, max_drop=100.0
        )
    assert [path.name for path in (tmp_path / "out" / "run").iterdir()] == ["onnx-fp32"]


def test_every_weight_of_a_convolutional_network_is_quantized(exported_dense: dict[str, Artifact]) -> None:
    dense, quantized = (
        stored_weights(onnx.load(exported_dense[f"onnx-{name}"].path("model"))) for name in ("fp32", "int8")
    )
    # Batch norms are folded before quantization, so their four vectors a layer are gone.
    matrices = 32 * 9 + 64 * 32 * 9 + 64 * 64 * 9 + 640
    assert quantized.elements["INT8"] == matrices
    assert quantized.elements["INT32"] == 32 + 64 + 64 + 10
    assert quantized.elements["FLOAT"] == 0
    assert dense.elements["FLOAT"] >= matrices


def _two_products(kinds: tuple[str, str], sizes: tuple[int, int]) -> onnx.ModelProto:
    """Two matrix products, each with a weight of that dtype; the wider one is cast for the other."""
    nodes, weights = [], []
    for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
        weights.append(numpy_helper.from_array(np.ones((size, 10), kind), f"w{i}"))
        nodes.append(helper.make_node("Cast", [f"w{i}"], [f"c{i}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node(("MatMul", "Gemm")[i], [f"x{i}", f"c{i}"], [f"y{i}"]))
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["n", size]) for i, size in enumerate(sizes)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["n", 10]) for i in range(2)]
    return helper.make_model(helper.make_graph(nodes, "two", inputs, outputs, weights))


def test_nine_tenths_of_the_elements_decide_and_not_the_bytes() -> None:
    check_precision(_two_products(("float16", "float32"), (90, 10)), "fp16", title="it")
    with pytest.raises(GateError, match=r"89% of the weights .* left over: Gemm \(110 in FLOAT\)"):
        check_precision(_two_products(("float16", "float32"), (89, 11)), "fp16", title="it")
    with pytest.raises(GateError, match=r"fp32 was asked for, 10%"):
        check_precision(_two_products(("float16", "float32"), (90, 10)), "fp32", title="it")


def test_weights_inside_a_branch_count() -> None:
    inner = _two_products(("float32", "float32"), (50, 50)).graph
    del inner.input[:]
    choose = helper.make_node("If", ["yes"], ["a", "b"], then_branch=inner, else_branch=inner)
    outside = numpy_helper.from_array(np.ones((10, 10), np.float16), "w")
    model = helper.make_model(helper.make_graph([choose], "outer", [], [], [outside]))
    assert stored_weights(model).elements == {"FLOAT16": 100, "FLOAT": 2000}


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8wo"])
def test_a_file_without_weights_is_in_no_other_precision_than_fp32(precision: str) -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "none", [], [])
    check_precision(helper.make_model(graph), "fp32", title="it")
    with pytest.raises(GateError, match="holds no weights"):
        check_precision(helper.make_model(graph), precision, title="it")


class Weightless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 2, dim=1)


@pytest.mark.parametrize("format_", ["onnx", "torchscript", "openvino"])
def test_a_module_without_weights_is_exported(format_: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((16, 5), np.float32)
    checkpoint = save_checkpoint(
        Weightless(), tmp_path / "run", name="weightless", evaluation=(x, x.argmax(axis=1)), max_batch=8
    )
    [made] = export_variants(checkpoint, variants=[f"{format_}-fp32"], model=Weightless, out=tmp_path / "artifacts")
    assert made.parity.max_abs < 1e-6
