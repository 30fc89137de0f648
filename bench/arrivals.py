"""When requests are due: absolute schedules, in nanoseconds from a run's start, made before it begins.

A schedule does not wait for answers. That is what keeps a stall visible: requests that come due while a server stands
still are late by their own clocks, and are counted so.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dlops.bench.stats import CERTIFIES_P99
from dlops.errors import UsageError, from_os_error
from dlops.report import Arrivals as LoadArrivals
from dlops.report import Objective

Integers = NDArray[np.int64]
Arrivals = Literal["poisson", "constant"]

# Requests that come due in this first part of a schedule open connections and fill caches: they are not kept.
_LEAD_IN_S = 0.5
# Enough to certify p99 where all calls are independent; a slow rate is kept up longer for it, but not without end.
WANTED_SAMPLES = CERTIFIES_P99
STRETCH = 3.0
# A trace of more lines than this is a mistake: an hour at 3,000 requests a second.
_MAX_TRACE = 10_000_000
# Of a busy or an idle stretch.
_LONGEST_PAUSE_S = 86_400
_LONGEST_S = 7 * 24 * 3600.0


def poisson(rate: float, *, duration_s: float, seed: int = 0) -> Integers:
    """Independent users: exponential gaps with the mean 1/rate seconds. (n,), ascending, all within the duration."""
    random = np.random.default_rng(seed)
    # Enough gaps in all but one run of a million; the rest is drawn where they are not.
    count = math.ceil(rate * duration_s + 5 * math.sqrt(rate * duration_s) + 10)
    due_s = np.cumsum(random.exponential(1 / rate, count))
    while due_s[-1] < duration_s:
        due_s = np.concatenate([due_s, due_s[-1] + np.cumsum(random.exponential(1 / rate, count))])
    return np.asarray(due_s[due_s < duration_s] * 1e9, np.int64)


def constant(rate: float, *, duration_s: float, seed: int = 0) -> Integers:
    """Equal gaps of 1/rate seconds, the first request at once. seed: without meaning here."""
    return np.asarray(np.arange(max(1, math.floor(rate * duration_s))) / rate * 1e9, np.int64)


SCHEDULES: dict[Arrivals, Callable[..., Integers]] = {"poisson": poisson, "constant": constant}
assert tuple(SCHEDULES) == get_args(Arrivals)


def with_pauses(due_ns: Integers, *, busy_s: float, idle_s: float) -> Integers:
    """The same schedule with `idle_s` seconds of nothing after every `busy_s` seconds of it: (n,)."""
    pauses = due_ns // round(busy_s * 1e9)
    return due_ns + pauses * round(idle_s * 1e9)


def _busy_s(lasts_s: float, busy_s: float, idle_s: float) -> float:
    """How much of so many seconds is not idle."""
    cycles, rest = divmod(lasts_s, busy_s + idle_s)
    return cycles * busy_s + min(rest, busy_s)


def read_trace(path: Path | str) -> Integers:
    """A recorded schedule: one number a line, seconds from the start, ascending; `#` begins a comment. (n,).

    Raises UsageError naming the line that is wrong.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError):
            raise from_os_error(error, doing=f"reading {path}") from error
        raise UsageError(f"{path}: not a text file", hint="one time in seconds a line") from None
    due: list[float] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise UsageError(f"{path}, line {number}: {text[:40]!r} is no time in seconds", hint="such as 0.125")
        if seconds > _LONGEST_S:
            raise UsageError(
                f"{path}, line {number}: {text[:40]} is over a week after the start",
                hint="times count from the start of the trace: take the first one off",
            )
        if due and seconds < due[-1]:
            raise UsageError(f"{path}, line {number}: {text} comes after {due[-1]:g}", hint="sort the trace by time")
        if len(due) == _MAX_TRACE:
            raise UsageError(f"{path}: more than {_MAX_TRACE:,} requests")
        due.append(seconds)
    if not due:
        raise UsageError(f"{path}: no times in it", hint="one time in seconds a line")
    return np.asarray(np.array(due) * 1e9, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One schedule to keep. rate: requests a second. due_ns: (n,), the lead-in included, which is not measured.

    arrivals, pauses, attempt: what made it, as a row's load says it.
    """

    rate: float
    due_ns: Integers
    lead_in_ns: int
    end_ns: int
    arrivals: LoadArrivals = "poisson"
    pauses: tuple[float, float] | None = None
    attempt: int = 1

    @property
    def as_load(self) -> dict[str, Any]:
        """The fields of `Load` that name it."""
        digest = hashlib.sha256(self.due_ns.tobytes()).hexdigest()[:16] if self.arrivals == "trace" else None
        return {
            "rate": self.rate, "arrivals": self.arrivals, "pauses_s": self.pauses, "trace": digest,
            "attempt": self.attempt,
        }  # fmt: skip

    @property
    def duration_s(self) -> float:
        """What is measured of it."""
        return (self.end_ns - self.lead_in_ns) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What is offered to a service whether or not it keeps up: each of the rates in turn, then the trace.

    rates: requests a second. pauses: (busy, idle) seconds: after each busy stretch nothing is due for an idle one.
    trace: (n,), due times in nanoseconds. senders: processes; None takes as many as the rate needs. objective: then the
    highest rate that keeps it is looked for, after the rates named. Raises UsageError for a rate or pause that is not
    above zero, or where there is nothing to offer.
    """

    rates: tuple[float, ...] = ()
    arrivals: Arrivals = "poisson"
    pauses: tuple[float, float] | None = None
    trace: Integers | None = None
    senders: int | None = None
    objective: Objective | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [f"{rate:g}" for rate in self.rates if not 0 < rate < math.inf]
        if wrong:
            raise UsageError(f"a rate of {', '.join(wrong)} requests a second", hint="name a number above 0")
        if self.pauses is not None and not all(0 < seconds <= _LONGEST_PAUSE_S for seconds in self.pauses):
            raise UsageError(
                f"pauses of {self.pauses[1]:g} s after {self.pauses[0]:g} s",
                hint=f"both must be above 0, and at most a day ({_LONGEST_PAUSE_S} s)",
            )
        if not self.rates and self.trace is None and self.objective is None:
            raise UsageError("nothing to offer", hint="name a rate, a trace or an objective")

    def replayed(self) -> Schedule:
        """The trace, all of which is measured. Raises ValueError where there is none."""
        if self.trace is None:
            raise ValueError("no trace")
        last = int(self.trace[-1])
        # Until the next request would be due: what is answered just after the last one is due counts too. Where all are
        # due at once, for a second.
        end_ns = last + (last // (len(self.trace) - 1) if last and len(self.trace) > 1 else 1_000_000_000)
        mean = len(self.trace) / (end_ns / 1e9)
        return Schedule(rate=mean, due_ns=self.trace, lead_in_ns=0, end_ns=end_ns, arrivals="trace")

    def at(
        self, rate: float, duration_s: float, *, wanted: int = WANTED_SAMPLES, stretch: float = STRETCH, again: int = 0
    ) -> Schedule:
        """One rate for `duration_s` after its lead-in, up to `stretch` times that where it gives no `wanted` requests.

        Pauses are within those seconds, and `rate` is that of the busy ones. again: how often that rate was tried
        before; another look is at other arrivals.

        Raises UsageError where it is so low that nothing would be due.
        """
        share = 1.0 if self.pauses is None else self.pauses[0] / sum(self.pauses)
        lasts_s = _LEAD_IN_S + min(max(duration_s, wanted / (rate * share)), stretch * duration_s)
        if rate * lasts_s > _MAX_TRACE:
            raise UsageError(
                f"{rate:g} requests a second for {lasts_s:.3g} s are more than {_MAX_TRACE:,}",
                hint="a lower --rate, or a shorter --duration",
            )
        busy_s = lasts_s if self.pauses is None else _busy_s(lasts_s, *self.pauses)
        due_ns = SCHEDULES[self.arrivals](rate, duration_s=busy_s, seed=self.seed + again)
        if self.pauses is not None:
            due_ns = with_pauses(due_ns, busy_s=self.pauses[0], idle_s=self.pauses[1])
        if not len(due_ns):
            raise UsageError(
                f"at {rate:g} requests a second none is due within {lasts_s:g} s", hint="raise --rate or --duration"
            )
        return Schedule(
            rate=rate, due_ns=due_ns, lead_in_ns=round(_LEAD_IN_S * 1e9), end_ns=round(lasts_s * 1e9),
            arrivals=self.arrivals, pauses=self.pauses,
        )  # fmt: skip
