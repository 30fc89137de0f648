"""Which rows of two reports measured the same, and what else differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dlops.bench import cells
from dlops.environment import Environment
from dlops.report import Measurement

ONLY_IN_BASE = "only in BASE"


def match_rows(
    base: Sequence[Measurement], new: Sequence[Measurement]
) -> tuple[list[tuple[Measurement, Measurement]], list[str]]:
    """Pairs in BASE's order, and a line for each row without a partner.

    Of several alike, those of one target and as many threads go first, then those of one target.
    """
    left, pairs, unmatched = list(new), [], []
    waiting = list(base)
    closer: tuple[Callable[[Measurement], object], ...] = (
        lambda row: (row.target, row.threads),
        lambda row: row.target,
        lambda row: None,
    )
    for same in closer:
        rows, waiting = waiting, []
        for row in rows:
            alike = [one for one in left if _are_of_one_load(one, row) and same(one) == same(row)]
            if alike:
                left.remove(alike[0])
                pairs.append((row, alike[0]))
            else:
                waiting.append(row)
    order = {row.samples: place for place, row in enumerate(base)}
    unmatched = [f"{ONLY_IN_BASE}: {_described(row)}" for row in waiting]
    unmatched += [f"only in NEW: {_described(row)}" for row in left]
    return sorted(pairs, key=lambda pair: order[pair[0].samples]), unmatched


def row_differences(base: Measurement, new: Measurement) -> list[str]:
    """A line for each thing that two matched rows do not share."""
    lines = []
    if base.threads != new.threads:
        lines.append(f"threads of {cells.name(base)}: {base.threads} in BASE, {new.threads} in NEW")
    if base.served_by and new.served_by and base.served_by != new.served_by:
        lines.append(f"{cells.name(base)} was served by {base.served_by} in BASE, by {new.served_by} in NEW")
    if base.target != new.target:
        lines.append(f"{cells.name(base)} is {base.target} in BASE, {new.target} in NEW")
    return lines


def environment_differences(base: Environment, new: Environment) -> list[str]:
    """A line for each thing that is not the same: the machine, its cores, an installed version."""
    lines = []
    for name in Environment.model_fields:
        one, other = getattr(base, name), getattr(new, name)
        if name == "packages":
            names = sorted(package for package in one.keys() | other.keys() if one.get(package) != other.get(package))
            lines += [f"{each}: {one.get(each, 'none')} in BASE, {other.get(each, 'none')} in NEW" for each in names]
        elif one != other:
            lines.append(f"{name.replace('_', ' ')}: {_shown(one)} in BASE, {_shown(other)} in NEW")
    return lines


def _key(row: Measurement) -> tuple[object, ...]:
    load = row.load
    what = row.artifact or row.target
    # What the scenario is called follows from these.
    return (
        what, row.engine, row.runtime, row.provider, row.boundary, load.batch, load.concurrency, load.rate,
    )  # fmt: skip


def _are_of_one_load(one: Measurement, other: Measurement) -> bool:
    """Older reports do not say how requests came: those are taken for the same."""
    if _key(one) != _key(other):
        return False
    loads = (one.load, other.load)
    if any(load.arrivals is None for load in loads):
        return True
    return len({(load.arrivals, load.pauses_s, load.trace) for load in loads}) == 1


def _described(row: Measurement) -> str:
    rate = f", {cells.offered(row.load)}" if row.load.rate is not None else ""
    return (
        f"{row.target} ({row.artifact or row.precision}, {row.runtime} on {row.provider}), {row.boundary}, "
        f"{row.load.scenario}, batch {row.load.batch}, {row.load.concurrency} in flight{rate}"
    )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
