"""Interleaved timing on a virtual clock: who runs when, what is kept, and when it ends."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest

from dlops.timing import (
    MIN_ROUNDS,
    Interleaved,
    Local,
    TimingFailedError,
    TimingInterrupted,
    drifted,
    interleave,
    steady,
)


class VirtualClock:
    """Time passes only in calls and sleeps.

    spin_ns: CPU time that idle threads still burn after a call. tick_ns: the steps that CPU time is counted in.
    """

    def __init__(self, spin_ns: int = 0, tick_ns: int = 1) -> None:
        self.tick_ns = tick_ns
        self.now = 0
        self.spin_until = 0
        self.spin_ns = spin_ns
        self.burned = 0

    def now_ns(self) -> int:
        return self.now

    def busy_ns(self) -> int:
        return self.burned // self.tick_ns * self.tick_ns

    def sleep(self, seconds: float) -> None:
        step = round(seconds * 1e9)
        self.burned += max(0, min(step, self.spin_until - self.now))
        self.now += step

    def call(self, duration_ns: int) -> None:
        self.now += duration_ns
        self.burned += duration_ns
        self.spin_until = self.now + self.spin_ns


def constant(clock: VirtualClock, duration_ns: int, log: list[tuple[str, int]] | None = None, name: str = ""):
    def call() -> None:
        if log is not None:
            log.append((name, clock.now))
        clock.call(duration_ns)

    return call


def test_each_latency_is_what_the_call_took() -> None:
    clock = VirtualClock()
    runs = {"fast": constant(clock, 100_000), "slow": constant(clock, 3_000_000)}
    timed = interleave(runs, budget_s=2.0, clock=clock)
    assert set(timed.runs["fast"].latencies_ns.tolist()) == {100_000}
    assert set(timed.runs["slow"].latencies_ns.tolist()) == {3_000_000}
    assert all(run.warmed_up for run in timed.runs.values())


def test_every_round_gives_each_its_turn_of_equal_length_in_a_changing_order() -> None:
    clock = VirtualClock()
    runs = {name: constant(clock, 1_000_000) for name in ("a", "b", "c")}
    timed = interleave(runs, budget_s=3.0, clock=clock)
    turns = {name: run.by_turn() for name, run in timed.runs.items()}
    assert {len(of_one) for of_one in turns.values()} == {timed.rounds}
    lengths = {int(turn.sum()) for of_one in turns.values() for turn in of_one}
    assert max(lengths) - min(lengths) <= 2_000_000
    first_starts = {name: run.starts_ns[np.unique(run.turns, return_index=True)[1]] for name, run in timed.runs.items()}
    orders = {tuple(sorted(first_starts, key=lambda name: first_starts[name][turn])) for turn in range(timed.rounds)}
    assert len(orders) >= 4


def test_the_order_follows_the_seed() -> None:
    def order(seed: int) -> list[str]:
        clock = VirtualClock()
        log: list[tuple[str, int]] = []
        runs = {name: constant(clock, 10_000_000, log, name) for name in "abcd"}
        interleave(runs, budget_s=2.0, min_samples=1, seed=seed, clock=clock)
        return [name for name, _ in log]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_slow_spell_of_the_machine_hits_all_alike() -> None:
    clock = VirtualClock()

    def slowed(base_ns: int):
        return lambda: clock.call(base_ns * (3 if 4_000_000_000 < clock.now < 6_000_000_000 else 1))

    timed = interleave({"a": slowed(1_000_000), "b": slowed(2_000_000)}, budget_s=8.0, clock=clock)
    pairs = zip(timed.runs["a"].by_turn(), timed.runs["b"].by_turn(), strict=True)
    ratios = [np.median(b) / np.median(a) for a, b in pairs]
    assert np.median(ratios) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("tick_ns", [1, 4_000_000, 10_000_000])
def test_a_turn_waits_until_threads_of_the_one_before_stop_spinning(tick_ns: int) -> None:
    clock = VirtualClock(spin_ns=20_000_000, tick_ns=tick_ns)
    log: list[tuple[str, int]] = []
    runs = {name: constant(clock, 5_000_000, log, name) for name in ("a", "b")}
    interleave(runs, budget_s=2.0, min_samples=1, clock=clock)
    for (before, began), (after, next_began) in itertools.pairwise(log[-60:]):
        if before != after:
            assert next_began - (began + 5_000_000) >= 20_000_000


def test_the_first_tenth_of_a_turn_is_not_kept() -> None:
    clock = VirtualClock()
    state = {"last": ""}

    def cold_after_switch(name: str):
        def call() -> None:
            clock.call(1_000_000 if state["last"] == name else 4_000_000)
            state["last"] = name

        return call

    timed = interleave({n: cold_after_switch(n) for n in ("a", "b")}, budget_s=2.0, clock=clock)
    assert set(timed.runs["a"].latencies_ns.tolist()) == {1_000_000}


def test_it_ends_when_the_budget_is_spent_and_the_samples_are_there() -> None:
    clock = VirtualClock()
    progress: list[float] = []
    interleave({"a": constant(clock, 1_000_000)}, budget_s=2.0, clock=clock, on_progress=progress.append)
    assert 2.0 <= clock.now / 1e9 < 2.6
    assert progress[-1] == 1.0
    assert progress == sorted(progress)


def test_it_goes_on_to_twice_the_budget_for_missing_samples_and_no_longer() -> None:
    clock = VirtualClock()
    timed = interleave({"a": constant(clock, 100_000_000)}, budget_s=5.0, max_warmup_s=1.0, clock=clock)
    assert len(timed.runs["a"].latencies_ns) < 368
    assert 10.0 <= clock.now / 1e9 < 12.0


def test_a_run_is_made_longer_where_what_it_measured_asks_for_it() -> None:
    clock = VirtualClock()
    asked: list[tuple[int, float]] = []

    def longer(so_far: Interleaved) -> float:
        asked.append((len(so_far.runs["a"].latencies_ns), so_far.spent_s))
        return 5.0 if len(asked) == 1 else so_far.spent_s

    timed = interleave({"a": constant(clock, 1_000_000)}, budget_s=2.0, clock=clock, longer=longer)
    assert [round(spent, 1) for _, spent in asked] == [2.0, 5.0]
    assert asked[0][0] < asked[1][0] == len(timed.runs["a"].latencies_ns)
    assert timed.spent_s == asked[1][1]


def test_a_run_that_always_asks_for_more_ends_all_the_same() -> None:
    clock = VirtualClock()
    timed = interleave(
        {"a": constant(clock, 1_000_000)}, budget_s=1.0, clock=clock, longer=lambda so_far: 2 * so_far.spent_s
    )
    assert 16.0 <= timed.spent_s < 17.0


def test_even_a_very_slow_call_gets_six_rounds() -> None:
    clock = VirtualClock()
    timed = interleave({"a": constant(clock, 2_000_000_000)}, budget_s=0.5, max_warmup_s=1.0, clock=clock)
    assert timed.rounds == MIN_ROUNDS


def test_warm_up_lasts_until_drift_is_gone() -> None:
    clock = VirtualClock()
    calls = itertools.count()
    run = interleave(
        {"a": lambda: clock.call(max(1_000_000, 5_000_000 - 20_000 * next(calls)))}, budget_s=1.0, clock=clock
    )
    assert run.runs["a"].warmed_up
    assert run.runs["a"].warmup_calls >= 200
    assert set(run.runs["a"].latencies_ns.tolist()) == {1_000_000}


def test_a_warm_up_that_never_settles_is_cut_off_and_said_so() -> None:
    clock = VirtualClock()
    calls = itertools.count()
    timed = interleave(
        {"a": lambda: clock.call(int(1_000_000 * 1.003 ** next(calls)))}, budget_s=0.2, max_warmup_s=0.5, clock=clock
    )
    assert not timed.runs["a"].warmed_up


def test_ctrl_c_keeps_the_whole_rounds() -> None:
    clock = VirtualClock()

    def call() -> None:
        if clock.now > 3_000_000_000:
            raise KeyboardInterrupt
        clock.call(1_000_000)

    with pytest.raises(TimingInterrupted) as caught:
        interleave({"a": call, "b": constant(clock, 1_000_000)}, budget_s=60.0, clock=clock)
    partial: Interleaved = caught.value.partial
    assert partial.rounds >= 1
    assert len(partial.runs["a"].by_turn()) == len(partial.runs["b"].by_turn()) == partial.rounds


def test_ctrl_c_before_the_first_round_is_plain() -> None:
    def call() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interleave({"a": call}, budget_s=1.0, clock=VirtualClock())
    assert not isinstance(caught.value, TimingInterrupted)


def test_whole_rounds_are_kept_when_a_call_fails_later() -> None:
    clock, made = VirtualClock(), itertools.count()
    fine = constant(clock, 1_000_000)

    def call() -> None:
        fine()
        if next(made) == 3000:
            raise ValueError("broken")

    with pytest.raises(TimingFailedError) as caught:
        interleave({"a": call, "b": constant(clock, 1_000_000)}, budget_s=60.0, clock=clock)
    assert isinstance(caught.value.__cause__, ValueError)
    partial = caught.value.partial
    assert partial.rounds >= 1
    assert len(partial.runs["a"].by_turn()) == len(partial.runs["b"].by_turn()) == partial.rounds


def test_a_failing_call_is_named_and_the_collector_is_as_it_was() -> None:
    def call() -> None:
        raise ValueError("broken")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="broken") as caught:
        interleave({"left": call}, budget_s=1.0, clock=VirtualClock())
    assert caught.value.__notes__ == ["while timing left"]
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0  # what tests/conftest.py froze is still so


def test_drift_is_told_from_noise() -> None:
    draw = np.random.default_rng(0)

    def noisy(centre: float) -> np.ndarray:
        return np.asarray(draw.normal(centre, centre / 10, 50), np.int64)

    assert not drifted(noisy(1e6), noisy(1e6))
    assert drifted(noisy(1e6), noisy(1.2e6))
    assert not steady([noisy(1e6), noisy(1e6)])
    assert steady([noisy(2e6), *(noisy(1e6) for _ in range(3))])
    assert not steady([noisy(1e6), noisy(1.2e6), noisy(1.4e6)])


def test_what_is_made_before_a_call_is_in_no_latency() -> None:
    clock = VirtualClock()
    log: list[tuple[str, int]] = []
    local = Local(
        "it", constant(clock, 1_000_000, log, "call"), clock, before=constant(clock, 9_000_000, log, "before")
    )
    local.warm_up(1.0)
    log.clear()
    turn = local.take_turn(0.5)
    assert set(turn.latencies_ns.tolist()) == {1_000_000}
    assert [name for name, _ in log[:4]] == ["before", "call", "before", "call"]
    assert set(turn.starts_ns.tolist()) <= {at for name, at in log if name == "call"}
