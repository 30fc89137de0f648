"""OpenVINO's session: the threads and the precision that truly run, buffers that stay in place, and damaged files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from dlops import catalog
from dlops.artifact import Artifact, open_artifact
from dlops.directory import DirectoryWriter
from dlops.errors import CorruptError, MachineError
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.openvino import OpenVinoSession

OPTIONS = SessionOptions(device="cpu", threads=1)


def test_it_gives_what_the_artifact_says_and_where_it_ran(openvino_artifact: Artifact) -> None:
    artifact = open_artifact(openvino_artifact.directory)
    assert artifact.model_bytes == sum(artifact.path(role).stat().st_size for role in ("model", "weights"))
    session = open_session(artifact, OPTIONS)
    assert self_test(artifact, session).samples == 16
    placement = session.placement
    assert (placement.runtime, placement.device, placement.provider) == ("openvino", "cpu", "CPU")
    assert (placement.precision, placement.threads) == ("fp32", 1)
    assert placement.nodes["CPU"]["FullyConnected"] == 1
    session.close()


def test_the_pair_opens_in_openvinos_own_tools(openvino_artifact: Artifact) -> None:
    # Without a word about the weights: they are looked for beside the graph, under its stem.
    model = ov.Core().read_model(openvino_artifact.path("model"))
    samples = openvino_artifact.samples()
    found = ov.compile_model(model, "CPU")(samples.inputs["image"])["logits"]
    np.testing.assert_allclose(found, samples.outputs["logits"], rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("precision", "capabilities", "hint"),
    [
        ("fp32", {"FP32", "BF16", "FP16"}, "f32"), ("int8", {"FP32", "BF16", "FP16", "INT8"}, "f32"),
        ("fp16", {"FP32", "BF16", "FP16"}, "f16"), ("fp16", {"FP32", "BF16"}, "f32"),
        ("bf16", {"FP32", "BF16"}, "bf16"), ("bf16", {"FP32"}, "f32"),
    ],
)  # fmt: skip
def test_each_precision_is_asked_for_by_name_and_two_sessions_share_no_pinned_core(
    openvino_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, precision: str, capabilities: set[str], hint: str
) -> None:
    """Where the CPU multiplies bfloat16, OpenVINO takes it for fp32, and for fp16 too, unless it is told otherwise."""
    compile_model, get_property, told = ov.Core.compile_model, ov.Core.get_property, {}

    def known(self: ov.Core, device: str, name: str) -> object:
        return list(capabilities) if name == "OPTIMIZATION_CAPABILITIES" else get_property(self, device, name)

    def recorded(self: ov.Core, model: ov.Model, device: str, settings: dict[str, object]) -> ov.CompiledModel:
        told.update(settings, device=device)
        return compile_model(self, model, device, settings)

    monkeypatch.setattr(ov.Core, "compile_model", recorded)
    monkeypatch.setattr(ov.Core, "get_property", known)
    variant = openvino_artifact.variant.model_copy(update={"precision": precision})
    artifact = openvino_artifact.model_copy(update={"variant": variant})
    open_session(artifact, OPTIONS).close()
    assert told["INFERENCE_PRECISION_HINT"] == hint
    assert (told["device"], told["PERFORMANCE_HINT"]) == ("CPU", "LATENCY")
    assert (told["INFERENCE_NUM_THREADS"], told["ENABLE_CPU_PINNING"]) == (1, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (SessionOptions(device="cuda"), "CUDA was asked for, which OpenVINO does not run on"),
        (SessionOptions(device="cpu", cuda_graph=True), "this would run on the CPU"),
    ],
)
def test_what_it_cannot_run_on_is_refused(openvino_artifact: Artifact, options: SessionOptions, said: str) -> None:
    with pytest.raises(MachineError, match=said):
        open_session(openvino_artifact, options)


def test_bound_calls_read_and_write_the_same_arrays(openvino_artifact: Artifact) -> None:
    session = OpenVinoSession(openvino_artifact, OPTIONS)
    images = openvino_artifact.samples().inputs["image"]
    first, second = images[:4].copy(), images[4:8].copy()
    second.flags.writeable = False
    bound = session.bind({"image": first})
    before = bound.copy_out()
    np.testing.assert_array_equal(before["logits"], session.run({"image": first})["logits"])
    bound.copy_in({"image": second})
    bound.run()
    bound.synchronize()
    after = bound.copy_out()
    np.testing.assert_array_equal(after["logits"], session.run({"image": second})["logits"])
    assert not np.array_equal(before["logits"], after["logits"])
    # Nothing was copied: OpenVINO computes on these very arrays.
    inside = bound._request.get_input_tensor(0).data, bound._request.get_output_tensor(0).data
    assert np.shares_memory(inside[0], bound._inputs["image"])
    assert np.shares_memory(inside[1], bound._outputs["logits"])
    with pytest.raises(ValueError, match=r"image: float64\[4, 1, 8, 8\] given"):
        bound.copy_in({"image": np.zeros((4, 1, 8, 8))})
    session.close()


def test_answers_stay_when_the_next_run_is_made(openvino_artifact: Artifact) -> None:
    session = open_session(openvino_artifact, OPTIONS)
    images = openvino_artifact.samples().inputs["image"]
    first = session.run({"image": images[:2]})["logits"]
    kept = first.copy()
    session.run({"image": images[2:4]})
    np.testing.assert_array_equal(first, kept)


def test_several_threads_may_call_it(openvino_artifact: Artifact) -> None:
    session = open_session(openvino_artifact, OPTIONS)
    images = openvino_artifact.samples().inputs["image"]
    expected = [session.run({"image": images[i : i + 1]})["logits"] for i in range(16)]

    def calls(place: int) -> bool:
        return all(
            np.array_equal(session.run({"image": images[i : i + 1]})["logits"], expected[i])
            for i in (place, 15 - place) * 20
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(calls, range(4)))


@pytest.mark.parametrize(
    ("role", "alter", "said"),
    [
        ("model", lambda content: content[: len(content) // 2], "OpenVINO cannot load it: .* at offset"),
        ("model", lambda content: b"\x08\x08" + content, "is not an OpenVINO model"),
        ("model", lambda content: content.replace(b"logits", b"scores"), "its outputs are scores, .* has logits"),
        ("weights", lambda content: content[:100], "OpenVINO cannot load it: Incorrect weights in bin file"),
        ("weights", None, "names no weights file"),
    ],
)
def test_damaged_files_are_named_where_digests_match(
    openvino_artifact: Artifact, tmp_path: Path, role: str, alter: Callable[[bytes], bytes] | None, said: str
) -> None:
    contents = {name: openvino_artifact.path(name).read_bytes() for name in ("model", "weights", "samples")}
    if alter is None:
        del contents[role]
    else:
        contents[role] = alter(contents[role])
    suffixes = {"model": "xml", "weights": "bin", "samples": "safetensors"}
    with DirectoryWriter(tmp_path / "a") as writer:
        files = {name: writer.add(f"{name}.{suffixes[name]}", content) for name, content in contents.items()}
        artifact = writer.commit(openvino_artifact.model_copy(update={"files": files}))
    with pytest.raises(CorruptError, match=said):
        open_session(open_artifact(artifact.directory), OPTIONS)


@pytest.mark.parametrize("table", ["RUNTIMES", "FORMATS"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for name in ("dlops.runtimes.openvino", "dlops.export.to_openvino"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MachineError, match="needs openvino, which is not installed") as caught:
        catalog.resolve(getattr(catalog, table), "format", "openvino")
    assert caught.value.hint == "pip install 'dlops[openvino]'"
