"""The most memory that a model needs, measured in a fresh process so that targets do not share it.

Run as `python -m dlops.bench.memory JSON` in the child.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from dlops.artifact import Artifact, open_artifact
from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.errors import DlopsError, MachineError
from dlops.runtimes.session import Device, Session, SessionOptions

_CALLS = 5
_TIMEOUT_S = 600


def peak_memory_bytes(
    target: Artifact | Checkpoint, *, batch: int, device: Device = "auto", threads: int | None = None
) -> int:
    """Peak resident set of a process that loads the target and runs it a few times at that batch.

    Interpreter, numpy and runtime are in it: what a process that serves the model has to have. Raises MachineError
    with the child's last line where it fails.
    """
    job = {
        "kind": target.kind, "directory": str(target.directory.resolve()), "batch": batch, "device": device,
        "threads": threads,
    }  # fmt: skip
    command = [sys.executable, "-m", "dlops.bench.memory", json.dumps(job)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise MachineError(f"{target.directory}: not loaded and run within {_TIMEOUT_S} s") from None
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise MachineError(f"{target.directory}: the process that measures memory failed: {last}")
    return int(json.loads(child.stdout)["peak_bytes"])


def _open(job: dict[str, Any]) -> Session:
    options = SessionOptions(device=job["device"], threads=job["threads"])
    if job["kind"] == "checkpoint":
        from dlops.runtimes.eager import open_eager

        checkpoint = load_checkpoint(job["directory"])
        return open_eager(checkpoint.build_module(), checkpoint.signature, options)
    from dlops.runtimes import open_session

    return open_session(open_artifact(job["directory"]), options)


def _peak_bytes() -> int:
    # ru_maxrss survives exec on Linux: a child of a large process starts at its parent's peak. VmHWM does not.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argument: str) -> None:
    from dlops.bench.payload import random_feed

    job = json.loads(argument)
    session = _open(job)
    feed = random_feed(session.signature, job["batch"])
    for _ in range(_CALLS):
        session.run(feed)
    session.close()
    print(json.dumps({"peak_bytes": _peak_bytes()}))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except DlopsError as failure:
        sys.exit(str(failure))
