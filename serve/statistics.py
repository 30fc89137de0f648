"""What Triton's statistics extension reports of a model: counts and summed nanoseconds since the start."""

from __future__ import annotations

import time
from typing import Any

from dlops.serve.cells import Cells
from dlops.serve.outcome import BatchDone

_PARTS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
_NONE = {"count": 0, "ns": 0}


class Statistics:
    """Of one model and version, over all workers. Added to on the event loop only."""

    def __init__(self, cells: Cells, *, name: str, version: str) -> None:
        self._cells = cells
        self._name = name
        self._version = version
        self._parts = {part: self._pair("part", part) for part in _PARTS}
        self._rows = self._pair("total", "rows")
        self._runs = self._pair("total", "runs")
        self._last_ms = self._pair("last", "ms")
        self._batches: dict[int, int] = {}

    def add_success(self, *, rows: int, total_ns: int, queue_ns: int, compute_ns: int, input_ns: int) -> None:
        """One request that was answered. input_ns: decoding, and joining it with its batch."""
        values = self._cells.values
        values[self._rows] += rows
        values[self._last_ms] = time.time_ns() // 1_000_000
        parts = self._parts
        output_ns = total_ns - queue_ns - compute_ns - input_ns
        for place, ns in (
            (parts["success"], total_ns), (parts["queue"], queue_ns), (parts["compute_input"], input_ns),
            (parts["compute_infer"], compute_ns), (parts["compute_output"], max(0, output_ns)),
        ):  # fmt: skip
            values[place] += 1
            values[place + 1] += ns

    def add_failure(self, total_ns: int) -> None:
        """One request that was refused or failed."""
        self._cells.values[self._parts["fail"]] += 1
        self._cells.values[self._parts["fail"] + 1] += total_ns

    def add_batch(self, done: BatchDone) -> None:
        """One run of an instance."""
        values = self._cells.values
        values[self._runs] += 1
        place = self._batches.get(done.rows)
        if place is None:
            place = self._batches[done.rows] = self._pair("batch", str(done.rows))
        values[place] += 1
        values[place + 1] += done.compute_ns

    def as_json(self) -> dict[str, Any]:
        """This model's part of the answer to GET /v2/models/stats, with every key that perf_analyzer reads."""
        sums: dict[tuple[str, str], list[int]] = {}
        last_ms = 0
        for worker in self._cells.workers():
            for (kind, labels), values in worker.values.items():
                if kind != "statistics" or labels[:2] != (self._name, self._version):
                    continue
                group, what = labels[2:]
                if group == "last":
                    last_ms = max(last_ms, values[0])
                    continue
                so_far = sums.get((group, what), [0, 0])
                sums[group, what] = [so_far[0] + values[0], so_far[1] + values[1]]
        inference = {part: _pair_json(sums["part", part]) for part in _PARTS}
        batches = sorted((int(what), pair) for (group, what), pair in sums.items() if group == "batch")
        return {
            "name": self._name,
            "version": self._version,
            "last_inference": last_ms,
            "inference_count": sums["total", "rows"][0],
            "execution_count": sums["total", "runs"][0],
            "inference_stats": inference | {"cache_hit": _NONE, "cache_miss": _NONE},
            "response_stats": {},
            "batch_stats": [
                {"batch_size": rows, "compute_input": _NONE, "compute_infer": _pair_json(pair), "compute_output": _NONE}
                for rows, pair in batches
            ],
            "memory_usage": [],
        }

    def _pair(self, group: str, what: str) -> int:
        return self._cells.index("statistics", (self._name, self._version, group, what), count=2)


def _pair_json(pair: list[int]) -> dict[str, int]:
    return {"count": pair[0], "ns": pair[1]}
