"""How often `dlops compare` cries wolf over two of the same, and how often it finds 5 % more work: on a real clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from dlops.bench.compare import FALSE_ALARMS, Comparison, compare_turns
from dlops.bench.results import Measured
from dlops.bench.stats import rate_interval, summarize
from dlops.environment import describe_environment
from dlops.report import TURNS, Load, Measurement, Report, Verdict
from dlops.timing import Timed, interleave

PAIRS = 100
SECONDS_A_ROW = 5.0
MARGIN = 0.02
PASSES = 20  # about 0.2 ms; 21 are 5 % more work
QUANTITIES = ("p50", "p99", "throughput")


# One pair of arrays for all loops: where an array lies in memory changes its speed, and that would be no false alarm.
numbers, into = np.linspace(0, 1, 1000), np.empty(1000)


def work(passes: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(passes):
            np.sin(numbers, out=into)

    return call


def row(run: Timed, key: str) -> Measurement:
    turns = run.by_turn()
    return Measurement(
        target=key, artifact=None, runtime="numpy", provider="cpu", device="cpu", precision="fp64", threads=1,
        boundary="host", load=Load(), samples=key, latency=summarize(run.latencies_ns, turns=run.turns),
        throughput=rate_interval(
            np.array([len(turn) for turn in turns]), np.array([turn.sum() / 1e9 for turn in turns])
        ),
        warmup_calls=run.warmup_calls, verdict=Verdict(steady=True),
    )  # fmt: skip


def compared(base: Timed, new: Timed, *, margin: float) -> Comparison:
    report = Report(
        title="numpy", created=datetime.now(UTC), command=(), environment=describe_environment(),
        measurements=(row(base, "base"), row(new, "new")),
    )  # fmt: skip
    samples = {"base": base.latencies_ns, "new": new.latencies_ns}
    samples |= {"base" + TURNS: base.turns, "new" + TURNS: new.turns}
    return compare_turns(Measured(report=report, samples=samples), base="base", new="new", margin=margin)


def count(comparisons: Sequence[Comparison], *words: str) -> list[int]:
    """In how many a quantity got one of the words, for each quantity."""
    judged = [{one.quantity: one.word for one in each.rows[0].judged} for each in comparisons]
    return [sum(each[quantity] in words for each in judged) for quantity in QUANTITIES]


def one_run(seed: int) -> tuple[Comparison, Comparison, Comparison]:
    """The same against the same with next to no margin and with the usual one, then 5 % more work against it."""
    runs = interleave(
        {"base": work(PASSES), "same": work(PASSES), "slower": work(PASSES * 21 // 20)},
        budget_s=3 * SECONDS_A_ROW, max_warmup_s=SECONDS_A_ROW, seed=seed,
    ).runs  # fmt: skip
    return (
        compared(runs["base"], runs["same"], margin=1e-6),
        compared(runs["base"], runs["same"], margin=MARGIN),
        compared(runs["base"], runs["slower"], margin=MARGIN),
    )


@pytest.mark.timeout(3600)
def test_false_alarms_are_as_rare_as_stated_and_five_per_cent_is_found(write_page: Callable[..., Path]) -> None:
    judge([one_run(seed) for seed in range(PAIRS)], write_page)


def judge(runs: Sequence[tuple[Comparison, Comparison, Comparison]], write_page: Callable[..., Path]) -> None:
    strict, usual, planted = zip(*runs, strict=True)
    ratios = [each.rows[0].judged[0].ratio for each in planted]
    per_cents = [100 * (ratio.value - 1) for ratio in ratios if ratio is not None]
    alarms = sum(any(one.word in ("REGRESSED", "IMPROVED") for one in each.rows[0].judged) for each in strict)
    called = sum(each.verdict == "REGRESSED" for each in usual)
    found = count(planted, "REGRESSED")
    rows = [
        ["the same", "0.0001 %", "any quantity called changed", str(alarms)],
        ["the same", f"{MARGIN:.0%}", "any quantity REGRESSED", str(called)],
        *(
            [
                ["the same", f"{MARGIN:.0%}", f"{q} SAME", str(n)]
                for q, n in zip(QUANTITIES, count(usual, "SAME"), strict=True)
            ]
        ),
        *(
            [
                ["5 % more work", f"{MARGIN:.0%}", f"{q} REGRESSED", str(n)]
                for q, n in zip(QUANTITIES, found, strict=True)
            ]
        ),
    ]
    low, high = np.quantile(per_cents, [0.05, 0.95])
    write_page(
        "compare",
        title="How often `dlops compare` cries wolf, and what it finds",
        says=(
            f"{PAIRS} runs, each of three loops in turns: `numpy.sin` over 1,000 numbers {PASSES} times, the same once "
            f"more, and {PASSES * 21 // 20} times, which is 5 % more work. {SECONDS_A_ROW:g} s a row, as "
            "`dlops compare` takes by default; in one process, on the same arrays: two processes of one artifact may "
            "differ by 1 % more. The first line has next to no margin, so that chance alone decides; "
            f"it may say {FALSE_ALARMS:.0%}. The median was found {np.median(per_cents):.1f} % slower, in nine of ten "
            f"runs {low:.1f} % to {high:.1f} %."
        ),
        header=["NEW is", "margin", "what was said", f"of {PAIRS} runs"],
        rows=rows,
    )
    allowed = PAIRS * FALSE_ALARMS + 3 * math.sqrt(PAIRS * FALSE_ALARMS * (1 - FALSE_ALARMS))
    assert alarms <= allowed
    assert called <= allowed
    assert found[QUANTITIES.index("p50")] >= 95
