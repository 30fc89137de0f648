"""A disk without room: a MachineError, and nothing left behind. A limit on the size of files stands in for it."""

from __future__ import annotations

import contextlib
import errno
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import MachineError
from dlops.export import quantize
from dlops.export.pipeline import export_variants
from dlops.export.quantize_static import calibrate

from .conftest import SmallNet


@contextlib.contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Python ignores SIGXFSZ: what writes more is told that the file is too large."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The soft limit alone, which can be raised again.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_on_the_disk_is_said_and_leaves_nothing(
    checkpoint: Checkpoint, exported_dense: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slugs = ["torchscript-fp32", "onnx-fp32", "onnx-fp16", "onnx-int8"]
    # int8 goes through files of the fp32 model, which is the larger.
    needed = {slug: exported_dense[slug.replace("int8", "fp32")].model_bytes for slug in slugs}
    attempts = [(limit, slug) for limit in (5_000, 120_000) for slug in slugs if needed[slug] > limit]
    assert len(attempts) >= 7
    temporary, out = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # Compiled modules would be cut short at the limit too, and stay so.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for limit, slug in attempts:
        with largest_file(limit), pytest.raises(MachineError) as caught:
            export_variants(checkpoint, variants=[slug], out=out, model=SmallNet)
        assert caught.value.exit_status == 4, (limit, slug)
    assert not list(out.glob("**/*.*"))
    assert not list(temporary.glob("dlops-*"))


def test_a_file_that_the_quantizer_cut_short_is_a_full_disk_where_there_is_no_room(
    exported_dense: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(exported_dense["onnx-fp32"].path("model"))

    def cut(source: Path, prepared: Path, **_: object) -> None:
        # As ORT's writer does: half a file, and no word.
        prepared.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        monkeypatch.setattr(Path, "write_bytes", full)

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quantize, "quant_pre_process", cut)
    feed = exported_dense["onnx-fp32"].samples().inputs
    with pytest.raises(MachineError, match="the disk is full"):
        calibrate(model, feed, method="minmax", title="it")
