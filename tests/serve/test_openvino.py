"""An OpenVINO artifact behind the server, where torch, onnx and ONNX Runtime cannot be imported."""

from __future__ import annotations

import os

import httpx
import numpy as np

from dlops.artifact import Artifact
from dlops.serve.launch import ServerProcess


def test_an_openvino_artifact_is_served_with_openvino_alone(openvino_artifact: Artifact, tmp_path) -> None:
    for name in ("torch", "onnx", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text(f'raise ImportError("{name} was imported")\n')
    samples = openvino_artifact.samples()
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with ServerProcess(openvino_artifact, device="cpu", env={"PYTHONPATH": paths}) as server:
        x = samples.inputs["image"]
        tensor = {"name": "image", "datatype": "FP32", "shape": list(x.shape), "data": x.reshape(-1).tolist()}
        response = httpx.post(f"{server.url}/v2/models/digits/infer", json={"inputs": [tensor]})
        got = np.array(response.json()["outputs"][0]["data"], np.float32).reshape(16, 10)
        np.testing.assert_allclose(got, samples.outputs["logits"], rtol=1e-4, atol=1e-4)
        assert httpx.get(f"{server.url}/v2/models/digits").json()["platform"] == "dlops_openvino"
