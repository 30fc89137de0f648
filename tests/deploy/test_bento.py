from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import httpx
import pytest
import yaml

from dlops.artifact import open_artifact
from dlops.catalog import REQUIREMENTS
from dlops.deploy.bento import BentoInfo, _store_model, _tag_part, build_bento
from dlops.deploy.requirements import serving_requirements
from dlops.errors import MachineError, UsageError

# BentoML 1.4.39 calls pathspec 1.0 and pydantic 2.11 by names that these have deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `__get_pydantic_core_schema__` method:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A BentoML home of its own, in this process and its children."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(folder))
        patch.setenv("BENTOML_DO_NOT_TRACK", "True")
        BentoMLContainer.bentoml_home.set(str(folder))
        yield folder
        BentoMLContainer.bentoml_home.reset()


@pytest.fixture(scope="module")
def bento(home: Path, digits_artifact, tmp_path_factory: pytest.TempPathFactory) -> BentoInfo:
    return build_bento(digits_artifact, out=tmp_path_factory.mktemp("out") / "digits.bento")


def test_the_bento_and_its_model_are_in_the_store(bento: BentoInfo, home: Path, digits_artifact) -> None:
    assert bento.path.is_relative_to(home)
    assert bento.tag.startswith("digits:")
    (model,) = (entry["tag"] for entry in yaml.safe_load((bento.path / "bento.yaml").read_text())["models"])
    stored = open_artifact(home / "models" / model.replace(":", "/"))
    assert stored.to_json() == digits_artifact.to_json()
    assert bento.archive is not None
    assert bento.archive.stat().st_size > 0


def test_the_bento_asks_for_what_the_format_needs_and_no_more(bento: BentoInfo) -> None:
    wanted = (bento.path / "env/python/requirements.txt").read_text()
    assert "onnxruntime" in wanted
    assert "torch" not in wanted
    (wheel,) = (bento.path / "env/python/wheels").glob("*.whl")
    assert wheel.name.startswith("dlops-")


def test_a_bento_for_cuda_asks_for_the_gpu_builds(home: Path, digits_artifact) -> None:
    wanted = (build_bento(digits_artifact, device="cuda").path / "env/python/requirements.txt").read_text().split()
    assert any(line.startswith("onnxruntime-gpu[") for line in wanted)
    assert not any(line.startswith("onnxruntime==") for line in wanted)


def test_where_no_file_can_be_nothing_is_stored(home: Path, make_digits_artifact, tmp_path: Path) -> None:
    artifact = make_digits_artifact(tmp_path / "a", name="unstored")
    with pytest.raises(UsageError, match="/dev/null"):
        build_bento(artifact, out=Path("/dev/null/x"))
    assert not (home / "models" / "unstored").exists()


def test_a_relative_name_is_below_the_working_folder(home: Path, digits_artifact, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, written in (("x.bento", "x.bento"), ("sub/y", "sub/y.bento")):
        assert build_bento(digits_artifact, out=Path(given)).archive == tmp_path / written
        assert (tmp_path / written).stat().st_size > 0


def test_a_bento_file_is_whole_or_not_there(home: Path, digits_artifact, tmp_path: Path) -> None:
    first = build_bento(digits_artifact, out=tmp_path)
    assert first.archive is not None
    assert first.archive.parent == tmp_path
    assert first.archive.name.startswith("digits-")
    named = build_bento(digits_artifact, out=tmp_path / "mine")
    assert named.archive == tmp_path / "mine.bento"
    assert sorted(tmp_path.iterdir()) == sorted([first.archive, named.archive])


def test_the_same_artifact_twice_shares_its_model(bento: BentoInfo, home: Path, digits_artifact) -> None:
    again = build_bento(digits_artifact)
    assert again.tag != bento.tag
    assert len([path for path in (home / "models" / "digits").iterdir() if path.is_dir()]) == 1


def test_building_leaves_the_environment_as_it_was(home: Path, digits_artifact, monkeypatch) -> None:
    monkeypatch.delenv("DLOPS_ARTIFACT", raising=False)
    before = dict(os.environ)
    build_bento(digits_artifact)
    assert dict(os.environ) == before


def test_what_bentoml_says_reaches_the_user(home: Path, digits_artifact, monkeypatch) -> None:
    monkeypatch.setattr("dlops.deploy.bento._SERVICE", "raise RuntimeError('no such service, {model}')")
    with pytest.raises(MachineError, match=r"bentoml build failed: .*no such service"):
        build_bento(digits_artifact)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("a" * 100, "1"),
        ("Digits_", "2024-11-22T10:30+01:00 \u2013 second try, after the cameras were moved" * 3),
        ("d", "\u2026"),
    ],
)
def test_every_name_and_version_makes_a_tag_that_bentoml_takes(
    name: str, version: str, home: Path, make_digits_artifact, tmp_path: Path
) -> None:
    import bentoml

    artifact = make_digits_artifact(tmp_path / "it", name=name).model_copy(update={"version": version})
    tag = _store_model(artifact)
    assert bentoml.models.get(tag).tag == bentoml.Tag.from_str(tag)
    other = _store_model(artifact.model_copy(update={"version": f"{version}."}))
    assert other != tag
    assert artifact.slug in tag


def test_names_that_are_told_apart_stay_so_where_they_are_shortened() -> None:
    long = "digits-of-the-cameras-in-hall-" * 3
    parts = [_tag_part(long + end) for end in ("one", "two")]
    assert len(set(parts)) == 2
    assert all(len(part) <= 63 and part.startswith("digits-of-the-cameras") for part in parts)
    assert _tag_part("Digits-cnn_v1.2") == "digits-cnn_v1.2"


def test_what_bentoml_raises_is_one_line(digits_artifact, monkeypatch) -> None:
    from bentoml.exceptions import BentoMLException

    def refuse(artifact: object) -> str:
        raise BentoMLException("the store is of another version\nand more")

    monkeypatch.setattr("dlops.deploy.bento._store_model", refuse)
    with pytest.raises(MachineError, match=r"^digits/onnx-fp32: BentoML cannot .*of another version \(`bentoml models"):
        build_bento(digits_artifact)


def test_ctrl_c_leaves_no_half_a_model_in_the_store(
    home: Path, make_digits_artifact, tmp_path: Path, monkeypatch
) -> None:
    artifact = make_digits_artifact(tmp_path / "it", name="interrupted")
    copied: list[Path] = []

    def interrupt(source: Path, target: Path) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(target)
        target.write_bytes(source.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr("dlops.deploy.bento.shutil.copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_bento(artifact)
    assert not (home / "models" / "interrupted").exists()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_requirements_follow_format_and_device(digits_artifact) -> None:
    names = lambda lines: {line.partition("=")[0].partition(">")[0].partition("[")[0] for line in lines}  # noqa: E731
    cpu, cuda = (
        names(serving_requirements(digits_artifact)),
        names(serving_requirements(digits_artifact, device="cuda")),
    )
    assert {"bentoml", "numpy", "onnxruntime", "uvloop"} <= cpu
    assert cuda - cpu == {"onnxruntime-gpu"}
    scripted = digits_artifact.model_copy(update={"requires": REQUIREMENTS["torchscript"]})
    assert names(serving_requirements(scripted)) - cpu == {"torch"}
    # Whichever build of ONNX Runtime is installed here, the artifact was checked with its version.
    here = next(version for name in ("onnxruntime-gpu", "onnxruntime") if (version := _version(name)))
    assert f"onnxruntime=={here}" in serving_requirements(digits_artifact)
    assert f"onnxruntime-gpu[cuda,cudnn]=={here}" in serving_requirements(digits_artifact, device="cuda")
    foreign = digits_artifact.model_copy(update={"requires": ("tensorflow",)})
    with pytest.raises(UsageError, match="tensorflow"):
        serving_requirements(foreign)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bento_serves_from_a_fresh_environment(bento: BentoInfo, home: Path, digit_pngs, tmp_path: Path) -> None:
    """Installs what the Bento lists and nothing else, as a machine that never saw this project would."""
    environment = tmp_path / "fresh"
    python = environment / "bin" / "python"
    wanted = ["-r", str(bento.path / "env/python/requirements.txt")]
    wanted += [str(path) for path in (bento.path / "env/python/wheels").glob("*.whl")]
    if shutil.which("uv"):
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", str(python), *wanted], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        # What is imported is compiled by the first process that imports it.
        subprocess.run([*pip, "install", "--quiet", "--no-compile", *wanted], check=True)
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False).returncode == 1

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(environment / "bin" / "bentoml"), "serve", "digits:latest", "--port", str(port)]
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=settings, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not _is_ready(url):
            assert server.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        response = httpx.post(f"{url}/predict", content=digit_pngs[4], headers={"Content-Type": "image/png"})
        assert response.json()["predictions"][0]["label"] == "4"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False
