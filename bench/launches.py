"""Targets that several fresh processes ran, one process of each after the other: put together as one run.

How a process lies in memory makes it faster or slower for as long as it lives. Intervals over the calls of one process
cannot know that; over processes they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dlops.bench import stats
from dlops.bench.attended import AttendedTurn
from dlops.bench.inprocess import Started
from dlops.bench.stats import Integers
from dlops.errors import UsageError
from dlops.timing import Interleaved, Timed

# The median of as many, as of any six independent values, lies between the least and the largest of them at 95 %.
FEWEST = stats.fewest_samples(0.5)
MOST = 100


def check_processes(count: int) -> None:
    """Raise UsageError for a number of processes that gives no interval between them."""
    if count != 1 and not FEWEST <= count <= MOST:
        raise UsageError(
            f"{count} processes: from {FEWEST} to {MOST} say how much they differ",
            hint=f"--processes {FEWEST} or more, or 1: then an interval is of that one process",
        )


@dataclass(slots=True)
class Launches:
    """What was measured so far: a run with processes of its own each, all of the same targets."""

    runs: list[Interleaved] = field(default_factory=list)
    started: list[list[Started]] = field(default_factory=list)
    turns: list[list[Sequence[AttendedTurn]]] = field(default_factory=list)

    def add(self, run: Interleaved, started: Sequence[Started], turns: Sequence[Sequence[AttendedTurn]]) -> None:
        """started, turns: by target, in the order of the first launch's."""
        self.runs.append(run)
        self.started.append(list(started))
        # Cut short, some have had a turn more than there are whole rounds.
        self.turns.append([own[: run.rounds] for own in turns])

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def timed(self) -> Interleaved:
        """All rounds, numbered through, on the clock of the first."""
        first = self.runs[0]
        return Interleaved(
            runs={name: self._timed(name) for name in first.runs},
            rounds=sum(run.rounds for run in self.runs),
            spent_s=sum(run.spent_s for run in self.runs),
            began_ns=first.began_ns,
        )

    @property
    def of_round(self) -> Integers | None:
        """For each round the number of its launch; None where there was only one."""
        if len(self) == 1:
            return None
        return np.repeat(np.arange(len(self)), [run.rounds for run in self.runs])

    @property
    def ready(self) -> list[Started]:
        """Each target as it was started: the one with the median cold start, and the most memory that any took."""
        return [_typical([each[place] for each in self.started]) for place in range(len(self.started[0]))]

    @property
    def attended(self) -> list[list[AttendedTurn]]:
        """By target, its turns in all launches."""
        return [[turn for each in self.turns for turn in each[place]] for place in range(len(self.turns[0]))]

    def _timed(self, name: str) -> Timed:
        parts = [run.runs[name] for run in self.runs]
        rounds = np.cumsum([0, *[run.rounds for run in self.runs]])
        later = [run.began_ns - self.runs[0].began_ns for run in self.runs]
        return Timed(
            latencies_ns=np.concatenate([part.latencies_ns for part in parts]),
            starts_ns=np.concatenate([part.starts_ns + gap for part, gap in zip(parts, later, strict=True)]),
            turns=np.concatenate([part.turns + before for part, before in zip(parts, rounds, strict=False)]),
            warmup_calls=sum(part.warmup_calls for part in parts),
            warmed_up=all(part.warmed_up for part in parts),
            parts_ns={
                key: np.concatenate([part.parts_ns[key] for part in parts]) for key in parts[0].parts_ns
            },
        )  # fmt: skip


def _typical(started: Sequence[Started]) -> Started:
    known = sorted((one.cold_start for one in started if one.cold_start), key=lambda one: one.total_ns)
    return replace(
        started[0],
        cold_start=known[(len(known) - 1) // 2] if known else None,
        peak_memory_bytes=_most([one.peak_memory_bytes for one in started]),
        device_memory_bytes=_most([one.device_memory_bytes for one in started]),
    )


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
