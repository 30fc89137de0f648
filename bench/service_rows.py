"""The rows of services: with calls in flight, at rates, by a search for the highest, or under LoadGen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from dlops.artifact import Artifact
from dlops.bench import cells
from dlops.bench.analysis import listed
from dlops.bench.arrivals import STRETCH, Offered, Schedule
from dlops.bench.disturbed import Seen, seen_under_load
from dlops.bench.loadgen_rows import measure_url, note
from dlops.bench.network import Payload, measure_endpoint, prepare
from dlops.bench.oip import Endpoint
from dlops.bench.pacing import is_gone
from dlops.bench.rates import Warm, measure_rate, warm_up
from dlops.bench.rows import Rows
from dlops.bench.scenarios import Step
from dlops.bench.slo import INTERRUPTED, Found, Outcome, found_among, judge, samples_for, search
from dlops.console import say
from dlops.errors import MachineError
from dlops.report import STARTS, Engine, Measurement, Objective

# A low rate may be offered this many times as long as asked, when the question is whether it keeps an objective.
_SEARCH_STRETCH = 10.0
# A rate that could not be judged gets so many times the requests: in a queue neighbours are late together, and 662 of
# them may be worth fewer than the 368 that it takes where none is late.
_AGAIN = 5


def load_service(rows: Rows, endpoint: Endpoint, artifact: Artifact | None, step: Step, *, engine: Engine) -> None:
    """Add the rows of one URL at one step. One that fails half-way is noted, and the others are kept.

    Raises UsageError for what the service does not take where nothing is measured yet, KeyboardInterrupt on Ctrl-C.
    """
    with rows.keeping_what_there_is(even_of_none=True):
        sent = prepare(endpoint, artifact, batch=step.batch)
        for one in sent.notes:
            rows.note(one)
        if engine == "loadgen":
            _drive(rows, endpoint, sent, step)
            return
        for calls in step.concurrency:
            _keep_in_flight(rows, endpoint, sent, step, concurrency=calls)
        if step.offered is not None:
            _Offering(rows, endpoint, sent, step, step.offered).all_of_it()


def _keep_in_flight(rows: Rows, endpoint: Endpoint, sent: Payload, step: Step, *, concurrency: int) -> None:
    def make(seconds: float, again: int) -> bool:
        say(f"loading {endpoint.url}: batch {step.batch}, {concurrency} in flight, {seconds:.3g} s after the warm-up")
        row, samples, loaded = measure_endpoint(
            endpoint, sent, batch=step.batch, concurrency=concurrency, duration_s=seconds, key=rows.next_key,
            scenario=step.scenario,
        )  # fmt: skip
        rows.add(row, samples, seen_under_load(row, began_ns=loaded.began_ns, service=endpoint.url))
        if loaded.interrupted:
            raise KeyboardInterrupt
        return not loaded.stopped

    rows.add_piloted(make)


def _drive(rows: Rows, endpoint: Endpoint, sent: Payload, step: Step) -> None:
    assert step.scenario is not None
    warm = warm_up(endpoint, sent)
    for rate in step.rates:
        for calls in step.concurrency or (1,):
            say(f"LoadGen on {endpoint.url}: {step.scenario}, {rows.lasting.first_s:g} s or more")
            began_ns = time.perf_counter_ns()
            (row, samples), said, interrupted = measure_url(
                endpoint, sent, step.scenario, batch=step.batch, concurrency=calls, rate=rate,
                duration_s=rows.lasting.first_s, warm=warm, key=rows.next_key,
            )  # fmt: skip
            items = (row.latency.samples - row.error_count) * step.batch
            seen = Seen(begin_ns=began_ns, end_ns=time.perf_counter_ns(), items=items, service=endpoint.url)
            rows.add(row, samples, seen)
            rows.note(note(said.version))
            if interrupted:
                raise KeyboardInterrupt


class _Offering:
    """What is offered to one service at one step, whether or not it keeps up."""

    def __init__(self, rows: Rows, endpoint: Endpoint, sent: Payload, step: Step, offered: Offered) -> None:
        self._rows, self._endpoint, self._sent, self._step, self._offered = rows, endpoint, sent, step, offered
        self._warm: Warm = warm_up(endpoint, sent)

    def all_of_it(self) -> None:
        """Each rate, then the trace, then the search."""
        for rate in sorted(set(self._offered.rates)):
            self._rate(rate)
        if self._offered.trace is not None:
            self._one(self._offered.replayed())
        if self._offered.objective is not None:
            self._find_highest(self._offered.objective)

    def _rate(self, rate: float) -> None:
        lasting = self._rows.lasting

        def make(seconds: float, again: int) -> bool:
            stretch = 1.0 if again else lasting.stretch(STRETCH)
            self._one(self._offered.at(rate, seconds, stretch=stretch, again=again))
            return True

        self._rows.add_piloted(make)

    def _one(self, schedule: Schedule) -> Measurement:
        rows, endpoint, step = self._rows, self._endpoint, self._step
        title = f"{schedule.rate:,.5g} requests/s"
        say(f"offering {endpoint.url}: batch {step.batch}, {title} for {schedule.duration_s:.3g} s")
        row, samples, loaded = measure_rate(
            endpoint, self._sent, schedule, warm=self._warm, batch=step.batch, senders=self._offered.senders,
            key=rows.next_key, title=title, scenario=step.scenario,
        )  # fmt: skip
        rows.add(row, samples, seen_under_load(row, began_ns=loaded.began_ns, service=endpoint.url))
        if loaded.interrupted:
            raise KeyboardInterrupt
        return row

    def _find_highest(self, objective: Objective) -> None:
        rows, first_s = self._rows, self._rows.lasting.first_s
        wanted = samples_for(objective)
        outcomes: list[tuple[float, Outcome]] = []
        # Of the rows that were judged: the last one may have been cut short.
        judged: list[str] = []

        def probe(rate: float) -> Outcome:
            again = sum(tried == rate for tried, _ in outcomes)
            times = _AGAIN if again else 1
            schedule = self._offered.at(
                rate, times * first_s, wanted=times * wanted, stretch=_SEARCH_STRETCH / times, again=again
            )
            # A rate that was asked for besides has a row of that name already.
            row = self._one(replace(schedule, attempt=1 + again + (rate in self._offered.rates)))
            if is_gone(row.verdict.reasons):
                raise MachineError(
                    f"{self._endpoint.url}: the server was gone at {rate:,.5g} a second ({listed(row.errors)})",
                    hint="its log says why",
                )
            outcome = judge(row, rows.samples[row.samples], rows.samples[row.samples + STARTS], objective)
            say(f"{rate:,.5g} requests/s: {outcome}")
            outcomes.append((rate, outcome))
            judged.append(row.samples)
            return outcome

        first = len(rows.rows)
        try:
            # Far enough below what one caller gets that the first try is likely to be kept.
            found = search(probe, start=self._warm.rate / 4, least=wanted / (_SEARCH_STRETCH * first_s))
        except MachineError as error:
            # A rate at which nothing was answered, or a server that has gone, which missed nothing by that: what was
            # found until then stands.
            if not outcomes:
                raise
            say(str(error))
            rows.failures.append(error)
            stopped = error.message.removeprefix(f"{self._endpoint.url}: ")
            self._keep(objective, found_among(outcomes), judged, first, stopped=stopped)
        except KeyboardInterrupt:
            if outcomes:
                self._keep(objective, found_among(outcomes), judged, first, stopped=INTERRUPTED)
            raise
        else:
            self._keep(objective, found, judged, first)

    def _keep(
        self, objective: Objective, found: Found, judged: Sequence[str], first: int, *, stopped: str | None = None
    ) -> None:
        """What was found of the objective by the rows of those samples, which are among those from number `first`.

        stopped: what cut the search short.
        """
        rows = self._rows
        rows.rows[first:] = sorted(rows.rows[first:], key=lambda row: row.load.rate or 0.0)
        update = {
            "rate": found.met, "missed": found.missed, "unsure": found.unsure, "stopped": stopped,
            "tried": tuple(judged),
        }  # fmt: skip
        rows.objectives[cells.service(rows.rows[first])] = objective.model_copy(update=update)
