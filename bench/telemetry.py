"""The machine while a run goes on: a process beside it samples, and what it saw becomes arrays over time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from dlops.bench.channel import Channel
from dlops.bench.stats import Integers

INTERVAL_S = 0.25
_ANSWER_S = 10.0
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What was sampled. times_ns: (n,), on the clock that all processes share; values: (n,) by name, -1 where not read.

    cpus: processors that the run may use. absent: what this machine does not tell, with the reason. cost: share of one
    processor that sampling took. services: for each watched URL "here", "elsewhere" or "hidden".
    """

    interval_s: float
    times_ns: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    values: Mapping[str, Integers] = field(default_factory=dict)
    cpus: int = 1
    ticks_a_second: int = 100
    gpus: Sequence[str] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    cost: float | None = None
    services: Mapping[str, str] = field(default_factory=dict)

    def grown(self, name: str, begin_ns: int, end_ns: int) -> float | None:
        """How much a counter grew in between, linearly between samples; None where it was not read all the time."""
        counter = self.values.get(name)
        if counter is None or (counter < 0).any() or len(counter) < 2:
            return None
        if begin_ns < self.times_ns[0] or end_ns > self.times_ns[-1]:
            return None
        first, last = np.interp([begin_ns, end_ns], self.times_ns, counter)
        return float(last - first)

    def within(self, name: str, begin_ns: int, end_ns: int) -> Integers:
        """The values read in between."""
        if name not in self.values:
            return np.empty(0, np.int64)
        values = self.values[name][(self.times_ns >= begin_ns) & (self.times_ns <= end_ns)]
        return values[values >= 0]


class Recorder:
    """Samples from `with` on until `end`. Where that is not possible the timeline says why; nothing is raised."""

    def __init__(self, *, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self._services: dict[str, str] = {}
        self._known: dict[str, Any] = {}
        self._failed: str | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> Recorder:
        if sys.platform != "linux":
            self._failed = f"read from Linux's /proc and /sys, and this is {sys.platform}"
            return self
        order = json.dumps({"pid": os.getpid(), "interval_s": self._interval_s})
        command = [sys.executable, "-P", "-m", "dlops.bench.observer", order]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
            )
        except OSError as error:
            self._failed = f"the process that samples did not start: {error}"
            return self
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._channel = Channel(self._child.stdout, self._child.stdin)
        self._known, _ = self._receive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait(_GRACE_S)
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was still to be written had nobody to read it
        self._stderr.close()

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    def watch(self, url: str, host: str, port: int) -> None:
        """What serves there is measured: its CPU time is no other load."""
        answer, _ = self._ask({"watch": {"host": host, "port": port}})
        if "where" in answer:
            self._services[url] = answer["where"]

    def end(self) -> Timeline:
        """Everything until now; ask once."""
        answer, payload = self._ask({"end": True})
        absent = dict(self._known.get("absent", {}))
        if self._failed is not None:
            return Timeline(interval_s=self._interval_s, absent={**absent, "telemetry": self._failed})
        samples: list[dict[str, int]] = json.loads(payload)
        names = dict.fromkeys(name for sample in samples for name in sample)
        arrays = {name: np.array([sample.get(name, -1) for sample in samples], np.int64) for name in names}
        times = arrays.pop("time_ns")
        return Timeline(
            interval_s=self._interval_s, times_ns=times, values=arrays, cpus=self._known["cpus"],
            ticks_a_second=self._known["ticks_a_second"], gpus=self._known["gpus"], absent=absent,
            cost=answer["cost"], services=self._services,
        )  # fmt: skip

    def _ask(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if self._failed is not None:
            return {}, b""
        assert self._channel is not None
        try:
            self._channel.send(order)
        except BrokenPipeError:
            return self._death()
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._channel is not None
        assert self._child is not None
        # A run must not wait for what only watches it.
        if not select.select([self._channel.reader], [], [], _ANSWER_S)[0]:
            self._child.kill()
            self._failed = f"the process that samples did not answer within {_ANSWER_S:g} s"
            return {}, b""
        message = self._channel.receive()
        return self._death() if message is None else message

    def _death(self) -> tuple[dict[str, Any], bytes]:
        self._stderr.seek(0)
        said = self._stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        self._failed = f"the process that samples ended{f': {said[-1][:300]}' if said else ''}"
        return {}, b""
