"""What doctor says works has been run; what crashes, hangs or answers wrongly is said and takes nothing else down."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dlops import doctor, doctor_probes
from dlops.doctor import Disk, Findings, Probe, examine, render
from dlops.environment import Environment, describe_environment

WITH_GPU = describe_environment().model_copy(update={"gpus": ("A GPU, 580, 1 MiB",)})


def shown(findings: Findings) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(findings))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def findings() -> Findings:
    return examine()


def test_what_is_installed_here_really_runs(findings: Findings) -> None:
    probes = {probe.name: probe for probe in findings.probes}
    assert set(probes) == set(doctor_probes.PROBES)
    assert probes["aotinductor cpu"].status == ("untried" if shutil.which("g++") else "absent"), probes[
        "aotinductor cpu"
    ]
    libraries = ("onnxruntime", "openvino", "executorch", "torch", "torchscript", "torchvision")
    for name in (f"{library} cpu" for library in libraries):
        assert probes[name].status == "ok", probes[name]
    assert "ran on CPUExecutionProvider" in probes["onnxruntime cpu"].reason


def test_findings_survive_json_and_all_of_them_are_shown(findings: Findings) -> None:
    assert Findings.model_validate_json(findings.model_dump_json()) == findings
    text = shown(findings)
    for probe in findings.probes:
        assert probe.name in text
    for extra in findings.extras:
        assert extra.name in text
    assert f"port {doctor.SERVE_PORT}" in text
    assert "int8" in text
    one = findings.environment.model_copy(update={"cores": 1})
    assert ", 1 core to use" in " ".join(shown(findings.model_copy(update={"environment": one})).split())


def test_extras_are_those_of_the_package_and_either_onnxruntime_counts(findings: Findings) -> None:
    extras = {extra.name: extra for extra in findings.extras}
    formats = {"openvino", "executorch", "tensorrt", "nvjpeg"}
    others = {"cpu", "gpu", "train", "export", "serve", "bench", "triton", "loadgen", "timm", "optimize", "tracing"}
    assert set(extras) == others | formats
    assert extras["cpu"].is_complete
    assert "torch" in extras["train"].installed


def test_the_handmade_onnx_model_is_valid_and_right() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_from_string(doctor_probes.tiny_onnx_model())
    onnx.checker.check_model(model, full_check=True)
    (result,) = ReferenceEvaluator(model).run(None, {"x": doctor_probes._X})
    np.testing.assert_array_equal(result, doctor_probes._EXPECTED)
    assert doctor_probes._EXPECTED.any()


def replace_probe(monkeypatch: pytest.MonkeyPatch, probe: Callable[[], str]) -> dict[str, str]:
    monkeypatch.setattr(doctor_probes, "PROBES", {"x": probe})
    return doctor_probes.run_probe("x")


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> str:
        doctor_probes._check(doctor_probes._EXPECTED + 1)
        return "ran"

    answer = replace_probe(monkeypatch, wrong)
    assert answer["status"] == "failed"
    assert "wrong result" in answer["reason"]


def test_a_provider_that_was_not_the_one_asked_for_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    class Fallen:
        def __init__(self, *arguments: object, **named: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

        def run(self, *arguments: object) -> list[np.ndarray]:
            return [doctor_probes._EXPECTED]

    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)
    answer = doctor_probes.run_probe("onnxruntime cuda")
    assert answer["status"] == "failed"
    assert "CUDAExecutionProvider was asked for and CPUExecutionProvider was given" in answer["reason"]


@pytest.mark.parametrize(("module", "count"), [("onnxruntime", 3), ("openvino", 1), ("executorch", 1), ("torch", 5)])
def test_a_library_that_is_not_installed_is_absent_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, count: int
) -> None:
    def hidden(*names: str) -> None:
        monkeypatch.setitem(sys.modules, module, None)

    hidden()
    names = [name for name in doctor_probes.PROBES if name.startswith(module)]
    assert len(names) == count
    for name in names:
        assert doctor_probes.run_probe(name) == {"status": "absent", "reason": f"{module} is not installed"}
        assert doctor._advice(name, "absent")


def test_what_is_compiled_first_is_run_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def noted(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        # Which machine this is, is asked of programs too.
        if command[1:3] == ["-m", "dlops.doctor_probes"]:
            commands.append(command[3:])
        return subprocess.CompletedProcess(command, 0, '{"status": "ok", "reason": "ran"}\n', "")

    monkeypatch.setattr(subprocess, "run", noted)
    examine(compiling=True)
    examine()
    assert [command for command in commands if command[0] == "aotinductor"] == [
        ["aotinductor", "cpu", "--compile"], ["aotinductor", "cpu"],
    ]  # fmt: skip
    assert sum("--compile" in command for command in commands) == 1


def run_as_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, *, timeout_s: float = 20) -> Probe:
    """What doctor makes of a probe process that does `body`."""
    (tmp_path / "fake.py").write_text(textwrap.dedent(body))
    run = subprocess.run

    def fake(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["-m", "dlops.doctor_probes", "torch", "cuda"]
        return run([sys.executable, str(tmp_path / "fake.py")], **settings)

    monkeypatch.setattr(subprocess, "run", fake)
    return doctor._probe("torch cuda", WITH_GPU, timeout_s)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"crashed \(SIGKILL\)"),
        ("raise SystemExit('no driver')", "exit status 1: no driver"),
        ("print('not json')", "exit status 0: it said nothing"),
        ("print('[]')", "exit status 0"),
        ("print('{}')", "exit status 0"),
    ],
)
def test_a_probe_that_dies_or_talks_nonsense_fails_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, reason: str
) -> None:
    import re

    probe = run_as_child(monkeypatch, tmp_path, body)
    assert probe.status == "failed"
    assert re.match(reason, probe.reason), probe.reason
    assert probe.advice


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = time.monotonic()
    probe = run_as_child(monkeypatch, tmp_path, "import time; time.sleep(600)", timeout_s=0.5)
    assert (probe.status, probe.reason) == ("failed", "no answer in 0.5 s")
    assert time.monotonic() - started < 60


def test_what_a_library_prints_does_not_hide_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = """print('banner'); print('{"status": "ok", "reason": "ran"}')"""
    assert run_as_child(monkeypatch, tmp_path, body) == Probe(name="torch cuda", status="ok", reason="ran")


def test_without_a_gpu_its_probes_are_absent_and_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_GPU_DEVICES", ())
    without = describe_environment().model_copy(update={"gpus": ()})
    assert doctor._probe("torch cuda", without, 1).status == "absent"


def test_it_works_with_no_extras_and_not_installed_as_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", not_installed)
    monkeypatch.setattr(doctor_probes, "PROBES", {})
    found = examine()
    assert found.extras == ()
    assert "not installed as a package" in shown(found)


@pytest.mark.parametrize(
    ("instructions", "said"),
    [
        (("avx2", "avx512_vnni"), "int8 is fast on this CPU (avx512_vnni)"),
        (("asimd", "asimddp"), "int8 is fast on this CPU (asimddp)"),
        (("avx2",), "no 8-bit dot product (VNNI)"),
        ((), "not known here"),
    ],
)
def test_the_note_on_int8_goes_by_the_instructions(instructions: tuple[str, ...], said: str) -> None:
    environment: Environment = describe_environment().model_copy(update={"instruction_sets": instructions})
    assert said in doctor._int8_note(environment)


def test_a_disk_that_is_nearly_full_is_noted(findings: Findings) -> None:
    low = Disk(path="/", free_bytes=2**30, total_bytes=2**40)
    assert any("Only 1.0 GiB of disk" in note for note in doctor._notes(findings.environment, findings.extras, low))


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert not doctor._port_is_free(number)
    assert doctor._port_is_free(number)
