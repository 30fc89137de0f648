"""Exported files say what they are, the same at every export, and are read without any framework."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import onnxruntime
import pytest
import torch

from dlops.artifact import Artifact
from dlops.embedded import read_embedded
from dlops.inspect_file import describe_file

from .conftest import DENSE


@pytest.mark.parametrize("slug", DENSE)
def test_every_model_file_says_what_its_manifest_says(exported_dense: dict[str, Artifact], slug: str) -> None:
    artifact = exported_dense[slug]
    form, said = read_embedded(artifact.path("model"))
    assert form == artifact.variant.format
    assert (said.name, said.version, said.variant, said.task) == ("digits", "1", slug, "classification")
    assert (said.labels, said.preprocess) == (artifact.labels, artifact.preprocess)
    assert said.signature == artifact.signature
    assert said.checkpoint_sha256 == artifact.provenance.checkpoint_sha256
    assert said.dlops_version == artifact.provenance.dlops_version


def test_the_frameworks_read_it_too(exported_dense: dict[str, Artifact]) -> None:
    path = str(exported_dense["onnx-int8"].path("model"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["dlops.variant"] == "onnx-int8"
    extra = {"dlops.json": ""}
    with warnings.catch_warnings(action="ignore"):  # torch announces TorchScript's retirement
        torch.jit.load(str(exported_dense["torchscript-fp32"].path("model")), _extra_files=extra)
    assert json.loads(extra["dlops.json"])["variant"] == "torchscript-fp32"


_WITHOUT = """
import sys
for name in ("torch", "onnx", "onnxruntime"):
    sys.modules[name] = None
from dlops.cli import run
for path in sys.argv[1:]:
    assert run(["inspect", path, "--json"]) == 0
"""


def test_a_file_is_inspected_without_any_framework(exported_dense: dict[str, Artifact]) -> None:
    paths = [exported_dense[slug].path("model") for slug in ("onnx-fp16", "torchscript-fp32")]
    command = [sys.executable, "-c", _WITHOUT, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{describe_file(path).to_json()}\n" for path in paths)


class _Writes:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_torchscript_file_is_unpickled(exported_dense: dict[str, Artifact], tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "model.pt"
    with (
        zipfile.ZipFile(exported_dense["torchscript-fp32"].path("model")) as source,
        zipfile.ZipFile(path, "w") as made,
    ):
        for entry in source.infolist():
            harmful = entry.filename.endswith(".pkl")
            made.writestr(entry.filename, pickle.dumps(_Writes(trap)) if harmful else source.read(entry))
    assert read_embedded(path)[1].variant == "torchscript-fp32"
    assert not trap.exists()
    # What unpickling it would have called.
    act, arguments = _Writes(trap).__reduce__()
    act(*arguments)
    assert trap.exists(), "the trap itself must work, or the line above shows nothing"
