"""Bound calls: what a session gives for a feed, over buffers that stay in place, with every runtime."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from onnx import TensorProto, helper

from dlops.artifact import Artifact
from dlops.runtimes import Session, SessionOptions, open_session
from dlops.runtimes.onnxruntime import OnnxSession
from dlops.signature import DimRange, Feed, Signature, TensorSpec

torch = pytest.importorskip("torch", reason="two of the runtimes are torch's")

OPTIONS = SessionOptions(device="cpu", threads=1)


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def open_onnx(artifact: Artifact) -> Session:
    return open_session(artifact, OPTIONS)


def open_eager(artifact: Artifact) -> Session:
    from dlops.runtimes.eager import open_eager

    return open_eager(linear(), artifact.signature, OPTIONS)


def open_compiled(artifact: Artifact) -> Session:
    from dlops.runtimes.eager import open_compiled

    return open_compiled(linear(), artifact.signature, OPTIONS)


def open_scripted(artifact: Artifact) -> Session:
    from dlops.runtimes.eager import ModuleSession

    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(linear(), torch.zeros(1, 1, 8, 8)), buffer)
    module = torch.jit.load(io.BytesIO(buffer.getvalue())).eval()
    return ModuleSession(
        module, signature=artifact.signature, runtime="torchscript", precision="fp32", device=torch.device("cpu")
    )


RUNTIMES = [
    open_onnx,
    open_eager,
    pytest.param(
        open_scripted,
        marks=pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning"),
    ),
    pytest.param(
        open_compiled,
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU"),
    ),
]


def feeds(artifact: Artifact) -> tuple[Feed, Feed]:
    """Two batches of four samples; arrays that a server parsed out of a body are read-only."""
    images = artifact.samples().inputs["image"]
    first, second = images[:4].copy(), images[4:8].copy()
    second.flags.writeable = False
    return {"image": first}, {"image": second}


@pytest.mark.parametrize("opened", RUNTIMES)
def test_a_bound_call_gives_what_the_session_gives(opened: Callable, digits_artifact: Artifact) -> None:
    session = opened(digits_artifact)
    first, second = feeds(digits_artifact)
    bound = session.bind(first)
    answers = []
    for feed in (None, second, first):
        if feed is not None:
            bound.copy_in(feed)
        bound.run()
        bound.synchronize()
        answers.append(bound.copy_out())
    for feed, answer in zip((first, second, first), answers, strict=True):
        want = session.run(feed)
        assert answer.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_array_equal(answer[name], array)
    assert not np.array_equal(answers[0]["logits"], answers[1]["logits"])
    session.close()


@pytest.mark.parametrize("opened", [open_onnx, open_eager])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((2, 1, 8, 8), np.float32), r"image: float32\[2, 1, 8, 8\] given, float32\[4, 1, 8, 8\] was bound"),
        (np.zeros((4, 1, 8, 8), np.float64), r"image: float64\[4, 1, 8, 8\] given, float32"),
    ],
)
def test_another_shape_or_dtype_is_no_feed_of_a_bound_call(opened, given, said, digits_artifact: Artifact) -> None:
    bound = opened(digits_artifact).bind(feeds(digits_artifact)[0])
    with pytest.raises(ValueError, match=said):
        bound.copy_in({"image": given})


def test_an_output_whose_size_depends_on_the_data_may_change_it() -> None:
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Neg", ["x"], ["minus"])],
        "found",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info("where", TensorProto.INT64, [1, "found"]),
            helper.make_tensor_value_info("minus", TensorProto.FLOAT, ["n"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("n",)),),
        outputs=(
            TensorSpec(name="where", dtype="int64", shape=(1, "found")),
            TensorSpec(name="minus", dtype="float32", shape=("n",)),
        ),
        dims={"n": DimRange(max=8), "found": DimRange(max=8)},
    )
    session = OnnxSession(
        model.SerializeToString(), signature=signature, precision="fp32", options=OPTIONS, title="found"
    )
    bound = session.bind({"x": np.array([0, 1, 0, 2], np.float32)})
    for values in ([0, 1, 0, 2], [1, 2, 3, 0], [0, 0, 0, 0]):
        bound.copy_in({"x": np.array(values, np.float32)})
        bound.run()
        bound.synchronize()
        answer = bound.copy_out()
        assert answer["where"].tolist() == [np.flatnonzero(values).tolist()]
        assert answer["minus"].tolist() == [-value for value in values]


def test_a_module_that_returns_its_input_gives_an_array_of_its_own(digits_artifact: Artifact) -> None:
    from dlops.runtimes.eager import ModuleSession

    spec = TensorSpec(name="same", dtype="float32", shape=("batch", 1, 8, 8))
    signature = digits_artifact.signature.model_copy(update={"outputs": (spec,)})
    session = ModuleSession(
        torch.nn.Identity(), signature=signature, runtime="eager", precision="fp32", device=torch.device("cpu")
    )
    first, second = feeds(digits_artifact)
    bound = session.bind(first)
    given = first["image"].copy()
    bound.run()
    answer = bound.copy_out()
    bound.copy_in(second)
    np.testing.assert_array_equal(answer["same"], given)
    np.testing.assert_array_equal(first["image"], given)
