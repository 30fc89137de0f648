"""The machine while a run goes on: a process beside it samples, and what it saw becomes arrays over time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from dlops.bench.child import Child
from dlops.bench.nvml import Gpu
from dlops.bench.stats import Integers
from dlops.errors import MachineError

INTERVAL_S = 0.25
_ANSWER_S = 10.0


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
    gpus: Sequence[Gpu] = ()
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
        self._child: Child | None = None

    def __enter__(self) -> Recorder:
        if sys.platform != "linux":
            self._failed = f"read from Linux's /proc and /sys, and this is {sys.platform}"
            return self
        order = json.dumps({"pid": os.getpid(), "interval_s": self._interval_s})
        try:
            self._child = Child("the process that samples", "dlops.bench.observer", order)
            self._known, _ = self._child.receive(_ANSWER_S)
        except OSError as error:
            self._failed = f"the process that samples did not start: {error}"
        except MachineError as error:
            self._failed = error.message
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child is not None:
            self._child.close()

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
            ticks_a_second=self._known["ticks_a_second"],
            gpus=[Gpu(**gpu) for gpu in self._known["gpus"]], absent=absent,
            cost=answer["cost"], services=self._services,
        )  # fmt: skip

    def _ask(self, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Nothing from the moment on that it failed: a run must not wait for what only watches it."""
        if self._failed is None:
            assert self._child is not None
            try:
                return self._child.ask(order, limit_s=_ANSWER_S)
            except MachineError as error:
                self._failed = error.message
        return {}, b""
