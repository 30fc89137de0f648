"""What the service counts, for Prometheus. Labels come from fixed sets: routes as templates, never paths as sent."""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a small network on a CPU to a large one under load.
_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
)  # fmt: skip
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """One set a process. With PROMETHEUS_MULTIPROC_DIR set, `render` sums over the worker processes."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self.requests = Counter(
            "dlops_requests", "Requests answered.", ("route", "method", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "dlops_request_seconds",
            "Time of requests that were answered with a result, and its parts.",
            ("route", "part"),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch_rows = Histogram("dlops_batch_rows", "Rows in a run.", buckets=_ROWS, registry=self._registry)
        self.compute_seconds = Histogram(
            "dlops_batch_compute_seconds", "Time of a run of the model.", buckets=_SECONDS, registry=self._registry
        )
        self.queue_rows = Gauge(
            "dlops_queue_rows", "Rows that wait.", registry=self._registry, multiprocess_mode="livesum"
        )
        self.ready = Gauge(
            "dlops_ready", "Workers that passed their self-test and serve.", registry=self._registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        if not self._shared:  # prometheus_client has no Info over several processes
            self._model = Info("dlops_model", "What is served.", registry=self._registry)

    def describe(self, labels: dict[str, str]) -> None:
        """Say what is served, as labels of one sample."""
        if not self._shared:
            self._model.info(labels)

    def render(self) -> bytes:
        """The exposition text."""
        if not self._shared:
            return generate_latest(self._registry)
        summed = CollectorRegistry()
        MultiProcessCollector(summed)  # type: ignore[no-untyped-call]
        return generate_latest(summed)
