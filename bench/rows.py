"""The rows of a run as they come in, with their samples and with what a report says beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from dlops.bench import stats
from dlops.bench.analysis import QUEUE_SAMPLES, remarked
from dlops.bench.disturbed import Seen, attach
from dlops.bench.pilot import Length, shortfalls
from dlops.bench.results import Measured, row_key
from dlops.bench.sensors import Rapl
from dlops.bench.telemetry import Recorder
from dlops.console import say
from dlops.environment import describe_environment
from dlops.errors import DlopsError, MachineError, UsageError
from dlops.report import STARTS, Measurement, Objective, Report

# How many independent calls a queue is worth comes out differently from run to run.
_MARGIN = 1.3

Samples = dict[str, NDArray[np.int64]]


@dataclass(slots=True)
class Rows:
    """lasting: how long each row is measured. recorder: what watches the machine meanwhile. failures: of targets."""

    title: str
    command: tuple[str, ...]
    lasting: Length
    recorder: Recorder
    energy: Rapl = field(default_factory=Rapl)
    seen: dict[str, Seen] = field(default_factory=dict)
    baseline: str | None = None
    rows: list[Measurement] = field(default_factory=list)
    samples: Samples = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[DlopsError] = field(default_factory=list)
    objectives: dict[str, Objective] = field(default_factory=dict)

    @property
    def next_key(self) -> str:
        return row_key(len(self.rows))

    def add(self, row: Measurement, samples: Samples, seen: Seen) -> None:
        """seen: when it was measured. Of a row with a time of its own, how well its quantiles are known is judged here;
        rows that took turns bring that along."""
        if not self.rows:
            for failure in self.failures:
                say(str(failure))
        if row.duration_ns is not None:
            row = remarked(row, shortfalls(row.latency, spent_s=row.duration_ns / 1e9))
        self.rows.append(row)
        self.samples |= samples
        self.seen[row.samples] = seen

    def add_piloted(self, make: Callable[[float, int], bool]) -> None:
        """Add one row with a time of its own: a pilot of it, or where that shows that it has to last longer, the row
        made anew in the pilot's place, once.

        make: measures the row for so many seconds and adds it, told how often it was made before; returns whether more
        time would help. Where less comes of the longer one than the pilot has, by Ctrl-C or a dead server, the pilot is
        kept.
        """
        helps = make(self.lasting.first_s, 0)
        pilot = self.rows[-1]
        seconds = self._longer_s(pilot) if helps else None
        if seconds is None:
            return
        self.rows.pop()
        others, before, seen = len(self.rows), dict(self.samples), self.seen[pilot.samples]
        try:
            make(seconds, 1)
        finally:
            if len(self.rows) == others:
                self.rows.append(pilot)
            elif self.rows[-1].latency.samples < pilot.latency.samples:
                self.rows[-1], self.samples, self.seen[pilot.samples] = pilot, before, seen

    def _longer_s(self, row: Measurement) -> float | None:
        """How many seconds a row is to last by what its pilot shows; None where that was long enough."""
        assert row.duration_ns is not None
        # Under a rate that is too high the wait grows for as long as it is offered.
        if any(reason.startswith("saturated") for reason in row.verdict.reasons):
            return None
        spent_s = row.duration_ns / 1e9
        turns = stats.stretches(self.samples[row.samples + STARTS], row.duration_ns)
        wanted_s = self.lasting.after(self.samples[row.samples], turns=turns, spent_s=spent_s)
        if row.load.rate is not None and self.lasting.is_piloted:
            times = _MARGIN * max(QUEUE_SAMPLES.values()) / row.latency.effective_samples
            wanted_s = max(wanted_s, min(self.lasting.longest_s, spent_s * times))
        return wanted_s if wanted_s > spent_s else None

    def note(self, text: str) -> None:
        """Say it, and once in the report."""
        if text not in self.notes:
            say(f"note: {text}")
            self.notes.append(text)

    @contextmanager
    def keeping_what_there_is(self, *, even_of_none: bool = False) -> Iterator[None]:
        """Where a target fails after others are measured, those are kept, and the failure is said and noted.

        even_of_none: a machine's failure is noted too where nothing is measured yet: other targets may still be.
        """
        try:
            yield
        except (MachineError, UsageError) as error:
            if not self.rows and not (even_of_none and isinstance(error, MachineError)):
                raise
            # Of none that was measured it may yet be what the whole run ends with.
            if self.rows:
                say(str(error))
            self.failures.append(error)

    def result(self, *, partial: bool) -> Measured:
        report = Report(
            title=self.title,
            created=datetime.now(UTC),
            command=self.command,
            environment=describe_environment(),
            measurements=tuple(self.rows),
            objectives=self.objectives,
            baseline=self.baseline,
            notes=(*self.notes, *(failure.message for failure in self.failures)),
            partial=partial,
        )
        return attach(Measured(report=report, samples=self.samples), self.recorder.end(), self.seen)
