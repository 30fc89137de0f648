"""The process that samples the machine while a run goes on: what is read, how often, and what it costs.

Run as `python -m dlops.bench.observer ORDER`; `bench.telemetry` starts it. It imports neither numpy nor a runtime, and
exits when its standard input closes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlops.bench.channel import Channel
from dlops.bench.cputime import Trees, is_here, listeners, machine_ticks, ticks_a_second, usable_cpus
from dlops.bench.nvml import find_gpus
from dlops.bench.sensors import Reading, Sensors, find_sensors

_NICEST = 19
_AUTOGROUP = Path("/proc/self/autogroup")


class Observer:
    """Everything that this machine offers, one `sample` at a time."""

    def __init__(self, pid: int) -> None:
        """pid: of the run, whose processes are no other load."""
        self._cpus = usable_cpus()
        self._sensors: Sensors = find_sensors(self._cpus)
        self.gpus = find_gpus(self._sensors)
        self._trees: Trees | None = None
        try:
            machine_ticks(self._cpus)
            self._trees = Trees([pid])
        except (OSError, ValueError) as error:
            self._sensors.absent["other load"] = str(error)

    @property
    def absent(self) -> dict[str, str]:
        return self._sensors.absent

    def sample(self) -> Reading:
        """Values by name, with `time_ns` on the clock that all processes share; counters count up from any number."""
        began = time.perf_counter_ns()
        values = {"time_ns": began}
        if self._trees is not None:
            ticks = machine_ticks(self._cpus)
            values |= {"busy_ticks": ticks.busy, "steal_ticks": ticks.steal, "ours_ticks": self._trees.used()}
        return values | self._sensors.read()

    def watch(self, host: str, port: int) -> str:
        """Count what serves that port as ours from now on: "here", "elsewhere", or "hidden" where it cannot be seen."""
        if not is_here(host):
            return "elsewhere"
        holders = listeners(port)
        if not holders:
            return "hidden"
        if self._trees is not None:
            self._trees.add(holders)
        return "here"

    def describe(self) -> dict[str, Any]:
        gpus = [asdict(gpu) for gpu in self.gpus]
        return {"cpus": len(self._cpus), "ticks_a_second": ticks_a_second(), "gpus": gpus, "absent": self.absent}


def _stand_back() -> None:
    """Take processors only when nobody else wants them: a sample that pushes a call aside is in that call's latency."""
    if sys.platform != "linux":
        os.nice(_NICEST)
        return
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # The kernel may share processors out among sessions first: this one's class counts only within its own session.
    with contextlib.suppress(OSError):  # no such grouping here, or /proc is read-only
        _AUTOGROUP.write_text(str(_NICEST))


def main(argument: str) -> None:
    # Ctrl-C is for the run, which then asks for what there is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Where it is, should it not answer: then the run ends it with this signal.
    faulthandler.register(signal.SIGUSR1, chain=True)
    order = json.loads(argument)
    channel = Channel.of_child()
    observer = Observer(order["pid"])
    # Before the run begins nothing is timed, and what stands back on a busy machine may take long to be ready.
    channel.send(observer.describe())
    _stand_back()
    interval_ns = round(order["interval_s"] * 1e9)
    began, used = time.perf_counter_ns(), time.process_time_ns()
    samples = [observer.sample()]
    due = began + interval_ns
    while True:
        wait_s = max(0.0, (due - time.perf_counter_ns()) / 1e9)
        if not select.select([sys.stdin], [], [], wait_s)[0]:
            samples.append(observer.sample())
            # A sample that comes late moves those after it: catching up would crowd them.
            due = max(due + interval_ns, time.perf_counter_ns())
            continue
        message = channel.receive()
        if message is None:
            return
        if "watch" in message[0]:
            channel.send({"where": observer.watch(**message[0]["watch"])})
            continue
        # A row's end lies between two samples.
        samples.append(observer.sample())
        cost = (time.process_time_ns() - used) / max(1, time.perf_counter_ns() - began)
        channel.send({"cost": cost}, json.dumps(samples).encode())
        if "end" in message[0]:
            return


if __name__ == "__main__":
    main(sys.argv[1])
