"""TensorRT's engines on disk and what ONNX Runtime is told, without a GPU: sessions are stand-ins on the CPU.

tests/gpu/test_tensorrt.py runs the provider itself.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from dlops.artifact import Artifact, open_artifact
from dlops.bench.inprocess import misplaced
from dlops.errors import MachineError
from dlops.runtimes import SessionOptions, eager, onnxruntime, open_session, tensorrt_provider
from dlops.runtimes.session import Placement
from dlops.runtimes.tensorrt_provider import PROVIDER, Engines, engine_key, provider_options
from dlops.signature import DimRange, Signature, TensorSpec
from dlops.trust import note_made_here, was_made_here

OPTIONS = SessionOptions(device="tensorrt", threads=1)
KEY = engine_key("NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB", "10.13.0", "1.31.1")


@pytest.fixture
def artifact(digits_artifact: Artifact, tmp_path: Path) -> Artifact:
    shutil.copytree(digits_artifact.directory, tmp_path / "digits")
    return open_artifact(tmp_path / "digits")


class Provider:
    """In place of ort.InferenceSession: notes what it is told, builds an "engine", and computes on the CPU."""

    def __init__(self, *, takes: str = PROVIDER) -> None:
        self.takes = takes
        self.told: list[list[Any]] = []
        self.built = 0
        self._real = ort.InferenceSession

    def __call__(self, model: str, *, sess_options: Any, providers: list[Any], **_: object) -> Any:
        self.told.append(providers)
        (_, options), *_ = providers
        engine = Path(options["trt_engine_cache_path"], "graph_sm90.engine")
        if not engine.exists():
            self.built += 1
            engine.write_bytes(b"native code")
        session = self._real(model, sess_options=sess_options, providers=["CPUExecutionProvider"])
        return _Session(session, self.takes)


class _Session:
    def __init__(self, session: Any, takes: str) -> None:
        self._session, self._takes = session, takes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        class Group:
            ep_name = self._takes

            def get_nodes(self) -> list[Any]:
                return []

        return [Group()]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    stand_in = Provider()
    monkeypatch.setattr(ort, "InferenceSession", stand_in)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "cuda_works", lambda: True)
    monkeypatch.setattr(tensorrt_provider, "load_libraries", lambda: None)
    monkeypatch.setattr(tensorrt_provider, "version", lambda: "10.13.0")
    return stand_in


def test_a_session_is_told_what_tensorrt_needs_and_runs(artifact: Artifact, provider: Provider) -> None:
    samples = artifact.samples()
    with contextlib.closing(open_session(artifact, OPTIONS)) as session:
        outputs = session.run(samples.inputs)
        placement = session.placement
    np.testing.assert_allclose(outputs["logits"], samples.outputs["logits"], rtol=1e-4, atol=1e-4)
    assert (placement.device, placement.provider) == ("cuda:0", PROVIDER)
    ((name, options), (behind, _), last) = provider.told[0]
    assert (name, behind, last) == (PROVIDER, "CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert options["trt_profile_min_shapes"] == "image:1x1x8x8"
    assert options["trt_profile_opt_shapes"] == "image:8x1x8x8"
    assert options["trt_profile_max_shapes"] == "image:64x1x8x8"
    # What it was told of is gone, and what it built is with the artifact.
    assert not Path(options["trt_engine_cache_path"]).exists()
    (kept,) = (artifact.directory / "tensorrt").rglob("*.engine")
    assert kept.read_bytes() == b"native code"
    assert open_artifact(artifact.directory).to_json() == artifact.to_json()


def test_an_engine_is_built_once(artifact: Artifact, provider: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    for built in (1, 1):
        open_session(artifact, OPTIONS).close()
        assert provider.built == built
    assert capsys.readouterr().err.count("TensorRT builds its engine") == 1


def test_an_engine_from_elsewhere_is_built_anew_unless_it_is_trusted(
    artifact: Artifact, provider: Provider, capsys: pytest.CaptureFixture[str]
) -> None:
    open_session(artifact, OPTIONS).close()
    (kept,) = (artifact.directory / "tensorrt").rglob("*.engine")
    kept.write_bytes(b"somebody's native code")
    open_session(artifact, SessionOptions(device="tensorrt", threads=1, trust=True)).close()
    assert provider.built == 1
    assert kept.read_bytes() == b"somebody's native code"
    open_session(artifact, OPTIONS).close()
    assert provider.built == 2
    assert kept.read_bytes() == b"native code"
    assert "1 files in" in capsys.readouterr().err


def test_an_engine_that_is_built_late_is_kept_at_the_end(artifact: Artifact, provider: Provider) -> None:
    session = open_session(artifact, OPTIONS)
    folder = Path(provider.told[0][0][1]["trt_engine_cache_path"])
    (folder / "late_sm90.engine").write_bytes(b"for another shape")
    session.close()
    assert sorted(path.name for path in (artifact.directory / "tensorrt").rglob("*.engine")) == [
        "graph_sm90.engine", "late_sm90.engine",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_told_and_the_session_works(
    artifact: Artifact, provider: Provider, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where the folder should be stands a file: root may write anywhere else.
    (artifact.directory / "tensorrt").write_text("")
    session = open_session(artifact, OPTIONS)
    assert session.run(artifact.samples().inputs)["logits"].shape == (16, 10)
    session.close()
    assert "engines are not kept" in capsys.readouterr().err


def test_a_graph_of_which_tensorrt_takes_nothing_is_an_error(artifact: Artifact, provider: Provider) -> None:
    provider.takes = "CUDAExecutionProvider"
    with pytest.raises(MachineError, match="takes no node of the graph: CUDAExecutionProvider would run it"):
        open_session(artifact, OPTIONS)
    (folder,) = (Path(told[0][1]["trt_engine_cache_path"]) for told in provider.told)
    assert not folder.exists()


def test_without_a_gpu_or_its_libraries_it_is_an_error(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="no GPU with ONNX Runtime's TensorRT build"):
        open_session(artifact, OPTIONS)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER])
    monkeypatch.setattr(onnxruntime, "cuda_works", lambda: True)
    monkeypatch.setattr(tensorrt_provider, "_LIBRARIES", ("libdlops-has-no-such.so.10",))
    with pytest.raises(MachineError, match=r"libdlops-has-no-such.so.10 does not load") as refused:
        open_session(artifact, OPTIONS)
    assert "pip install 'tensorrt" in str(refused.value.hint)


def test_torch_does_not_run_on_it() -> None:
    with pytest.raises(MachineError, match="TensorRT was asked for, which torch's modules"):
        eager.choose_device(OPTIONS)


@pytest.mark.parametrize(
    ("precision", "flag"), [("fp32", None), ("fp16", "trt_fp16_enable"), ("int8", "trt_int8_enable")]
)
def test_the_precision_of_the_graph_is_allowed_and_no_other(precision: str, flag: str | None) -> None:
    signature = Signature(
        inputs=(
            TensorSpec(name="image", dtype="float32", shape=("batch", 3, "height", 32)),
            TensorSpec(name="scale", dtype="float32", shape=(1,)),
        ),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 10)),),
        dims={"batch": DimRange(max=4), "height": DimRange(min=32, max=64)},
    )  # fmt: skip
    options = provider_options(signature, precision, folder=None)
    assert [name for name in options if name.endswith("_enable")] == ([flag] if flag else [])
    assert options["trt_profile_min_shapes"] == "image:1x3x32x32"
    assert options["trt_profile_opt_shapes"] == options["trt_profile_max_shapes"] == "image:4x3x64x32"


def test_engines_of_other_gpus_drivers_and_versions_lie_apart(artifact: Artifact) -> None:
    assert KEY == "NVIDIA-H100-80GB-HBM3_driver-580.65.06_tensorrt-10.13.0_onnxruntime-1.31.1"
    keys = {KEY, engine_key("NVIDIA L4, 580.65.06, 1 MiB", "10.13.0", "1.31.1"), engine_key("", "10.13.0", "1.31.1")}
    assert len(keys) == 3
    # And those of other weights under the same graph.
    folders = set()
    for digest in ("a" * 64, "b" * 64):
        payload = artifact.files["model"].model_copy(update={"sha256": digest})
        other = artifact.model_copy(update={"files": {**artifact.files, "model": payload}})
        engines = Engines(other.located_at(artifact.directory), OPTIONS, key=KEY)
        (engines.path / "x.engine").write_bytes(digest.encode())
        engines.close()
        folders |= {path.parent for path in (artifact.directory / "tensorrt").rglob("*.engine")}
    assert len(folders) == 2


def test_only_engines_and_their_caches_are_kept(artifact: Artifact) -> None:
    engines = Engines(artifact, OPTIONS, key=KEY)
    for name in ("a.engine", "a.profile", "a.timing", "other.txt"):
        (engines.path / name).write_bytes(name.encode())
    assert engines.is_empty
    engines.close()
    kept = sorted(path for path in (artifact.directory / "tensorrt").rglob("*") if path.is_file())
    assert [path.name for path in kept] == ["a.engine", "a.profile", "a.timing"]
    again = Engines(artifact, OPTIONS, key=KEY)
    assert not again.is_empty
    again.close()


def test_what_was_made_here_is_noted_by_digest(artifact: Artifact) -> None:
    digest = "c" * 64
    assert not was_made_here(digest)
    note_made_here(digest)
    assert was_made_here(digest)


def test_a_row_on_tensorrt_is_where_it_was_asked_to_be() -> None:
    def placed(provider: str) -> Placement:
        return Placement(runtime="onnxruntime", device="cuda:0", provider=provider, precision="fp32", threads=1)

    assert misplaced(OPTIONS, placed(PROVIDER)) == ()
    assert "asked for tensorrt" in misplaced(OPTIONS, placed("CUDAExecutionProvider"))[0]
