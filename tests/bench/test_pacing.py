"""The open loop on a virtual clock: known queues give the known waits, and a stall is seen as long as it was."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import pytest

from dlops.bench import stats
from dlops.bench.arrivals import constant, poisson
from dlops.bench.openloop import OpenLoaded
from dlops.bench.pacing import LOST, NOT_SENT, PENDING, REFUSED, Pacer

MS = 1_000_000
S = 1_000_000_000


def simulate(due_ns: np.ndarray, answer_at: Callable[[int], int], *, connections: int = 10_000) -> OpenLoaded:
    """Drive a pacer on a virtual clock. answer_at: from when a request is sent to when it is answered."""
    pacer = Pacer(due_ns.tolist())
    opened = 0
    answers: list[tuple[int, int]] = []
    now = 0
    while not pacer.is_done:
        coming = [time for time in (pacer.next_due_ns, answers[0][0] if answers else None) if time is not None]
        now = max(now, min(coming))
        while answers and answers[0][0] <= now:
            arrived, connection = heapq.heappop(answers)
            pacer.answered(connection, arrived, 200)
            pacer.add(connection)
        while (taken := pacer.take(now)) is not None:
            heapq.heappush(answers, (answer_at(now), taken[0]))
        if pacer.waiting(now, at_most=1):
            if opened < connections:
                opened += 1
                pacer.add(opened)
            else:
                now = answers[0][0]
    return OpenLoaded(
        due_ns=due_ns, sent_ns=np.array(pacer.sent_ns), arrived_ns=np.array(pacer.arrived_ns),
        outcome=np.array(pacer.outcome), timeout_s=30.0, connections=opened, stopped=None, interrupted=False,
    )  # fmt: skip


def one_at_a_time(service_ns: int) -> Callable[[int], int]:
    """A queue with one server that takes equally long for each."""
    free = 0

    def answer_at(sent: int) -> int:
        nonlocal free
        free = max(free, sent) + service_ns
        return free

    return answer_at


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_the_mean_wait_of_a_queue_with_equal_service_times_is_the_known_one(load: float) -> None:
    # M/D/1: the mean wait is rho D / (2 (1 - rho)).
    service_ns = 2 * MS
    expected = load * service_ns / (2 * (1 - load))
    waits = []
    for seed in range(12):
        loaded = simulate(poisson(load * S / service_ns, duration_s=60, seed=seed), one_at_a_time(service_ns))
        waits.append(float(np.mean(loaded.response_ns - service_ns)))
    error = float(np.std(waits, ddof=1)) / np.sqrt(len(waits))
    assert np.mean(waits) == pytest.approx(expected, abs=3 * error)
    assert error < 0.05 * expected


def test_the_calls_inside_the_server_by_its_own_count_are_the_rate_times_the_response_time() -> None:
    # The server looks every millisecond at how many it has, as one who scrapes its gauge does; the client knows what
    # was offered to it and how long the answers took, over the time after the queue had filled.
    looks = np.arange(S, 120 * S, MS)
    for load in (0.5, 0.8):
        inside = np.zeros(len(looks))
        queue = one_at_a_time(2 * MS)

        def answer_at(sent: int, queue: Callable[[int], int] = queue, inside: np.ndarray = inside) -> int:
            leaves = queue(sent)
            first, last = (max(0, -(-(time - S) // MS)) for time in (sent, leaves))
            inside[first:last] += 1
            return leaves

        loaded = simulate(poisson(load * S / (2 * MS), duration_s=120, seed=4), answer_at)
        kept = loaded.due_ns >= S
        rate = kept.sum() / 119
        expected = rate * float(np.mean(loaded.response_ns[kept])) / S
        assert float(np.mean(inside)) == pytest.approx(expected, rel=0.02), load
        # Neither is near the other load's.
        assert float(np.mean(inside)) == pytest.approx(load + load**2 / (2 * (1 - load)), rel=0.1)


def frozen(begin_ns: int, end_ns: int, service_ns: int) -> Callable[[int], int]:
    """A server that takes all at once, and stands still for a while: what comes meanwhile is answered at its end."""
    return lambda sent: max(sent, end_ns) + service_ns if begin_ns - service_ns < sent < end_ns else sent + service_ns


def test_a_stall_is_seen_by_response_time_as_long_as_it_was() -> None:
    # Frozen for S = 1 s of T = 30 s: the q-quantile is S - (1 - q) T = 0.7 s at p99.
    loaded = simulate(poisson(200, duration_s=30, seed=0), frozen(10 * S, 11 * S, MS))
    assert float(np.quantile(loaded.response_ns, 0.99)) / 1e9 == pytest.approx(0.70, rel=0.1)


def test_a_stall_hides_where_time_is_taken_from_the_send_and_connections_are_few() -> None:
    # With one connection, as a closed loop has, all requests but one wait where nobody counts.
    loaded = simulate(constant(200, duration_s=30), frozen(10 * S, 11 * S, MS), connections=1)
    assert float(np.quantile(loaded.service_ns, 0.99)) == MS
    # Behind one connection the backlog drains at 1 ms a request, while 1 in 5 ms comes in.
    assert float(np.quantile(loaded.response_ns, 0.99)) / 1e9 > 0.6
    assert float(np.quantile(loaded.lag_ns, 0.99)) / 1e9 > 0.6


def test_requests_wait_in_order_for_a_free_connection() -> None:
    pacer = Pacer([0, 0, 5, 100])
    assert pacer.take(0) is None
    assert pacer.waiting(5, at_most=10) == 3
    assert pacer.waiting(5, at_most=2) == 2
    pacer.add(7)
    assert pacer.take(6) == (7, 0)
    assert pacer.take(6) is None
    pacer.answered(7, 9, 200)
    pacer.add(7)
    assert pacer.take(10) == (7, 1)
    assert pacer.sent_ns == [6, 10, -1, -1]
    assert pacer.overdue(11) == [7]
    assert pacer.overdue(10) == []
    pacer.failed(7, LOST)
    pacer.refused(12, REFUSED)
    pacer.refused(12, REFUSED)
    assert pacer.outcome == [200, LOST, REFUSED, PENDING], "what is not due yet cannot be refused"
    pacer.give_up()
    assert pacer.outcome[-1] == NOT_SENT
    assert pacer.is_done


def test_an_answer_that_nobody_asked_for_is_told_apart() -> None:
    pacer = Pacer([0])
    pacer.add(1)
    assert not pacer.is_asked(1)
    assert pacer.take(0) == (1, 0)
    assert pacer.is_asked(1)


def test_a_connection_that_breaks_while_idle_is_not_used_again() -> None:
    pacer = Pacer([0])
    pacer.add(1)
    pacer.failed(1, LOST)
    assert pacer.take(0) is None


def test_what_failed_counts_as_the_worst() -> None:
    n = 1000
    due = np.arange(n) * MS
    outcome = np.full(n, 200)
    outcome[:20] = 503
    loaded = OpenLoaded(
        due_ns=due, sent_ns=due, arrived_ns=due + MS, outcome=outcome, timeout_s=3.0, connections=1, stopped=None,
        interrupted=False,
    )  # fmt: skip
    assert loaded.errors == {"HTTP 503": 20}
    assert len(loaded.service_ns) == n - 20
    assert float(np.quantile(loaded.response_ns, 0.99)) == 3 * S
    interval = stats.quantile_interval(loaded.response_ns, 0.5)
    assert interval is not None
    assert interval.value == MS


def test_a_part_of_a_run_counts_its_times_from_its_own_begin() -> None:
    loaded = simulate(constant(10, duration_s=2), one_at_a_time(MS)).between(S, 2 * S)
    assert loaded.due_ns.tolist() == [100 * MS * step for step in range(10)]
    assert loaded.response_ns.tolist() == [MS] * 10
