"""Peak memory comes from a process of its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dlops.bench.memory import peak_memory_bytes
from dlops.errors import MachineError


def test_what_this_process_holds_is_not_charged_to_the_model(make_artifact) -> None:
    artifact = make_artifact()
    before = peak_memory_bytes(artifact, batch=1, threads=1)
    ballast = np.ones(400_000_000, np.uint8)
    after = peak_memory_bytes(artifact, batch=1, threads=1)
    assert ballast.all()
    assert abs(after - before) < 30_000_000


def test_a_larger_model_peaks_higher(make_artifact) -> None:
    small, large = make_artifact(hidden=8), make_artifact("onnx-fp16", hidden=500_000)
    assert large.model_bytes > 50_000_000
    difference = peak_memory_bytes(large, batch=1, threads=1) - peak_memory_bytes(small, batch=1, threads=1)
    assert difference > 50_000_000


def test_a_child_that_fails_says_why(make_artifact) -> None:
    artifact = make_artifact()
    artifact.path("model").write_bytes(b"x" * artifact.model_bytes)
    with pytest.raises(MachineError, match="SHA-256 differs"):
        peak_memory_bytes(artifact, batch=1)


def test_an_onnx_artifact_is_measured_without_torch(make_artifact, tmp_path) -> None:
    artifact = make_artifact()
    script = f"""
import sys
sys.modules["torch"] = None
import dlops
from dlops.bench.run import measure, save_report
from dlops.bench.table import table_text
report = save_report(measure([{str(artifact.directory)!r}], duration_s=0.2, threads=1), {str(tmp_path / "report")!r})
print(table_text(report))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "onnx-fp32" in done.stdout


def test_eager_without_torch_is_one_line_that_names_the_extra(make_artifact) -> None:
    script = """
import sys
sys.modules["torch"] = None
from dlops.bench.inprocess import _open_eager
from dlops.errors import MachineError
try:
    _open_eager(None, None, None)
except MachineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the eager baseline needs torch, which is not installed (pip install 'dlops[export]')\n"
