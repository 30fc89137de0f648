"""There is no Docker here: the Dockerfiles are read, and what they name is checked against what they get."""

from __future__ import annotations

import errno
import json
import re
import zipfile
from pathlib import Path

import pytest

from dlops.artifact import open_artifact
from dlops.deploy.docker import write_docker_context
from dlops.errors import MachineError, UsageError

DEVICES = ("cpu", "cuda")


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) with continuation lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module", params=DEVICES)
def context(request: pytest.FixtureRequest, digits_artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_docker_context(digits_artifact, out=tmp_path_factory.mktemp("docker") / "ctx", device=request.param)


def test_the_artifact_in_the_folder_is_whole(context: Path, digits_artifact) -> None:
    assert open_artifact(context / "artifact").to_json() == digits_artifact.to_json()


def test_every_copied_path_is_in_the_folder_and_not_ignored(context: Path) -> None:
    copied = [arguments.split()[0] for name, arguments in instructions(context / "Dockerfile") if name == "COPY"]
    assert set(copied) == {"requirements.txt", "wheels", "artifact"}
    for name in copied:
        assert (context / name).exists()
        assert f"!{name}" in (context / ".dockerignore").read_text().splitlines()
    (wheel,) = (context / "wheels").glob("*.whl")
    assert zipfile.ZipFile(wheel).testzip() is None


def test_the_dockerfile_is_well_formed(context: Path) -> None:
    steps = instructions(context / "Dockerfile")
    names = [name for name, _ in steps]
    assert set(names) <= {"ARG", "FROM", "ENV", "COPY", "RUN", "USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert names[:2] == ["ARG", "FROM"]
    assert names.count("CMD") == 1
    assert names.index("USER") < names.index("CMD")
    assert dict(steps)["USER"] != "root"
    command = json.loads(dict(steps)["CMD"])
    assert command[:3] == ["bentoml", "serve", "dlops.serve.service:Service"]
    # A container has a network of its own, so there the service must be told to listen on all addresses.
    assert command[command.index("--host") + 1] == "0.0.0.0"
    check = json.loads(dict(steps)["HEALTHCHECK"].partition("CMD ")[2])
    assert check == ["python", "-m", "dlops.serve.health", command[command.index("--port") + 1]]


def test_the_variables_are_ones_that_the_service_reads(context: Path) -> None:
    from dlops.serve.settings import Settings

    given = dict(re.findall(r"(\w+)=(\S+)", dict(instructions(context / "Dockerfile"))["ENV"]))
    settings = Settings.from_environment(given)
    assert settings.artifact == ("/srv/artifact",)
    assert settings.device in (*DEVICES,)
    assert {name for name in given if name.startswith("DLOPS_")} == {"DLOPS_ARTIFACT", "DLOPS_DEVICE"}
    assert given["BENTOML_DO_NOT_TRACK"] == "True"


def test_each_device_gets_its_packages(digits_artifact, tmp_path: Path) -> None:
    texts = {
        device: (
            write_docker_context(digits_artifact, out=tmp_path / device, device=device) / "requirements.txt"
        ).read_text()
        for device in DEVICES
    }
    assert "onnxruntime-gpu[cuda,cudnn]" in texts["cuda"]
    assert "onnxruntime-gpu" not in texts["cpu"]
    assert "torch" not in texts["cpu"] + texts["cuda"]


def test_a_folder_that_holds_something_is_left_alone(digits_artifact, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        write_docker_context(digits_artifact, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("given", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize(
    ("stopped_by", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), MachineError)]
)
def test_ctrl_c_and_a_full_disk_leave_nothing_and_the_next_run_writes_it_all(
    stopped_by: BaseException, raised: type[BaseException], given: bool, digits_artifact, tmp_path: Path, monkeypatch
) -> None:
    def stop(folder: Path) -> None:
        folder.mkdir()
        (folder / "half.whl").write_bytes(b"half")
        raise stopped_by

    out = tmp_path / "image"
    if given:
        out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("dlops.deploy.docker.context.write_wheel", stop)
        with pytest.raises(raised):
            write_docker_context(digits_artifact, out=out)
    assert [path.name for path in tmp_path.rglob("*")] == (["image"] if given else [])
    folder = out.stat().st_ino if given else None
    assert write_docker_context(digits_artifact, out=out) == out
    assert {path.name for path in out.iterdir()} == {
        ".dockerignore", "Dockerfile", "artifact", "requirements.txt", "wheels"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [out]
    assert folder in (None, out.stat().st_ino)
