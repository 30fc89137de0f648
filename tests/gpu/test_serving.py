"""The service on CUDA: it answers as the samples say, with and without CUDA graphs, and its metrics tell of the GPU."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import tritonclient.http

import dlops
from dlops.artifact import Artifact
from dlops.serve.launch import ServerProcess
from dlops.train.launch import configure, train_recipe


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = train_recipe("cnn", configure("cnn", overrides=["epochs=6"]), run_dir=folder / "run")
    [made] = dlops.export_variants(checkpoint, variants=["onnx-fp32"], out=folder / "artifacts", device="cuda")
    return made


@pytest.mark.parametrize("graphs", [False, True], ids=["no graphs", "CUDA graphs"])
def test_it_answers_as_the_samples_say(graphs: bool, artifact: Artifact) -> None:
    samples = artifact.samples()
    (spec,), (output,) = artifact.signature.inputs, artifact.signature.outputs
    x = samples.inputs[spec.name]
    with ServerProcess(artifact, device="cuda", env={"DLOPS_CUDA_GRAPHS": "1"} if graphs else {}) as server:
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            for rows in (1, 3, len(x)):
                tensor = tritonclient.http.InferInput(spec.name, [rows, *x.shape[1:]], "FP32")
                tensor.set_data_from_numpy(x[:rows])
                found = client.infer(artifact.name, [tensor]).as_numpy(output.name)
                np.testing.assert_array_equal(found.argmax(axis=1), samples.outputs[output.name][:rows].argmax(axis=1))
            config = client.get_model_config(artifact.name)
        assert sum(group["count"] for group in config["instance_group"]) == 2
        assert {group["kind"] for group in config["instance_group"]} == {"KIND_GPU"}
        text = httpx.get(f"{server.url}/metrics").text
    assert 'device="cuda:0"' in text
    (used,) = [line for line in text.splitlines() if line.startswith("nv_gpu_memory_used_bytes{")][:1]
    assert float(used.rpartition(" ")[2]) > 0


def test_a_photo_is_answered(artifact: Artifact, digit_pngs: list[bytes]) -> None:
    with ServerProcess(artifact, device="cuda") as server:
        answer = httpx.post(f"{server.url}/predict", content=digit_pngs[0], headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0]["top"]
