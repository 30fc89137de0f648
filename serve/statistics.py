"""What Triton's statistics extension reports of a model: counts and summed nanoseconds since the start."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from dlops.serve.queue import BatchDone


@dataclass(slots=True)
class _Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class Statistics:
    """Of one worker process; touched on its event loop only."""

    _rows: int = 0
    _executions: int = 0
    _last_ms: int = 0
    _parts: defaultdict[str, _Duration] = field(default_factory=lambda: defaultdict(_Duration))
    _batches: defaultdict[int, _Duration] = field(default_factory=lambda: defaultdict(_Duration))

    def add_success(self, *, rows: int, total_ns: int, queue_ns: int, compute_ns: int, input_ns: int) -> None:
        """One request that was answered. input_ns: decoding, and joining it with its batch."""
        self._rows += rows
        self._last_ms = time.time_ns() // 1_000_000
        for part, ns in (
            ("success", total_ns), ("queue", queue_ns), ("compute_input", input_ns), ("compute_infer", compute_ns),
            ("compute_output", max(0, total_ns - queue_ns - compute_ns - input_ns)),
        ):  # fmt: skip
            self._parts[part].add(ns)

    def add_failure(self, total_ns: int) -> None:
        """One request that was refused or failed."""
        self._parts["fail"].add(total_ns)

    def add_batch(self, done: BatchDone) -> None:
        """One run of the session."""
        self._executions += 1
        self._batches[done.rows].add(done.compute_ns)

    def as_json(self, *, name: str, version: str) -> dict[str, Any]:
        """The answer to GET /v2/models/NAME/stats, with every key that perf_analyzer reads."""
        parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        none = _Duration().as_json()
        inference = {part: self._parts[part].as_json() for part in parts} | {"cache_hit": none, "cache_miss": none}
        batches = [
            {"batch_size": rows, "compute_input": none, "compute_infer": spent.as_json(), "compute_output": none}
            for rows, spent in sorted(self._batches.items())
        ]
        model = {
            "name": name,
            "version": version,
            "last_inference": self._last_ms,
            "inference_count": self._rows,
            "execution_count": self._executions,
            "inference_stats": inference,
            "response_stats": {},
            "batch_stats": batches,
            "memory_usage": [],
        }
        return {"model_stats": [model]}
