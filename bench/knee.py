"""Where a service is best used: the knee of its latency over its throughput."""

from __future__ import annotations

from collections.abc import Sequence

from dlops.report import Measurement

# Fewer loads have no inside.
_FEWEST = 3


def knee(rows: Sequence[Measurement]) -> Measurement | None:
    """Of one service's rows, from the lightest load to the heaviest, the one with the most "power".

    That is throughput over mean response time (Kleinrock 1979): below it throughput grows faster than the time does,
    beyond it slower.

    A load that was tried twice counts once, by its last row, and one at which the client was the limit not at all.

    None where that is the first or the last: then the knee lies outside of what was tried.
    """
    rows = list({row.load: row for row in rows if not _is_client_bound(row)}.values())
    if len(rows) < _FEWEST:
        return None
    power = [row.throughput.value / row.latency.mean_ns if row.latency.mean_ns else 0.0 for row in rows]
    best = power.index(max(power))
    return rows[best] if 0 < best < len(rows) - 1 else None


def _is_client_bound(row: Measurement) -> bool:
    return any(reason.startswith("client-bound") for reason in row.verdict.reasons)
