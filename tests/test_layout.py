"""What is built from the tree holds the tree: the stages' folders, which are links, and every file beside the code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("train", "export", "serve", "bench", "deploy")
_BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with its links: building leaves folders behind."""
    tree = tmp_path_factory.mktemp("layout") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist")
    tree.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("dlops", *STAGES):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    return tree


# What lies in dlops/ and may import stages, or nothing: the command line, what needs several stages, and the package's
# own door, which names stage code as text and imports it where a name is first used.
_NOT_CORE = {"__init__", "__main__", "workflows", *STAGES}


def package_files(tree: Path) -> set[str]:
    return {
        str(Path(folder, name).relative_to(tree))
        for folder, _, names in os.walk(tree / "dlops", followlinks=True)
        for name in names
    }


def build(tree: Path, kind: str) -> Path:
    into = tree.parent / kind
    into.mkdir()
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BUILD, kind, str(into)],
        cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    (made,) = into.iterdir()
    return made


def test_the_stages_are_linked_into_the_package() -> None:
    for stage in STAGES:
        assert (ROOT / "dlops" / stage).is_symlink()
        assert (ROOT / "dlops" / stage).resolve() == ROOT / stage


def test_the_wheel_holds_exactly_what_the_tree_holds(source: Path) -> None:
    expected = package_files(source)
    assert {f"dlops/{stage}/__init__.py" for stage in STAGES} < expected
    assert any(name.endswith(".yaml") for name in expected)
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        built = {name for name in wheel.namelist() if not name.partition("/")[0].endswith(".dist-info")}
        assert built == expected
        for name in expected:
            assert wheel.read(name) == (source / name).read_bytes(), name


def test_the_source_distribution_holds_the_package(source: Path) -> None:
    expected = package_files(source)
    with tarfile.open(build(source, "sdist")) as archive:
        built = {name.partition("/")[2] for name in archive.getnames()}
    assert expected - built == set()


def test_every_module_of_core_is_held_to_importing_core_alone() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [one for one in contracts if one["name"] == "Core imports only core"]
    here = {
        path.stem for path in (ROOT / "dlops").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    command_line = {name for name in here if name == "cli" or name.startswith("cli_")}
    assert len(command_line) > 4
    core = here - command_line - _NOT_CORE
    assert {name.removeprefix("dlops.") for name in contract["source_modules"]} == core
    assert {name.removeprefix("dlops.") for name in contract["forbidden_modules"]} == here - core - {"__init__"}
