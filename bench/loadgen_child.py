"""A LoadGen test in a child process, from both ends: it can be told to end, and what it had measured is not lost."""

from __future__ import annotations

import os
import select
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dlops.bench.channel import Channel, telling
from dlops.bench.child import Child
from dlops.bench.loadgen import Driven, Said, Settings, Target, log_folder, read_test, run_test
from dlops.errors import MachineError

# LoadGen's own thread writes what is logged every 10 ms.
_WRITTEN_S = 0.2


def drive_for(channel: Channel, target: Target, settings: Settings) -> None:
    """Run the test on the target, which is closed, and send what was measured, in the child.

    Whatever comes on the channel meanwhile ends the test: what is measured until then is sent, and so ends the process,
    as Python cannot end a test of LoadGen's. Raises what a call of the target raised.
    """
    with log_folder() as folder:
        over, tell_over = os.pipe()
        watcher = threading.Thread(target=_watch, args=(channel, over, target, settings, folder))
        watcher.start()
        try:
            run_test(target, settings, folder)
        finally:
            os.close(tell_over)
            watcher.join()
            os.close(over)
        driven = read_test(target, settings, folder)
    _send(channel, driven)


def await_driven(child: Child, order: dict[str, Any], body: bytes = b"") -> tuple[Driven, bool]:
    """Have the child run a test, and return what it measured and whether Ctrl-C ended it.

    Raises what the child raised, and KeyboardInterrupt where nothing was measured before it.
    """
    child.tell(order, body)
    header, arrays, interrupted = child.receive_or_stop()
    if header["said"] is None:
        raise KeyboardInterrupt
    starts, lag, latencies, service, succeeded = np.frombuffer(arrays, np.int64).reshape(5, -1)
    driven = Driven(
        starts_ns=starts, lag_ns=lag, latencies_ns=latencies, service_ns=service, succeeded=succeeded,
        said=Said.model_validate(header["said"]),
    )  # fmt: skip
    return driven, interrupted


def _watch(channel: Channel, over: int, target: Target, settings: Settings, folder: Path) -> None:
    """Until the test is over: end this process when the run says so, or is gone."""
    if over in select.select([channel.reader.fileno(), over], [], [])[0]:
        return
    try:
        with telling(channel, "LoadGen's test, interrupted"):
            target.halt()
            time.sleep(_WRITTEN_S)
            driven = _measured(target, settings, folder)
            # Before the answer, after which this process is ended.
            shutil.rmtree(folder, ignore_errors=True)
            _send(channel, driven)
    finally:
        os._exit(0)


def _measured(target: Target, settings: Settings, folder: Path) -> Driven | None:
    if target.failure is not None:
        return None  # after a call that failed none is made, and LoadGen's times are of nothing
    try:
        return read_test(target, settings, folder, cut_short=True)
    except MachineError:
        return None  # there was no answer yet


def _send(channel: Channel, driven: Driven | None) -> None:
    if driven is None:
        channel.send({"said": None})
    else:
        channel.send({"said": driven.said.model_dump(mode="json")}, driven.arrays().tobytes())
