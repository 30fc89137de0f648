from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
import torch

from dlops.artifact import Artifact, Variant
from dlops.catalog import REQUIREMENTS
from dlops.directory import DirectoryWriter
from dlops.serve.launch import ServerProcess


@pytest.fixture
def scripted(digits_artifact: Artifact, tmp_path) -> Artifact:
    """The digits artifact's own weights, read from the ONNX file, as TorchScript."""
    import onnx

    stored = onnx.load(str(digits_artifact.path("model"))).graph.initializer
    weights, bias = (torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in stored)
    linear = torch.nn.Linear(64, 10)
    linear.load_state_dict({"weight": weights.T, "bias": bias})
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Sequential(torch.nn.Flatten(), linear), torch.zeros(1, 1, 8, 8)), buffer)
    with DirectoryWriter(tmp_path / "torchscript-fp32") as writer:
        files = {
            "model": writer.add("model.pt", buffer.getvalue()),
            "samples": writer.add_file("samples.safetensors", digits_artifact.path("samples")),
        }
        changes = {"variant": Variant(format="torchscript"), "files": files, "requires": REQUIREMENTS["torchscript"]}
        return writer.commit(digits_artifact.model_copy(update=changes))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_a_torchscript_artifact_is_served_alike(scripted: Artifact, tmp_path) -> None:
    samples = scripted.samples()
    # With what it says that it requires, and no more.
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text('raise ImportError("torchvision was imported")\n')
    with ServerProcess(scripted, device="cpu", env={"PYTHONPATH": str(tmp_path)}) as server:
        x = samples.inputs["image"]
        tensor = {"name": "image", "datatype": "FP32", "shape": list(x.shape), "data": x.reshape(-1).tolist()}
        response = httpx.post(f"{server.url}/v2/models/digits/infer", json={"inputs": [tensor]})
        got = np.array(response.json()["outputs"][0]["data"], np.float32).reshape(16, 10)
        np.testing.assert_allclose(got, samples.outputs["logits"], rtol=1e-4, atol=1e-4)
        assert httpx.get(f"{server.url}/v2/models/digits").json()["platform"] == "pytorch_libtorch"
