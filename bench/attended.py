"""An arm with a note of when each of its turns began and ended, and of the energy that went by meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dlops.timing import Arm, Turn, WarmUp


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedTurn:
    """From the order to the moment that the arm's threads are at rest. energy_uj: of the counters; None without them.

    calls: how many were made in it, those in its lead-in reckoned from the pace of the others.
    """

    begin_ns: int
    end_ns: int
    calls: float
    energy_uj: int | None


class Attended:
    """Passes everything on to an arm. Between two targets' turns is the only time to read a counter for one of them."""

    def __init__(self, arm: Arm, read_energy: Callable[[], Mapping[str, int]] | None = None) -> None:
        """read_energy: cumulative microjoules by counter."""
        self._arm, self._read_energy = arm, read_energy
        self.turns: list[AttendedTurn] = []

    def warm_up(self, limit_s: float) -> WarmUp:
        return self._arm.warm_up(limit_s)

    def take_turn(self, turn_s: float) -> Turn:
        before, begin_ns = self._energy(), time.perf_counter_ns()
        turn = self._arm.take_turn(turn_s)
        end_ns, after = time.perf_counter_ns(), self._energy()
        ended_ns = int(turn.starts_ns[-1] + turn.latencies_ns[-1])
        made = len(turn.latencies_ns) * (ended_ns - begin_ns) / (ended_ns - int(turn.starts_ns[0]))
        spent = None if before is None or after is None else after - before
        self.turns.append(AttendedTurn(begin_ns=begin_ns, end_ns=end_ns, calls=made, energy_uj=spent))
        return turn

    def _energy(self) -> int | None:
        if self._read_energy is None:
            return None
        try:
            return sum(self._read_energy().values())
        except (OSError, ValueError):
            return None  # the counter went away: the turn has no energy
