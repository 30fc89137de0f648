"""Dynamic int8: integers are what ONNX Runtime truly computes with, and what it costs is what the docs say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.errors import GateError
from dlops.export.pipeline import export_variants
from dlops.export.quantize_dynamic import prepare_dynamic
from dlops.runtimes import SessionOptions, open_session
from dlops.saving import save_checkpoint

from .conftest import executed_operators

CPU = SessionOptions(device="cpu", threads=1)


def test_onnx_runtime_multiplies_integers_and_nothing_else(exported_dense: dict[str, Artifact]) -> None:
    artifact = exported_dense["onnx-int8dyn"]
    executed = executed_operators(artifact)
    assert executed["ConvInteger"] == 3
    # The product, its scales and its bias in one operator, fused when the session was made.
    assert executed["DynamicQuantizeMatMul"] == 1
    assert not executed.keys() & {"Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul"}
    assert executed_operators(exported_dense["onnx-fp32"]).keys() & {"Conv", "FusedConv"}
    session = open_session(artifact, CPU)
    assert session.placement.precision == "int8"
    session.close()


def test_a_loud_neighbour_in_the_batch_moves_a_sample(exported_dense: dict[str, Artifact]) -> None:
    moved = {}
    for slug in ("onnx-int8dyn", "onnx-int8", "onnx-int8wo"):
        artifact = exported_dense[slug]
        session = open_session(artifact, CPU)
        rows = artifact.samples().inputs["input"][:2]
        alone = session.run({"input": rows[:1]})["logits"]
        beside = session.run({"input": np.concatenate([rows[:1], 50 * rows[1:]])})["logits"][:1]
        moved[slug] = float(np.abs(beside - alone).max() / np.abs(alone).max())
        session.close()
    assert moved["onnx-int8dyn"] > 0.05
    assert moved["onnx-int8"] < 1e-3
    assert moved["onnx-int8wo"] < 1e-3


def _two_channels() -> onnx.ModelProto:
    """A convolution with a bias, its second channel a thousandth of the first."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 3, 3, 3)).astype(np.float32) * np.array([1, 1e-3], np.float32)[:, None, None, None]
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2])]
    graph = helper.make_graph(
        nodes, "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 4, 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([0.5, 5e-4], np.float32), "b")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_each_channel_of_a_convolution_has_its_own_scale() -> None:
    model = _two_channels()
    dynamic = prepare_dynamic(model, title="it")
    quantized = dynamic.quantize()
    assert dynamic.notes(quantized)["ConvInteger_nodes"] == 1
    feed = {"x": np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)}
    expected, got = (
        ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for each in (model, quantized)
    )
    for channel in range(2):
        error = np.abs(got[:, channel] - expected[:, channel]).max() / np.abs(expected[:, channel]).max()
        assert error < 0.02, channel


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers, self.head = kind(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0][:, -1])


class _Vectors(nn.Module):
    """Has weights, and no matrix among them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(10), nn.Parameter(torch.linspace(1, 2, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x * self.scale)


def test_an_lstm_is_quantized_and_a_gru_is_named_as_left_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = np.random.default_rng(0).standard_normal((40, 8, 8)).astype(np.float32)
    for kind in (nn.LSTM, nn.GRU):
        module = _Recurrent(kind)
        save_checkpoint(
            module, tmp_path / kind.__name__, evaluation=(inputs, np.arange(40) % 10), name=kind.__name__, max_batch=4
        )
    (made,) = export_variants(
        tmp_path / "LSTM", variants=["onnx-int8dyn"], out=tmp_path / "out", model=lambda: _Recurrent(nn.LSTM)
    )
    assert executed_operators(made)["DynamicQuantizeLSTM"] == 1
    with pytest.raises(GateError, match=r"int8dyn was asked for, \d+% of the weights .* left over: GRU \(\d+ in FLOAT"):
        export_variants(
            tmp_path / "GRU", variants=["onnx-int8dyn", "onnx-int8wo"], out=tmp_path / "out",
            model=lambda: _Recurrent(nn.GRU),
        )  # fmt: skip
    assert executed_operators(open_artifact(tmp_path / "out/GRU/onnx-int8wo"))["GRU"] == 1


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("int8dyn", r"nothing to quantize: no MatMul, Gemm, LSTM or Conv .*LayerNormalization"),
        ("int8wo", r"nothing to quantize: no operator with a matrix of weights among .*LayerNormalization"),
    ],
)
def test_a_model_with_nothing_to_quantize_is_refused(tmp_path: Path, precision: str, said: str) -> None:
    inputs = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    checkpoint = save_checkpoint(
        _Vectors(), tmp_path / "run", evaluation=(inputs, np.arange(20) % 10), name="vectors", max_batch=4
    )
    with pytest.raises(GateError, match=said):
        export_variants(checkpoint, variants=[f"onnx-{precision}"], out=tmp_path / "out", model=_Vectors)
    assert not (tmp_path / "out").exists()
