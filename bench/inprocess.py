"""Artifacts and the eager module measured in this process, in turns, from numpy arrays to numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from dlops.artifact import Artifact
from dlops.bench import stats
from dlops.bench.payload import artifact_feeds, check_fits, random_feed
from dlops.checkpoint import Checkpoint
from dlops.errors import missing_package
from dlops.report import Interval, Load, Measurement, Verdict
from dlops.runtimes import Session, SessionOptions, open_session
from dlops.signature import Feed
from dlops.timing import MIN_ROUNDS, Interleaved, Timed, interleave

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

EAGER = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """One target ready to run. artifact is None for the eager module."""

    target: str
    artifact: Artifact | None
    session: Session


@contextmanager
def opened_targets(
    artifacts: Sequence[Artifact],
    *,
    checkpoint: Checkpoint | None,
    model: ModuleSource | None,
    options: SessionOptions,
) -> Iterator[list[Opened]]:
    """Sessions for all, the eager module first where a checkpoint is given; closed at the end.

    Raises MachineError in one line where torch or a runtime is missing.
    """
    opened: list[Opened] = []
    try:
        if checkpoint is not None:
            opened.append(Opened(target=EAGER, artifact=None, session=_open_eager(checkpoint, model, options)))
        for name, artifact in zip(distinct([artifact.title for artifact in artifacts]), artifacts, strict=True):
            opened.append(Opened(target=name, artifact=artifact, session=open_session(artifact, options)))
        yield opened
    finally:
        for one in opened:
            one.session.close()


def feeds_for(opened: Sequence[Opened], batch: int) -> list[Feed]:
    """The same feeds for all targets: the first artifact's samples, or random where only eager is measured."""
    artifact = next((one.artifact for one in opened if one.artifact is not None), None)
    if artifact is None:
        feeds: list[Feed] = [random_feed(opened[0].session.signature, batch)]
    else:
        feeds = artifact_feeds(artifact, batch)
    for one in opened:
        check_fits(feeds, one.session.signature, where=one.target)
    return feeds


def time_targets(
    opened: Sequence[Opened],
    feeds: Sequence[Feed],
    *,
    duration_s: float,
    on_progress: Callable[[float], None] | None = None,
) -> Interleaved:
    """All targets in turns within one run, `duration_s` for each. Raises TimingInterrupted on Ctrl-C."""
    runs = {one.target: _caller(one.session, feeds) for one in opened}
    warmup_s = max(2.0, duration_s)
    return interleave(runs, budget_s=duration_s * len(runs), max_warmup_s=warmup_s, on_progress=on_progress)


def measurements(
    opened: Sequence[Opened], timed: Interleaved, *, batch: int, baseline: str | None, keys: Sequence[str],
    interrupted: bool = False,
) -> list[Measurement]:  # fmt: skip
    """One row a target, with its speed-up over the baseline from the pairs of turns. interrupted: by Ctrl-C."""
    reference = next((one.artifact.accuracy for one in opened if one.artifact and one.artifact.accuracy), None)
    base_turns = timed.runs[baseline].by_turn() if baseline is not None else None
    rows = []
    for key, one in zip(keys, opened, strict=True):
        run = timed.runs[one.target]
        turns = run.by_turn()
        placement = one.session.placement
        latency = stats.summarize(run.latencies_ns, turns=run.turns)
        fields = accuracy_fields(one.artifact) if one.artifact else {}
        if one.artifact is None and reference is not None:
            # What the artifacts were compared with is the dense checkpoint, run eagerly.
            fields = {"accuracy": reference.reference, "accuracy_samples": reference.samples, "drop_points": 0.0}
        rows.append(
            Measurement(
                target=one.target,
                artifact=one.artifact.slug if one.artifact else None,
                runtime=placement.runtime,
                provider=placement.provider,
                device=placement.device,
                precision=placement.precision,
                threads=placement.threads,
                boundary="host",
                load=Load(scenario="single_stream" if batch == 1 else "offline", batch=batch),
                samples=key,
                latency=latency,
                throughput=_throughput(turns, batch),
                speedup=None if base_turns is None else stats.ratio_interval(base_turns, turns),
                warmup_calls=run.warmup_calls,
                model_bytes=one.artifact.model_bytes if one.artifact else None,
                verdict=judge(run, interrupted=interrupted),
                **fields,
            )
        )
    return rows


def accuracy_fields(artifact: Artifact) -> dict[str, float | int]:
    """The accuracy that export recorded, as a row's fields; none where it recorded none."""
    accuracy = artifact.accuracy
    if accuracy is None:
        return {}
    return {
        "accuracy": accuracy.value, "accuracy_samples": accuracy.samples, "drop_points": accuracy.drop_points,
        "drop_low": accuracy.drop_low, "drop_high": accuracy.drop_high, "flips": accuracy.flips,
    }  # fmt: skip


def judge(run: Timed, *, interrupted: bool = False) -> Verdict:
    """Whether a row can be quoted, and why not. A run that was cut short never can."""
    medians = [float(np.median(turn)) for turn in run.by_turn()]
    against = []
    if interrupted:
        against.append("interrupted")
    if len(medians) < MIN_ROUNDS:
        against.append(f"only {len(medians)} rounds: fewer than {MIN_ROUNDS} show neither drift nor spread")
    if not run.warmed_up:
        against.append(f"not steady: latency was still moving when the warm-up ended ({run.warmup_calls} calls)")
    trend = stats.drift(medians)
    if trend.matters:
        against.append(f"not steady: the median moved by {trend.change:+.0%} over the run")
    wide = stats.spread(medians)
    if wide > stats.MAX_SPREAD:
        against.append(f"not steady: the medians of turns vary by {wide:.0%}; something else used the machine")
    return Verdict(steady=not against, reasons=(*against, *undersampled(run.latencies_ns, run.turns)))


def undersampled(latencies_ns: stats.Integers, turns: stats.Integers) -> list[str]:
    """Which quantiles the sample does not certify, with what it would need."""
    reasons = []
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        if stats.quantile_interval(latencies_ns, q, turns=turns) is None:
            have, need = stats.effective_samples(latencies_ns, q, turns=turns), stats.fewest_samples(q)
            reasons.append(f"{name} is not certified: {have} effective samples of {len(latencies_ns)}, it needs {need}")
    return reasons


def _throughput(turns: Sequence[stats.Integers], batch: int) -> Interval:
    counts = np.array([batch * len(turn) for turn in turns], np.int64)
    return stats.rate_interval(counts, np.array([turn.sum() / 1e9 for turn in turns]))


def _caller(session: Session, feeds: Sequence[Feed]) -> Callable[[], object]:
    endless = cycle(feeds)
    return lambda: session.run(next(endless))


def _open_eager(checkpoint: Checkpoint, model: ModuleSource | None, options: SessionOptions) -> Session:
    try:
        from dlops.runtimes.eager import open_eager
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise missing_package("torch", extra="export", needed_for="the eager baseline") from None
    return open_eager(checkpoint.build_module(model), checkpoint.signature, options)


def distinct(titles: Sequence[str]) -> list[str]:
    """The titles, a repeated one numbered: measuring one artifact twice shows what chance alone does."""
    seen: dict[str, int] = {}
    names = []
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
        names.append(title if seen[title] == 1 else f"{title}#{seen[title]}")
    return names
