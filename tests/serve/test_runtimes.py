"""Artifacts of the runtimes that no other file serves, each exported and behind a server of its own."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from dlops.export.pipeline import export_variants
from dlops.saving import save_checkpoint
from dlops.serve.launch import ServerProcess


@pytest.mark.parametrize("form", ["executorch", "torchexport"])
def test_an_artifact_is_served_and_answers_as_it_did_at_export(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    inputs = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    module = torch.nn.Linear(6, 3)
    save_checkpoint(module, tmp_path / "run", evaluation=(inputs, np.arange(16) % 3), name="linear", max_batch=4)
    (made,) = export_variants(tmp_path / "run", variants=[f"{form}-fp32"], out=tmp_path / "out", model=module)
    samples = made.samples()
    (name,), (output,) = samples.inputs, samples.outputs
    with ServerProcess(made, device="cpu") as server:
        for row in range(0, 8, 4):
            x = samples.inputs[name][row : row + 4]
            tensor = {"name": name, "datatype": "FP32", "shape": list(x.shape), "data": x.reshape(-1).tolist()}
            response = httpx.post(f"{server.url}/v2/models/linear/infer", json={"inputs": [tensor]})
            got = np.array(response.json()["outputs"][0]["data"], np.float32).reshape(4, 3)
            np.testing.assert_allclose(got, samples.outputs[output][row : row + 4], rtol=1e-5, atol=1e-5)
        document = httpx.get(f"{server.url}/v2/models/linear/config").json()
        assert form in document["platform"]
