from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dlops
from dlops.deploy.wheel import write_wheel

PACKAGE = Path(dlops.__file__).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheel"))


def source_files() -> set[str]:
    found = set()
    for directory, _, names in os.walk(PACKAGE, followlinks=True):
        if "__pycache__" not in directory:
            found |= {(Path(directory) / name).relative_to(PACKAGE).as_posix() for name in names}
    return {f"dlops/{name}" for name in found if not name.endswith((".pyc", ".md", ".swp"))}


def test_it_holds_every_source_file_of_every_stage(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("dlops/")}
    assert inside == source_files()
    for name in (
        "serve/service.py", "train/recipes/cnn.py", "deploy/docker/Dockerfile.cuda", "deploy/libtorch/main.cpp",
        "bench/report.css",
    ):  # fmt: skip
        assert f"dlops/{name}" in inside


def test_its_record_has_every_file_with_its_digest(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (record_name,) = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        lines = dict(line.split(",", 1) for line in archive.read(record_name).decode().splitlines())
        assert set(lines) == set(archive.namelist())
        for name in set(lines) - {record_name}:
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert lines[name] == f"sha256={digest},{len(content)}"


def test_it_is_the_same_file_every_time(wheel: Path, tmp_path: Path) -> None:
    assert write_wheel(tmp_path).read_bytes() == wheel.read_bytes()


def test_the_code_in_it_runs_and_knows_its_version(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = "import dlops, dlops.serve.queue, dlops.deploy.docker; print(dlops.__file__, dlops.__version__)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    where, version = ended.stdout.split()
    assert Path(where).parent == tmp_path / "dlops"
    assert version == dlops.__version__
