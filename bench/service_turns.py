"""Services that take turns within one run: what slows the machine or the network hits all of them alike.

For `dlops compare`: a client that keeps calls in flight on one server, then on the other, in rounds as artifacts in
process do. Rows of `dlops bench`, one URL after the other, are in `dlops.bench.service_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle

from dlops import signals
from dlops.artifact import Artifact
from dlops.bench import pacing
from dlops.bench.analysis import analyse_turns, remarked, shortcomings
from dlops.bench.attended import Attended
from dlops.bench.disturbed import seen_in_turns
from dlops.bench.inprocess import distinct
from dlops.bench.kernel import open_more_files
from dlops.bench.load import TIMEOUT_S
from dlops.bench.network import Payload, encoded, prepare, served_fields
from dlops.bench.oip import Endpoint, find_endpoint
from dlops.bench.pilot import length, shortfalls
from dlops.bench.results import Measured, MeasureInterrupted, row_key
from dlops.bench.rows import Rows
from dlops.bench.scenarios import load_of
from dlops.bench.telemetry import Recorder
from dlops.bench.together import Together
from dlops.bench.transport import Line, canonical
from dlops.console import progress_bar, say, to_fraction
from dlops.errors import MachineError
from dlops.report import STARTS, TURNS, Measurement
from dlops.timing import Interleaved, Local, TimingFailedError, TimingInterrupted, interleave

_PROGRESS_STEPS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """target: the URL, numbered where one is named twice."""

    target: str
    endpoint: Endpoint
    payload: Payload


def measure_in_turns(
    urls: Sequence[str], *, payload: Artifact | None, batch: Sequence[int], concurrency: Sequence[int],
    duration_s: float, command: Sequence[str] = (),
) -> Measured:  # fmt: skip
    """A row a URL at every batch and number of calls in flight, all URLs in turns within one run.

    payload: whose samples are sent; random numbers where there is none. duration_s: for each row, the waits between
    turns included, the warm-up not. A call that fails ends the run: with what was measured until then where that is a
    whole round, marked. Raises as `dlops.bench.run.measure` does.
    """
    lasting = length(duration_s)
    urls = [canonical(url) for url in urls]
    endpoints = [find_endpoint(url, model=payload.name if payload else None) for url in urls]
    targets = distinct([one.url for one in endpoints])
    with signals.heard_once(), Recorder() as recorder:
        rows = Rows(title=", ".join(dict.fromkeys(urls)), command=tuple(command), lasting=lasting, recorder=recorder)
        rows.baseline = targets[0]
        for one in endpoints:
            recorder.watch(one.url, one.host, one.port)
        try:
            for items in dict.fromkeys(batch):
                with rows.keeping_what_there_is():
                    served = _prepared(rows, dict(zip(targets, endpoints, strict=True)), payload, batch=items)
                    for calls in dict.fromkeys(concurrency):
                        _time(rows, served, batch=items, concurrency=calls)
        except KeyboardInterrupt:
            if not rows.rows:
                raise
            raise MeasureInterrupted(rows.result(partial=True)) from None
        return rows.result(partial=bool(rows.failures))


def _prepared(rows: Rows, endpoints: Mapping[str, Endpoint], payload: Artifact | None, *, batch: int) -> list[_Served]:
    served = []
    for target, endpoint in endpoints.items():
        sent = prepare(endpoint, payload, batch=batch)
        for note in sent.notes:
            rows.note(note)
        served.append(_Served(target=target, endpoint=endpoint, payload=sent))
    return served


def _time(rows: Rows, served: Sequence[_Served], *, batch: int, concurrency: int) -> None:
    title = f"batch {batch}, {concurrency} in flight"
    say(f"loading {len(served)} services in turns at {title}: {rows.lasting} a row, warm-up not included")
    open_more_files(concurrency * len(served))
    budget_s = rows.lasting.first_s * len(served)
    with _arms(served, concurrency) as arms, progress_bar(title, total=_PROGRESS_STEPS) as bar:

        def keep(timed: Interleaved, *, cut_short: str | None = None) -> None:
            _keep(rows, served, arms, timed, batch=batch, concurrency=concurrency, cut_short=cut_short)

        runs = {one.target: arm for one, arm in zip(served, arms, strict=True)}
        try:
            timed = interleave(
                runs, budget_s=budget_s, max_warmup_s=max(3.0, rows.lasting.first_s),
                on_progress=to_fraction(bar, _PROGRESS_STEPS),
            )  # fmt: skip
        except TimingInterrupted as interruption:
            keep(interruption.partial, cut_short="interrupted")
            raise KeyboardInterrupt from None
        except TimingFailedError as failure:
            # A call raises nothing else; what does is a bug, and its trace is wanted.
            if not isinstance(failure.__cause__, MachineError):
                raise
            keep(failure.partial, cut_short=f"cut short: {failure.__cause__.message}")
            raise failure.__cause__ from None
    keep(timed)


@contextmanager
def _arms(served: Sequence[_Served], concurrency: int) -> Iterator[list[Attended]]:
    """As many connections to each as calls are kept in flight, closed at the end."""
    with ExitStack() as stack:
        arms = []
        for one in served:
            endpoint, requests = one.endpoint, encoded(one.endpoint, one.payload)
            callers = []
            for _ in range(concurrency):
                line = one.payload.transport.dial(endpoint.host, endpoint.port, timeout_s=TIMEOUT_S)
                stack.callback(line.close)
                callers.append(Local(one.target, _Caller(one.target, line, requests)))
            arms.append(Attended(callers[0] if concurrency == 1 else Together(callers)))
        yield arms


class _Caller:
    """One call after the other on a line, the requests in turn."""

    def __init__(self, target: str, line: Line, requests: Sequence[bytes]) -> None:
        self._target, self._line, self._requests = target, line, cycle(requests)

    def __call__(self) -> None:
        """Raises MachineError for any answer but success."""
        try:
            answer = self._line.ask(next(self._requests))
        except (OSError, ValueError) as error:
            raise self._failed(f"{error or type(error).__name__}") from None
        if answer.status != pacing.ANSWERED:
            name = pacing.outcome_name(answer.status)
            raise self._failed(name if answer.status == pacing.OTHER else f"it was answered {name}")

    def _failed(self, why: str) -> MachineError:
        return MachineError(
            f"{self._target}: a call failed ({why})",
            hint="services in turns must answer every call; dlops bench counts failures, and compare takes its reports",
        )


def _keep(
    rows: Rows, served: Sequence[_Served], arms: Sequence[Attended], timed: Interleaved, *, batch: int,
    concurrency: int, cut_short: str | None,
) -> None:  # fmt: skip
    """Add the row of each. cut_short: why they ended early."""
    keys = [row_key(len(rows.rows) + number) for number in range(len(served))]
    base = timed.runs[served[0].target].by_turn()
    for number, (key, one) in enumerate(zip(keys, served, strict=True)):
        run = timed.runs[one.target]
        figures = analyse_turns(
            run.latencies_ns, run.turns, {}, batch=batch, concurrency=concurrency, baseline=base,
            observed=shortcomings(warmed_up=run.warmed_up, warmup_calls=run.warmup_calls, stopped=cut_short),
        )  # fmt: skip
        fields = served_fields(one.endpoint, one.payload) | {"target": one.target}
        row = Measurement(
            load=load_of(None, batch=batch, concurrency=concurrency), samples=key, paired_with=keys[0],
            warmup_calls=run.warmup_calls, **figures.as_fields(), **fields,
        )  # fmt: skip
        row = remarked(row, shortfalls(row.latency, spent_s=timed.spent_s / len(served)))
        samples = {key: run.latencies_ns, key + STARTS: run.starts_ns, key + TURNS: run.turns}
        seen = seen_in_turns([arm.turns for arm in arms], number, batch=batch)
        rows.add(row, samples, replace(seen, service=one.endpoint.url))
