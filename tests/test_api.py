"""The Python API resolves by name, and neither importing it nor asking for help loads anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dlops

HEAVY = ("torch", "bentoml", "onnxruntime", "onnx", "lightning_fabric", "matplotlib", "torchvision", "sklearn")


@pytest.mark.parametrize("name", dlops.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(dlops, name) is not None
    assert name in dir(dlops)


def test_the_names_are_listed_once_and_each_has_a_home() -> None:
    assert sorted(set(dlops.__all__)) == sorted(dlops.__all__) == sorted(dlops._HOMES)


def test_a_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        dlops.exprot  # noqa: B018 - reading it is the test


def test_no_public_name_hides_a_stage() -> None:
    assert not {"train", "export", "serve", "bench", "deploy"} & set(dlops.__all__)


@pytest.mark.parametrize(
    "code",
    [
        "import dlops, dlops.catalog, dlops.checkpoint, dlops.artifact, dlops.report, dlops.doctor, dlops.inspect",
        "from dlops.cli import run; assert run(['--help']) == 0",
        "from dlops.cli import run; assert run(['export', '--help']) == 0",
        "from dlops.cli import run; assert run(['--version']) == 0",
    ],
)
def test_neither_the_import_nor_the_help_loads_anything_heavy(code: str) -> None:
    script = f"{code}\nimport sys\nprint('loaded:', *(name for name in {HEAVY!r} if name in sys.modules))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1].strip() == "loaded:"
