"""Schedules: what comes due when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dlops.bench.arrivals import Offered, constant, poisson, read_trace, with_pauses
from dlops.errors import UsageError


@pytest.mark.parametrize("rate", [3.0, 200.0, 5000.0])
def test_poisson_arrivals_have_the_rate_and_exponential_gaps(rate: float) -> None:
    duration_s = 20_000 / rate
    due = poisson(rate, duration_s=duration_s, seed=1)
    assert np.all(np.diff(due) >= 0)
    assert due[0] >= 0
    assert due[-1] < duration_s * 1e9
    # The count is Poisson distributed with the mean 20,000: its standard deviation is 141.
    assert abs(len(due) - 20_000) < 5 * 141
    gaps = np.diff(due) / 1e9 * rate
    assert np.mean(gaps) == pytest.approx(1, abs=0.05)
    assert np.std(gaps) == pytest.approx(1, abs=0.05)
    assert np.mean(gaps > 1) == pytest.approx(np.exp(-1), abs=0.02)


def test_a_seed_repeats_a_schedule_and_another_one_does_not() -> None:
    assert np.array_equal(poisson(100, duration_s=1, seed=3), poisson(100, duration_s=1, seed=3))
    assert not np.array_equal(poisson(100, duration_s=1, seed=3)[:10], poisson(100, duration_s=1, seed=4)[:10])


def test_constant_arrivals_have_equal_gaps() -> None:
    assert constant(4, duration_s=1).tolist() == [0, 250_000_000, 500_000_000, 750_000_000]


def test_nothing_is_due_in_a_pause() -> None:
    due = with_pauses(constant(10, duration_s=2), busy_s=1, idle_s=3)
    assert len(due) == 20
    assert due[9] == 900_000_000
    assert due[10] == 4_000_000_000


def test_a_low_rate_is_kept_up_longer_for_p99_but_not_without_end() -> None:
    quick, slow, slowest = (Offered(rates=(rate,)).at(rate, 2.0) for rate in (1000.0, 200.0, 10.0))
    assert quick.duration_s == pytest.approx(2)
    assert slow.duration_s == pytest.approx(3.31)
    assert slowest.duration_s == pytest.approx(6)
    assert all(one.lead_in_ns == 500_000_000 for one in (quick, slow, slowest))


@pytest.mark.parametrize(("seconds", "requests"), [(2.0, 1000), (3.0, 1500), (6.5, 3000)])
def test_pauses_are_within_the_seconds_of_a_run(seconds: float, requests: int) -> None:
    schedule = Offered(rates=(1000.0,), arrivals="constant", pauses=(1.0, 2.0)).at(1000.0, seconds)
    # Half a second of lead-in, then as long as was asked for.
    assert schedule.end_ns == round((seconds + 0.5) * 1e9)
    assert schedule.due_ns[-1] < schedule.end_ns
    assert len(schedule.due_ns) == requests
    assert not np.any((schedule.due_ns > 1_000_000_000) & (schedule.due_ns < 3_000_000_000))


def test_a_trace_of_one_moment_lasts_a_second() -> None:
    schedule = Offered(trace=np.zeros(3, np.int64)).replayed()
    assert (schedule.rate, schedule.end_ns) == (3.0, 1_000_000_000)


def test_a_trace_is_replayed_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("# seconds\n0\n\n0.25  # a comment\n0.25\n2\n")
    trace = read_trace(path)
    assert trace.tolist() == [0, 250_000_000, 250_000_000, 2_000_000_000]
    schedule = Offered(trace=trace).replayed()
    # What is answered after the last one is due counts until the next would be.
    assert (schedule.lead_in_ns, schedule.end_ns) == (0, 2_666_666_666)
    assert schedule.rate == pytest.approx(1.5)
    assert schedule.due_ns is trace
    assert schedule.as_load["arrivals"] == "trace"
    assert schedule.as_load["trace"] == Offered(trace=trace.copy()).replayed().as_load["trace"]
    assert schedule.as_load["trace"] != Offered(trace=trace + 1).replayed().as_load["trace"]


def test_a_schedule_says_what_made_it() -> None:
    offered = Offered(rates=(10.0,), arrivals="constant", pauses=(1.0, 2.0))
    assert offered.at(10.0, 3.0).as_load == {
        "rate": 10.0, "arrivals": "constant", "pauses_s": (1.0, 2.0), "trace": None, "attempt": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\nhalf\n", "line 2: 'half' is no time in seconds"),
        ("0\n-1\n", "line 2: '-1' is no time"),
        ("0\ninf\n", "line 2: 'inf' is no time"),
        ("1\n0.5\n", "line 2: 0.5 comes after 1"),
        ("0\n1e300\n", "line 2: 1e300 is over a week after the start"),
        ("1763733600\n", "line 1: 1763733600 is over a week after the start"),
        ("# nothing\n", "no times in it"),
    ],
)
def test_a_wrong_trace_is_refused_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "trace.txt").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_trace(tmp_path / "trace.txt")


def test_a_trace_that_is_not_there_or_not_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_trace(tmp_path / "none.txt")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        read_trace(tmp_path / "image.png")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": (0.0,)},
        {"rates": (-3.0, 5.0)},
        {"rates": (float("inf"),)},
        {},
        {"rates": (5.0,), "pauses": (0.0, 1.0)},
    ],
)
def test_what_cannot_be_offered_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Offered(**wrong)  # type: ignore[arg-type]


def test_a_rate_beyond_all_memory_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1e\+12 requests a second for .* s are more than"):
        Offered(rates=(1e12,)).at(1e12, 1.0)


def test_another_look_is_at_other_arrivals() -> None:
    offered = Offered(rates=(100.0,))
    one, again = offered.at(100.0, 2.0), offered.at(100.0, 2.0, again=1)
    assert one.due_ns.tolist()[:20] != again.due_ns.tolist()[:20]


def test_a_rate_at_which_nothing_comes_due_is_refused() -> None:
    with pytest.raises(UsageError, match="none is due"):
        Offered(rates=(0.001,)).at(0.001, 1.0)
