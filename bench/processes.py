"""Targets in processes of their own, from the run's side: start one, hear that it is ready, give it turns, end it."""

from __future__ import annotations

import time

import numpy as np

from dlops.bench.child import Child
from dlops.bench.fifo import Integers, Kept
from dlops.bench.turns import read_turn
from dlops.bench.worker import Job, Ready
from dlops.timing import Turn, WarmUp


class Process(Child):
    """An arm (see dlops.timing) whose calls are made in a fresh process."""

    def __init__(self, job: Job) -> None:
        job = job.model_copy(update={"spawned_ns": time.perf_counter_ns()})
        super().__init__(f"{job.target}: the process that ran it", "dlops.bench.worker", job.model_dump_json())

    def ready(self) -> Ready:
        """Wait until the target has answered its first calls. Raises what opening or calling it raised."""
        header, _ = self.receive()
        return Ready.model_validate(header["ready"])

    def warm_up(self, limit_s: float) -> WarmUp:
        header, _ = self.ask({"warm_up": limit_s})
        return WarmUp(calls=header["calls"], settled=header["settled"])

    def take_turn(self, turn_s: float) -> Turn:
        return read_turn(self.ask({"turn": turn_s}))

    def keep_schedule(self, due_ns: Integers, *, give_up_ns: int) -> Kept:
        """Run a request at each of these times from the schedule's start, queued while another runs.

        On Ctrl-C what was done until then is given, marked so.
        """
        self.tell({"schedule": {"give_up_ns": give_up_ns}}, due_ns.tobytes())
        header, payload, interrupted = self.receive_or_stop()
        begun, ended = np.frombuffer(payload, np.int64).reshape(2, -1)
        return Kept(begun_ns=begun, ended_ns=ended, interrupted=interrupted or header["interrupted"])
