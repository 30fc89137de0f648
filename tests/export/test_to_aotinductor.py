"""AOTInductor on a tiny network: one compilation, then what is in the package and who may load it."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torch import nn

from dlops import doctor_probes
from dlops.artifact import Artifact, open_artifact
from dlops.bench.run import measure
from dlops.embedded import read_embedded
from dlops.environment import describe_environment
from dlops.errors import MachineError, UsageError
from dlops.export.formats import machine_paths
from dlops.export.pipeline import export_variants
from dlops.export.to_aotinductor import check_compiler
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, aotinductor, open_session
from dlops.samples import Samples
from dlops.saving import save_checkpoint
from dlops.serve.launch import ServerProcess

CPU = SessionOptions(device="cpu", threads=1)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here, which AOTInductor compiles with"),
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("aotinductor")
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((24, 6), np.float32)
    checkpoint = save_checkpoint(
        Tiny(), folder / "run", name="tiny", max_batch=8, evaluation=Samples(raw=tuple(x), inputs={"x": x})
    )
    [artifact] = export_variants(checkpoint, variants=["aotinductor-fp32"], model=Tiny, out=folder / "artifacts")
    return artifact


def test_doctor_compiles_and_runs_a_model(compiled: Artifact) -> None:
    answer = doctor_probes.run_probe("aotinductor cpu", compiling=True)
    assert answer["status"] == "ok", answer
    assert "compiled, loaded and ran" in answer["reason"]


def test_it_runs_at_every_batch_and_says_what_it_is(compiled: Artifact) -> None:
    assert compiled.parity.batches == (1, 2, 7, 8)
    assert compiled.provenance.notes["compiled_for"] == "cpu"
    session = open_session(compiled, CPU)
    assert (session.placement.runtime, session.placement.device) == ("aotinductor", "cpu")
    self_test(compiled, session)
    session.close()
    form, said = read_embedded(compiled.path("model"))
    assert (form, said.variant) == ("aotinductor", "aotinductor-fp32")


def test_bench_measures_it_in_a_process_of_its_own(compiled: Artifact) -> None:
    (row,) = measure([compiled], duration_s=0.1, device="cpu", threads=1).measurements
    assert (row.runtime, row.device) == ("aotinductor", "cpu")


def test_it_is_served_as_it_ran(compiled: Artifact) -> None:
    samples = compiled.samples()
    x, expected = samples.inputs["x"], next(iter(samples.outputs.values()))
    with ServerProcess(compiled, device="cpu") as server:
        assert httpx.get(f"{server.url}/v2/models/tiny").json()["platform"] == "dlops_aotinductor"
        for rows in (1, 5, 8):
            tensor = {"name": "x", "datatype": "FP32", "shape": [rows, 6], "data": x[:rows].reshape(-1).tolist()}
            response = httpx.post(f"{server.url}/v2/models/tiny/infer", json={"inputs": [tensor]})
            got = np.array(response.json()["outputs"][0]["data"], np.float32).reshape(rows, 3)
            np.testing.assert_allclose(got, expected[:rows], rtol=1e-4, atol=1e-4)


def test_the_package_holds_no_source_and_no_path_of_this_machine(compiled: Artifact) -> None:
    with zipfile.ZipFile(compiled.path("model")) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert [name for name in contents if name.endswith(".so")]
    assert not [name for name in contents if name.endswith((".cpp", ".h"))]
    for path in machine_paths():
        assert not [name for name, content in contents.items() if path in content]


def test_elsewhere_it_is_loaded_only_where_one_trusts_it(
    compiled: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    opened = open_artifact(compiled.directory)

    def never(*_: object) -> None:
        raise AssertionError("it was loaded")

    with monkeypatch.context() as patch:
        patch.setattr("torch._inductor.aoti_load_package", never)
        with pytest.raises(UsageError, match="native code, which would run with all of your rights"):
            open_session(opened, CPU)
    self_test(opened, open_session(opened, SessionOptions(device="cpu", threads=1, trust=True)))


def test_a_processor_that_lacks_its_instructions_is_said(compiled: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = describe_environment().model_copy(update={"instruction_sets": ()})
    monkeypatch.setattr(aotinductor, "describe_environment", lambda: fewer)
    with pytest.raises(MachineError, match="compiled on a processor with"):
        open_session(compiled, CPU)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match="there is no no-such-compiler here") as caught:
        check_compiler()
    assert "g++" in str(caught.value.hint)
