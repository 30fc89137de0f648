"""Where a request's time goes inside the server, by what the server counts of itself: Triton's statistics extension.

The counts are sums since the server started, so a row takes the difference of two snapshots. They hold every client's
requests: what is more than was sent from here is said.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dlops.report import ServerTime

STATISTICS_TIMEOUT_S = 2.0
# A server may count a request a little after it has answered it.
_SETTLING_S, _SETTLING_STEP_S = 0.5, 0.05
# Of the requests answered here, the share that its counts may lack and still be taken for those of the whole server.
_MISSING = 0.01


class NoStatisticsError(Exception):
    """The server gives no statistics; the message says what it did instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sums over a model's versions. requests: answered; items: rows of those that were run; executions: of the model.

    *_ns: summed over requests. cache_ns: looking up and storing answers.
    """

    requests: int
    failures: int
    items: int
    executions: int
    cached: int
    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
    cache_ns: int

    @classmethod
    def of(cls, models: Sequence[Mapping[str, Any]]) -> Counts:
        """models: `model_stats`, an entry a version. Raises KeyError, TypeError or ValueError where it is none."""
        if not models:
            raise ValueError("model_stats is empty")

        def total(part: str, what: str = "ns") -> int:
            return sum(int(one["inference_stats"].get(part, {}).get(what, 0)) for one in models)

        # These make a waterfall; without them there is nothing to tell.
        for part in ("success", "queue", "compute_infer"):
            if any(part not in one["inference_stats"] for one in models):
                raise ValueError(f"inference_stats has no {part}")
        return cls(
            requests=total("success", "count"),
            failures=total("fail", "count"),
            items=sum(int(one["inference_count"]) for one in models),
            executions=sum(int(one["execution_count"]) for one in models),
            cached=total("cache_hit", "count"),
            queue_ns=total("queue"),
            compute_input_ns=total("compute_input"),
            compute_infer_ns=total("compute_infer"),
            compute_output_ns=total("compute_output"),
            cache_ns=total("cache_hit") + total("cache_miss"),
        )

    def since(self, earlier: Counts) -> Counts:
        return Counts(**{one.name: getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)})

    @property
    def went_down(self) -> bool:
        return any(getattr(self, one.name) < 0 for one in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent from here between the first and the last snapshot.

    attempts: all calls; answered: those that succeeded; in_flight: at most so many at once. client_ns: what the calls
    that the server's means are compared with took here, on average.
    """

    attempts: int
    answered: int
    in_flight: int
    client_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounted:
    """against: what makes the row one not to be quoted; remarks: what else is to be said."""

    server: ServerTime | None = None
    against: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


class Watch:
    """Takes the snapshots of a row: `before` it, perhaps once more at the `start` of what is kept, and at its end."""

    def __init__(self, statistics: Callable[[], Counts] | None) -> None:
        """statistics: None for a server that is known to have none; then nothing is taken and nothing said."""
        self._statistics = statistics
        self._before: Counts | None = None
        self._start: Counts | None = None
        self._failed: str | None = None

    def before(self) -> None:
        self._before = self._start = self._take()

    def start(self) -> None:
        """May be called under load: the calls in flight then fall on one side or the other, in the means alone."""
        self._start = self._take()

    def end(self, sent: Sent) -> Accounted:
        """What the server counted of the row. Call it when nothing is in flight any more."""
        if self._statistics is None:
            return Accounted()
        after = self._take()
        deadline = time.monotonic() + _SETTLING_S
        while after and self._before and after.since(self._before).requests < sent.answered:
            if time.monotonic() > deadline:
                break
            time.sleep(_SETTLING_STEP_S)
            after = self._take()
        if self._before is None or self._start is None or after is None:
            return Accounted(remarks=(f"no server times: {self._failed}",))
        return account(after.since(self._before), after.since(self._start), sent)

    def _take(self) -> Counts | None:
        if self._statistics is None:
            return None
        try:
            return self._statistics()
        except NoStatisticsError as error:
            self._failed = str(error)
            return None


def account(whole: Counts, kept: Counts, sent: Sent) -> Accounted:
    """whole: what the server counted while `sent` was sent; kept: the part of it that the row is made of."""
    if whole.went_down or kept.went_down:
        why = "its counts went down, as after a restart or where several processes count apart"
        return Accounted(remarks=(f"no server times: {why}",))
    if whole.requests < sent.answered * (1 - _MISSING) - sent.in_flight:
        why = f"it counted {whole.requests:,} of {sent.answered:,} requests, as where several processes count apart"
        return Accounted(remarks=(f"no server times: {why}",))
    if not kept.requests:
        return Accounted(remarks=("no server times: it counted no request within the run",))
    counted = whole.requests + whole.failures
    against = []
    # What was asked just before the first snapshot may be counted after it.
    if counted > sent.attempts + sent.in_flight:
        against.append(f"other clients used the server: it counted {counted:,} requests, {sent.attempts:,} were ours")
    if kept.cached:
        against.append(f"the server answered {kept.cached:,} of {kept.requests:,} requests from a cache")
    server = ServerTime(
        requests=kept.requests,
        items=kept.items,
        executions=kept.executions,
        queue_ns=kept.queue_ns / kept.requests,
        compute_input_ns=kept.compute_input_ns / kept.requests,
        compute_infer_ns=kept.compute_infer_ns / kept.requests,
        compute_output_ns=kept.compute_output_ns / kept.requests,
        cache_ns=kept.cache_ns / kept.requests,
        client_ns=sent.client_ns,
    )
    return Accounted(server=server, against=tuple(against))
