"""bfloat16: in TorchScript the weights and the arithmetic, in ONNX a refusal that stays true."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from dlops.artifact import Artifact
from dlops.errors import GateError
from dlops.export.to_torchscript import check_written
from dlops.runtimes import SessionOptions, open_session, torchscript


def constants(artifact: Artifact) -> list[torch.Tensor]:
    module = torch.jit.load(str(artifact.path("model")))
    found = (node.output().toIValue() for node in module.graph.findAllNodes("prim::Constant"))
    return [value for value in found if isinstance(value, torch.Tensor) and value.ndim]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_every_weight_is_bfloat16_and_inputs_and_outputs_stay(exported_dense: dict[str, Artifact]) -> None:
    artifact = exported_dense["torchscript-bf16"]
    tensors = constants(artifact)
    assert sum(tensor.numel() for tensor in tensors) > 56_000
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert {tensor.dtype for tensor in constants(exported_dense["torchscript-fp32"])} == {torch.float32}
    session = open_session(artifact, SessionOptions(device="cpu", threads=1))
    feed = {"input": artifact.samples().inputs["input"][:3]}
    logits = session.run(feed)["logits"]
    session.close()
    assert logits.dtype == np.float32
    # All the bits that a bfloat16 has: what was computed was rounded to it.
    assert not (logits.view(np.uint32) & 0xFFFF).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_file_in_the_other_precision_is_refused_naming_what_is_left(exported_dense: dict[str, Artifact]) -> None:
    for precision, given in (("bf16", "fp32"), ("fp32", "bf16")):
        artifact = exported_dense[f"torchscript-{given}"]
        check_written(artifact.path("model"), artifact.signature, precision=given, title="it")
        with pytest.raises(GateError, match=rf"{precision} was asked for, 0% of the weights .*_convolution \(\d+ in"):
            check_written(artifact.path("model"), artifact.signature, precision=precision, title="it")


@pytest.mark.parametrize(
    ("instructions", "device", "computed"),
    [(("avx2", "avx512_bf16"), "cpu", "bf16"), (("avx2", "fma"), "cpu", "fp32"), ((), "cuda", "bf16")],
)
def test_a_cpu_without_bfloat16_instructions_computes_in_fp32(
    monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...], device: str, computed: str
) -> None:
    monkeypatch.setattr(torchscript, "describe_environment", lambda: SimpleNamespace(instruction_sets=instructions))
    assert torchscript.computed_precision("bf16", torch.device(device)) == computed
    assert torchscript.computed_precision("fp32", torch.device(device)) == "fp32"


@pytest.mark.parametrize(
    ("operator", "opset", "shapes"),
    # The standard has bfloat16 in convolutions from opset 22 on.
    [("MatMul", 20, ([2, 3], [3, 4], [2, 4])), ("Conv", 22, ([1, 2, 4, 4], [3, 2, 1, 1], [1, 3, 4, 4]))],
)
def test_onnx_runtime_has_no_bfloat16_kernel_on_the_cpu(
    operator: str, opset: int, shapes: tuple[list[int], ...]
) -> None:
    """The reason that onnx-bf16 is refused with: where this fails, it can be offered."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape)
        for name, shape in zip("xwy", shapes, strict=True)
    ]
    graph = helper.make_graph([helper.make_node(operator, ["x", "w"], ["y"])], "one", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    with pytest.raises(ort_errors.NotImplemented, match=f"Could not find an implementation for {operator}"):
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
