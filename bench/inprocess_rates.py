"""A target of this machine under a rate of requests: a queue in front of its session, and its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlops.artifact import Artifact
from dlops.bench.analysis import analyse_rate, shortcomings
from dlops.bench.arrivals import Integers, Schedule
from dlops.bench.inprocess import Conditions, Started, placed_fields
from dlops.bench.load import TIMEOUT_S
from dlops.bench.processes import Process
from dlops.bench.scenarios import load_of
from dlops.errors import MachineError
from dlops.report import EARLIER, SERVICE, STARTS, Measurement
from dlops.timing import WarmUp

# A backlog is worked off until this many times the run has passed.
_GIVE_UP = 2.0
_NOT_RUN = "not run: the backlog took longer than the run itself"


def process_of(one: Started) -> Process:
    """The process that a target runs in, which `inprocess.check` has seen to."""
    assert isinstance(one.arm, Process)
    return one.arm


def measure_queue(
    one: Started, schedule: Schedule, *, warmth: WarmUp, conditions: Conditions, artifacts: Sequence[Artifact], key: str
) -> tuple[Measurement, dict[str, Integers], bool]:
    """One row, its samples by name, and whether Ctrl-C ended it.

    Response time is from when a request was due to the end of its call, service time the call's own; lag is how much
    later than it could a call began. Raises KeyboardInterrupt where Ctrl-C came before there was anything to keep, and
    MachineError where no call was done in time.
    """
    due_ns, lead_in_ns = schedule.due_ns, schedule.lead_in_ns
    kept = process_of(one).keep_schedule(due_ns, give_up_ns=round(_GIVE_UP * schedule.end_ns))
    ran = kept.begun_ns >= 0
    # What Ctrl-C kept from being run has not failed.
    ours = (due_ns >= lead_in_ns) & (due_ns < schedule.end_ns) & (ran | (not kept.interrupted))
    if not (ours & ran).any():
        if kept.interrupted:
            raise KeyboardInterrupt
        raise MachineError(
            f"{one.target}: no call was done in time at {schedule.rate:g} a second", hint="a lower --rate"
        )
    service = np.where(ran, kept.ended_ns - kept.begun_ns, -1)[ours]
    response = (kept.ended_ns - due_ns)[ours]
    worst = max(round(TIMEOUT_S * 1e9), int(response[service >= 0].max()))
    response = np.where(service >= 0, response, worst)
    due = due_ns[ours] - lead_in_ns
    earlier = kept.ended_ns[ran & (due_ns < lead_in_ns)] - lead_in_ns
    earlier = earlier[earlier >= 0]
    lag_p99_ns = float(np.quantile(kept.lag_ns(due_ns), 0.99, method="higher"))
    lost = int((service < 0).sum())
    errors = {_NOT_RUN: lost} if lost else {}
    duration_ns = schedule.end_ns - lead_in_ns
    if kept.interrupted:
        duration_ns = min(duration_ns, int(due[-1]) + 1)
    figures = analyse_rate(
        response, due, service, earlier, duration_ns=duration_ns, lag_p99_ns=lag_p99_ns, batch=conditions.batch,
        observed=shortcomings(
            warmed_up=warmth.settled, warmup_calls=warmth.calls, interrupted=kept.interrupted, errors=errors,
            calls=len(service),
        ),
    )  # fmt: skip
    row = Measurement(
        load=load_of(conditions.scenario, batch=conditions.batch, **schedule.as_load),
        samples=key,
        duration_ns=duration_ns,
        lag_p99_ns=lag_p99_ns,
        errors=errors,
        warmup_calls=warmth.calls + int((ran & (due_ns < lead_in_ns)).sum()),
        **figures.as_fields(),
        **placed_fields(one, conditions, artifacts),
    )
    return row, {key: response, key + STARTS: due, key + SERVICE: service, key + EARLIER: earlier}, kept.interrupted
