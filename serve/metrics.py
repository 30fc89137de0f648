"""What the service counts, for Prometheus. Labels come from fixed sets: routes as templates, never paths as sent.

Counting is an addition to a cell, because a request of a small model is over in less time than prometheus_client takes
to count it; prometheus_client writes the text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dlops.console import say
from dlops.nvml import NvmlError
from dlops.serve.cells import Cells, Worker
from dlops.serve.gpu_metrics import GpuMetrics

if TYPE_CHECKING:
    from dlops.serve.model import ServedModel

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a small network on a CPU to a large one under load.
_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
)  # fmt: skip
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

Labels = tuple[str, ...]


class _Family:
    def __init__(self, cells: Cells, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._cells = cells
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self._places: dict[Labels, int] = {}

    def _place(self, labels: Labels, count: int = 1) -> int:
        place = self._places.get(labels)
        if place is None:
            if len(labels) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {self._labels}, not {labels}")
            place = self._places[labels] = self._cells.index(self._name, labels, count=count)
        return place

    def summed(self, workers: Iterable[Worker]) -> dict[Labels, list[int]]:
        """The cells of all those workers together, by labels."""
        sums: defaultdict[Labels, list[int]] = defaultdict(list)
        for worker in workers:
            for (name, labels), values in worker.values.items():
                if name == self._name:
                    sums[labels] = [a + b for a, b in zip(sums[labels] or [0] * len(values), values, strict=True)]
        return sums


class Counter(_Family):
    """Goes up."""

    def add(self, *labels: str, by: int = 1) -> None:
        self._cells.values[self._place(labels)] += by

    def metric(self, workers: Sequence[Worker]) -> Metric:
        """What all workers counted, those that have ended too."""
        metric = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, (value,) in self.summed(workers).items():
            metric.add_metric(labels, value)
        return metric


class Gauge(_Family):
    """Goes up and down; those of living workers are summed."""

    def __init__(self, cells: Cells, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(cells, name, text, labels)
        # Nothing of what a worker before this one had waits or runs any more.
        cells.clear(name)

    def set(self, *labels: str, to: int) -> None:
        self._cells.values[self._place(labels)] = to

    def metric(self, workers: Sequence[Worker]) -> Metric:
        metric = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, (value,) in self.summed(workers).items():
            metric.add_metric(labels, value)
        return metric

    def summed(self, workers: Iterable[Worker]) -> dict[Labels, list[int]]:
        return super().summed(worker for worker in workers if worker.lives)


class Presence(Gauge):
    """1 where any living worker says so: what is true of all of them is not a number to be summed."""

    def metric(self, workers: Sequence[Worker]) -> Metric:
        metric = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, (value,) in self.summed(workers).items():
            if value:
                metric.add_metric(labels, 1)
        return metric


class Histogram(_Family):
    """bounds: rising, in whole units of what is observed. unit: what one of them is in the text, 1e-9 for ns in s."""

    def __init__(
        self, cells: Cells, name: str, text: str, labels: Sequence[str] = (), *, bounds: Sequence[int],
        unit: float = 1,
    ) -> None:  # fmt: skip
        super().__init__(cells, name, text, labels)
        self.bounds = tuple(bounds)
        self._unit = unit

    def observe(self, *labels: str, value: int) -> None:
        # Beside a cell for each bound: one for what is above all of them, and the sum.
        count = len(self.bounds) + 2
        place = self._place(labels, count)
        cells = self._cells.values
        cells[place + bisect_left(self.bounds, value)] += 1
        cells[place + count - 1] += value

    def metric(self, workers: Sequence[Worker]) -> Metric:
        metric = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        ends = [*[f"{bound * self._unit:g}" for bound in self.bounds], "+Inf"]
        for labels, (*counts, total) in self.summed(workers).items():
            below, buckets = 0, []
            for end, found in zip(ends, counts, strict=True):
                below += found
                buckets.append((end, float(below)))
            metric.add_metric(labels, buckets, total * self._unit)
        return metric


class Metrics(Collector):
    """One set a process; `render` sums over all workers that share the cells' folder."""

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        seconds = tuple(round(bound * 1e9) for bound in _SECONDS)
        model = ("model",)
        self.requests = Counter(
            cells, "dlops_requests", "Requests answered; those that are for no model have none.",
            ("model", "route", "method", "status"),
        )  # fmt: skip
        self.seconds = Histogram(
            cells, "dlops_request_seconds", "Time of requests that were answered with a result, and its parts.",
            ("model", "route", "part"), bounds=seconds, unit=1e-9,
        )  # fmt: skip
        self.unread = Counter(
            cells, "dlops_unread_connections", "Connections dropped because the client took nothing of its answers."
        )
        self.crowded = Counter(
            cells, "dlops_crowded_connections", "Connections ended, or refused, because more were open than may be."
        )
        self.batch_rows = Histogram(cells, "dlops_batch_rows", "Rows in a run, padding apart.", model, bounds=_ROWS)
        self.padded_rows = Counter(cells, "dlops_padded_rows", "Rows that were run and nobody asked for.", model)
        self.batches = Counter(cells, "dlops_batches", "Runs, by why they began with no more rows.", (*model, "reason"))
        self.compute_seconds = Histogram(
            cells, "dlops_batch_compute_seconds", "Time of a run of the model.", model, bounds=seconds, unit=1e-9
        )
        self.queue_rows = Gauge(cells, "dlops_queue_rows", "Rows that wait.", model)
        self.busy_instances = Gauge(cells, "dlops_busy_instances", "Instances that run at this moment.", model)
        self.instances = Gauge(cells, "dlops_instances", "Instances that serve.", model)
        self.broken_instances = Gauge(cells, "dlops_broken_instances", "Instances that do not run any more.", model)
        self.ready = Gauge(cells, "dlops_ready", "Workers that passed their self-test and serve.")
        self.model = Presence(
            cells, "dlops_model_info", "What is served.",
            ("model", "version", "variant", "runtime", "provider", "device", "precision", "threads"),
        )  # fmt: skip
        self._shown: set[str] = set()
        self._knows_gpus = False
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def show_gpus(self) -> None:
        """From now on the machine's GPUs are among them, where NVML tells of those; else a line says why not."""
        if self._knows_gpus:
            return
        self._knows_gpus = True
        try:
            self._registry.register(GpuMetrics())
        except NvmlError as error:
            say(f"no metrics of the GPU: {error}")

    def show_load(self, models: Iterable[ServedModel]) -> None:
        """Say how full the queues of this worker's models are; versions of one name are summed."""
        loads: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for model in models:
            own = loads[model.name]
            own[0] += model.queue.rows_waiting
            own[1] += model.queue.busy_instances
            own[2] += sum(instance.is_broken for instance in model.instances)
        # Those that have gone hold nothing any more.
        for name, (rows, busy, broken) in {**dict.fromkeys(self._shown, (0, 0, 0)), **loads}.items():
            self.queue_rows.set(name, to=rows)
            self.busy_instances.set(name, to=busy)
            self.broken_instances.set(name, to=broken)
        self._shown = set(loads)

    def any_ready(self) -> bool:
        """Whether any living worker of the server serves."""
        return any(value for (value,) in self.ready.summed(self.cells.workers()).values())

    def collect(self) -> Iterator[Metric]:
        """One family after another, as prometheus_client asks for them."""
        workers = list(self.cells.workers())
        for family in vars(self).values():
            if isinstance(family, Counter | Gauge | Histogram):
                yield family.metric(workers)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)
