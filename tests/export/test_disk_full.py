"""A disk without room: a MachineError, and nothing left behind. A limit on the size of files stands in for it."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from dlops.artifact import Artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import MachineError
from dlops.export import quantize
from dlops.export.quantize_static import calibrate

_LIMITED = """
import importlib.util, resource, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("fixtures", sys.argv[1]); fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
from dlops.errors import MachineError
from dlops.export import to_onnx
from dlops.export.pipeline import export_variants
# It writes no file: once for all, under the narrowest limit.
whole, kept = to_onnx._to_fp32, []
to_onnx._to_fp32 = lambda request: (kept or kept.append(whole(request)) or kept)[0]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for attempt in sys.argv[4:]:
    limit, slug = attempt.split(":")
    # The soft limit alone, which can be raised again.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        export_variants(sys.argv[2], variants=[slug], out=sys.argv[3], model=fixtures.SmallNet)
    except MachineError as error:
        print(attempt, error.exit_status)
"""


def test_no_room_on_the_disk_is_said_and_leaves_nothing(
    checkpoint: Checkpoint, exported_dense: dict[str, Artifact], tmp_path: Path
) -> None:
    slugs = ["torchscript-fp32", "onnx-fp32", "onnx-fp16", "onnx-int8"]
    # int8 goes through files of the fp32 model, which is the larger.
    needed = {slug: exported_dense[slug.replace("int8", "fp32")].model_bytes for slug in slugs}
    attempts = [f"{limit}:{slug}" for limit in (5_000, 120_000) for slug in slugs if needed[slug] > limit]
    assert len(attempts) >= 7
    temporary, out = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    fixtures = Path(__file__).with_name("conftest.py")
    arguments = [str(fixtures), str(checkpoint.directory), str(out), *attempts]
    # -B: compiled modules would be cut short at the limit too, and stay so.
    done = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", "-c", _LIMITED, *arguments], capture_output=True, text=True, timeout=120,
        env={"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{attempt} 4" for attempt in attempts]
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
