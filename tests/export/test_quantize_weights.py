"""Weight-only int8: small in the file, fp32 where it runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from dlops.artifact import Artifact
from dlops.errors import GateError
from dlops.export.precision import check_precision, stored_weights
from dlops.export.quantize import rounded
from dlops.runtimes import SessionOptions, open_session

from .conftest import executed_operators

CPU = SessionOptions(device="cpu", threads=1)


def test_every_matrix_is_stored_in_int8_with_a_scale_for_each_channel(exported_dense: dict[str, Artifact]) -> None:
    model = onnx.load(exported_dense["onnx-int8wo"].path("model"))
    weights = stored_weights(model)
    assert weights.elements["INT8"] == 32 * 9 + 64 * 32 * 9 + 64 * 64 * 9 + 640
    # The biases, into which the batch norms were folded.
    assert weights.elements["FLOAT"] == 32 + 64 + 64 + 10
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    widening = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(widening) == 4
    for node in widening:
        values, scale = (arrays[name] for name in node.input)
        (axis,) = (attribute.i for attribute in node.attribute if attribute.name == "axis")
        assert scale.shape == (values.shape[axis],)
        assert np.abs(values).max(axis=tuple(i for i in range(values.ndim) if i != axis)).tolist() == [127] * len(scale)


def test_what_runs_is_what_fp32_runs(exported_dense: dict[str, Artifact]) -> None:
    dense, widened = (executed_operators(exported_dense[f"onnx-{name}"]) for name in ("fp32", "int8wo"))
    # Widened once, when the session is made: left in the graph, each run would do it again.
    assert "DequantizeLinear" not in widened
    assert not [kind for kind in widened if "Integer" in kind or "NBits" in kind]
    assert {kind: n for kind, n in widened.items() if "Conv" in kind} == {
        kind: n for kind, n in dense.items() if "Conv" in kind
    }
    session = open_session(exported_dense["onnx-int8wo"], CPU)
    assert session.placement.precision == "fp32"
    session.close()


def test_a_weight_comes_back_within_half_a_step_of_its_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3)).astype(np.float32)
    weight *= np.logspace(-3, 3, 5, dtype=np.float32)[None, :, None]
    weight[:, 2] = 0
    values, scale = rounded(weight, axis=1)
    back = values * scale[None, :, None]
    assert np.all(np.abs(back - weight) <= scale[None, :, None] * 0.5001)
    assert not values[:, 2].any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("asked", ["int8", "int8dyn", "int8wo"])
@pytest.mark.parametrize("given", ["int8", "int8dyn", "int8wo"])
def test_each_kind_of_int8_is_told_from_the_others(exported_dense: dict[str, Artifact], asked: str, given: str) -> None:
    model = onnx.load(exported_dense[f"onnx-{given}"].path("model"))
    if asked == given:
        check_precision(model, asked, title="it")
    else:
        with pytest.raises(
            GateError, match=f"it: {asked} was asked for, (1%|and the written file quantizes activations by)"
        ):
            check_precision(model, asked, title="it")
