"""Models whose inputs and outputs are bfloat16, which numpy has not: from saving to serving and measuring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.bench.run import measure
from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.errors import InputError, UsageError
from dlops.export.pipeline import export_variants
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.samples import read_safetensors, read_samples
from dlops.saving import save_checkpoint
from dlops.serve import protocol
from dlops.serve.launch import ServerProcess
from dlops.signature import BFLOAT16
from dlops.workflows.ask import ask_artifact

CPU = SessionOptions(device="cpu", threads=1)
VARIANTS = ("torchscript-fp32", "torchexport-fp32")


class Narrow(nn.Module):
    """Computes in fp32 what comes and goes in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.float()).to(torch.bfloat16)


def _rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    rows = _rows(24)
    model = Narrow()
    targets = model(rows).argmax(1)
    return save_checkpoint(
        model, tmp_path_factory.mktemp("narrow") / "run", evaluation=(rows, targets), name="narrow", max_batch=8
    )


@pytest.fixture(scope="module")
def made(narrow: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    found = export_variants(narrow, variants=VARIANTS, out=tmp_path_factory.mktemp("out"), model=Narrow)
    return {artifact.slug: open_artifact(artifact.directory) for artifact in found}


def test_samples_keep_them_bit_by_bit(narrow: Checkpoint, tmp_path: Path) -> None:
    samples = load_checkpoint(narrow.directory).samples("evaluation")
    assert samples is not None
    (array,) = samples.inputs.values()
    assert array.dtype == BFLOAT16
    assert array.tobytes() == _rows(24).view(torch.int16).numpy().tobytes()
    path = tmp_path / "samples.safetensors"
    path.write_bytes(samples.to_bytes())
    again = read_samples(path)
    assert [one.tobytes() for one in again.raw] == [one.tobytes() for one in samples.raw]
    assert again.fingerprints() == samples.fingerprints()
    assert read_safetensors(path)["target"].dtype == np.int64


@pytest.mark.parametrize("slug", VARIANTS)
def test_an_artifact_takes_and_gives_them(slug: str, made: dict[str, Artifact], narrow: Checkpoint) -> None:
    artifact = made[slug]
    assert [one.dtype for one in (*artifact.signature.inputs, *artifact.signature.outputs)] == ["bfloat16"] * 2
    session = open_session(artifact, CPU)
    self_test(artifact, session)
    rows = _rows(5, seed=1)
    feed = {artifact.signature.inputs[0].name: rows.view(torch.int16).numpy().view(BFLOAT16)}
    expected = narrow.build_module(Narrow)(rows)
    for found in (session.run(feed)["logits"], session.bind(feed).copy_out()["logits"]):
        assert found.dtype == BFLOAT16
        np.testing.assert_array_equal(found.astype(np.float32), expected.detach().float().numpy())
    session.close()
    (row,) = measure([artifact], batch=[4], duration_s=0.2, threads=1, device="cpu").measurements
    assert row.latency.samples


def test_the_runtimes_that_have_no_arrays_of_them_are_refused(narrow: Checkpoint, tmp_path: Path) -> None:
    for slug in ("onnx-fp32", "openvino-fp32", "executorch-fp32"):
        with pytest.raises(
            UsageError, match=r"is bfloat16, which its runtime does not take; torchscript, torchexport, aoti"
        ):
            export_variants(narrow, variants=[slug], out=tmp_path, model=Narrow)


def test_the_protocol_has_them_in_json_and_in_bytes(made: dict[str, Artifact]) -> None:
    signature = made["torchscript-fp32"].signature
    (spec,) = signature.inputs
    values = np.array([[1.5, -2, 0.25, 1e30, 0, 3]], BFLOAT16)
    header = {"inputs": [{"name": spec.name, "datatype": "BF16", "shape": [1, 6]}]}
    header["inputs"][0]["data"] = values.ravel().tolist()
    as_text = protocol.decode_request(json.dumps(header).encode(), json_bytes=None, signature=signature)
    del header["inputs"][0]["data"]
    header["inputs"][0]["parameters"] = {"binary_data_size": 12}
    text = json.dumps(header).encode()
    in_bytes = protocol.decode_request(text + values.tobytes(), json_bytes=len(text), signature=signature)
    for request in (as_text, in_bytes):
        assert request.feed[spec.name].dtype == BFLOAT16
        np.testing.assert_array_equal(request.feed[spec.name], values)
    encoded = protocol.encode_response(
        {"logits": values}, [protocol.Wanted(name="logits", binary=False)], model="narrow", version="1", identity=None
    )
    (output,) = json.loads(encoded.body)["outputs"]
    assert (output["datatype"], output["data"]) == ("BF16", values.ravel().tolist())
    broken = values.copy()
    broken[0, 0] = np.inf
    masked = protocol.decode_request(text + broken.tobytes(), json_bytes=len(text), signature=signature)
    np.testing.assert_array_equal(masked.feed[spec.name], broken)
    with pytest.raises(InputError, match="NaN or infinity in it"):
        signature.check(masked.feed)


def test_a_service_of_them_is_measured_and_answers_people(made: dict[str, Artifact]) -> None:
    artifact = made["torchscript-fp32"]
    labels = ask_artifact(artifact, artifact.samples(), device="cpu")
    assert labels == tuple(str(target) for target in artifact.samples().targets)
    with ServerProcess(artifact, device="cpu", env={"DLOPS_THREADS": "1"}) as server:
        measured = measure([server.url], payload=artifact, batch=[2], concurrency=[1], duration_s=0.3)
    (row,) = measured.measurements
    assert (row.errors, row.artifact) == ({}, "torchscript-fp32")
