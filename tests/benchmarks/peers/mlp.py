"""The model that all serve, 784 → 128 → 10 in float32, as an artifact of ours; the peers take its ONNX file."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from dlops.artifact import Artifact, Parity, Provenance, Tolerance, Variant
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.samples import Samples
from dlops.signature import DimRange, Signature, TensorSpec

NAME, PIXELS, HIDDEN, CLASSES = "mlp", 784, 128, 10
# Different ones, so that no answer can come from a memory of the last; as many as artifacts carry.
REQUESTS = 32


def make_artifact(directory: Path) -> Artifact:
    """Random weights: what is measured does not depend on what they say. Its samples are what is sent."""
    model = _onnx()
    inputs = np.random.default_rng(1).random((REQUESTS, PIXELS), np.float32)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    samples = Samples(
        raw=tuple(inputs), inputs={"x": inputs}, outputs={"logits": session.run(["logits"], {"x": inputs})[0]}
    )
    with DirectoryWriter(directory / NAME / "onnx-fp32") as writer:
        files = {
            "model": writer.add("model.onnx", model),
            "samples": writer.add("samples.safetensors", samples.to_bytes()),
        }
        artifact = Artifact(
            name=NAME, created=datetime.now(UTC), variant=Variant(format="onnx"),
            signature=Signature(
                inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", PIXELS)),),
                outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", CLASSES)),),
                dims={"batch": DimRange(max=64)},
            ),
            preprocess=None, labels=tuple("0123456789"), task="classification", requires=("onnxruntime",),
            parity=Parity(
                provider="CPUExecutionProvider", batches=(1,), samples=REQUESTS, max_abs=0.0, max_rel=0.0,
                sqnr_db=None, agreement=1.0, tolerance=Tolerance(max_abs=1e-3),
            ),
            accuracy=None,
            provenance=Provenance(checkpoint=NAME, checkpoint_sha256="0" * 64, environment=describe_environment()),
            files=files,
        )  # fmt: skip
        return writer.commit(artifact)


def _onnx() -> bytes:
    generator = np.random.default_rng(0)

    def layer(number: int, inputs: int, outputs: int) -> list[onnx.TensorProto]:
        weights = generator.normal(0, inputs**-0.5, (inputs, outputs)).astype(np.float32)
        bias = generator.normal(0, 0.1, outputs).astype(np.float32)
        return [numpy_helper.from_array(weights, f"w{number}"), numpy_helper.from_array(bias, f"b{number}")]

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["sums"]),
            helper.make_node("Relu", ["sums"], ["hidden"]),
            helper.make_node("Gemm", ["hidden", "w2", "b2"], ["logits"]),
        ],
        NAME,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", PIXELS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [*layer(1, PIXELS, HIDDEN), *layer(2, HIDDEN, CLASSES)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
