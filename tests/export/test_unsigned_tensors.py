"""Models that take unsigned whole numbers of more than 8 bits, such as 16-bit pictures: from saving to serving."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dlops.artifact import Artifact, open_artifact
from dlops.bench.run import measure
from dlops.checkpoint import Checkpoint
from dlops.errors import InputError, UsageError
from dlops.export.pipeline import export_variants
from dlops.parity import self_test
from dlops.program import read_program
from dlops.runtimes import SessionOptions, open_session
from dlops.samples import read_samples
from dlops.saving import save_checkpoint
from dlops.serve import protocol

CPU = SessionOptions(device="cpu", threads=1)
DTYPES = ("uint16", "uint32", "uint64")
VARIANTS = ("torchscript-fp32", "torchexport-fp32", "onnx-fp32", "openvino-fp32", "onnx-int8dyn")


class Deep(nn.Module):
    """A classifier of pictures with more than 8 bits a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.classify = nn.Linear(8, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.classify(self.convolve(pixels.float() / 65_535).relu().mean((2, 3)))


def pixels(count: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65_536, (count, 1, 12, 12)).astype(dtype)


@pytest.fixture(scope="module", params=DTYPES)
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    rows, model = torch.from_numpy(pixels(24, request.param)), Deep()
    return save_checkpoint(
        model, tmp_path_factory.mktemp("deep") / "run", evaluation=(rows, model(rows).argmax(1)), name="deep",
        max_batch=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(deep: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    found = export_variants(deep, variants=VARIANTS, out=tmp_path_factory.mktemp("out"), model=Deep)
    return {artifact.slug: open_artifact(artifact.directory) for artifact in found}


def test_every_format_takes_them(deep: Checkpoint, made: dict[str, Artifact]) -> None:
    (spec,) = deep.signature.inputs
    assert set(made) == set(VARIANTS)
    rows = pixels(5, spec.dtype, seed=1)
    with torch.no_grad():
        expected = deep.build_module(Deep)(torch.from_numpy(rows)).numpy()
    for slug, artifact in made.items():
        assert [one.dtype for one in artifact.signature.inputs] == [spec.dtype], slug
        session = open_session(artifact, CPU)
        self_test(artifact, session)
        near = 2e-2 if slug == "onnx-int8dyn" else 1e-5
        bound = session.bind({spec.name: rows})
        bound.run()
        bound.synchronize()
        for found in (session.run({spec.name: rows}), bound.copy_out()):
            np.testing.assert_allclose(found["logits"], expected, atol=near, err_msg=slug)
        session.close()
    (row,) = measure([made["onnx-fp32"]], batch=[4], duration_s=0.2, threads=1, device="cpu").measurements
    assert row.latency.samples


def test_the_protocol_has_them_in_json_and_in_bytes(made: dict[str, Artifact]) -> None:
    signature = made["onnx-fp32"].signature
    (spec,) = signature.inputs
    dtype = np.dtype(spec.dtype)
    rows = pixels(1, spec.dtype)
    rows[0, 0, 0, 0] = np.iinfo(dtype).max
    header = {"name": spec.name, "datatype": dtype.name.upper(), "shape": [1, 1, 12, 12]}

    def decode(entry: dict, tail: bytes = b"") -> protocol.InferRequest:
        text = json.dumps({"inputs": [header | entry]}).encode()
        return protocol.decode_request(text + tail, json_bytes=len(text) if tail else None, signature=signature)

    as_text = decode({"data": rows.ravel().tolist()})
    as_bytes = decode({"parameters": {"binary_data_size": rows.nbytes}}, rows.tobytes())
    for request in (as_text, as_bytes):
        assert request.feed[spec.name].dtype == dtype
        np.testing.assert_array_equal(request.feed[spec.name], rows)
    for wrong, said in (
        (-1, "values"),
        (int(np.iinfo(dtype).max) + 1, "values"),
        (0.5, f"not all {dtype.name.upper()}"),
    ):
        with pytest.raises(InputError, match=said):
            decode({"data": [wrong] * rows.size})


def test_samples_keep_every_bit(deep: Checkpoint, tmp_path: Path) -> None:
    samples = deep.samples("evaluation")
    assert samples is not None
    (spec,) = deep.signature.inputs
    path = tmp_path / "samples.safetensors"
    path.write_bytes(samples.to_bytes())
    for kept in (samples, read_samples(path)):
        assert kept.inputs[spec.name].dtype == spec.dtype
        assert kept.inputs[spec.name].tobytes() == pixels(24, spec.dtype).tobytes()


def test_the_runtimes_that_have_them_not_are_refused(deep: Checkpoint, tmp_path: Path) -> None:
    for slug in ("executorch-fp32", "tensorrt-fp32"):
        with pytest.raises(UsageError, match=r"is uint\d+, which its runtime does not take; torchscript, onnx, torche"):
            export_variants(deep, variants=[slug], out=tmp_path, model=Deep)


def test_a_program_of_torchs_takes_them(deep: Checkpoint, tmp_path: Path) -> None:
    (spec,) = deep.signature.inputs
    rows = torch.from_numpy(pixels(3, spec.dtype))
    path = tmp_path / "deep.pt2"
    torch.export.save(torch.export.export(deep.build_module(Deep), (rows,)), path)
    program = read_program(path)
    assert [one.dtype for one in program.inputs] == [getattr(torch, spec.dtype)]
    torch.testing.assert_close(program.module(rows)[0], deep.build_module(Deep)(rows))
