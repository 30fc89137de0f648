"""One artifact, loaded, tested on its own samples and ready to answer."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from dlops.artifact import Artifact
from dlops.console import say
from dlops.environment import available_cores
from dlops.errors import InputError
from dlops.parity import self_test
from dlops.runtimes import Placement, SessionOptions, open_session
from dlops.runtimes.session import Session
from dlops.serve.codec import Codec
from dlops.serve.decoding import Decoder
from dlops.serve.instance import Instance, Renew, bucket_sizes, zeros
from dlops.serve.jpeg import JpegDecoder, jpeg_decoder
from dlops.serve.metadata import model_config, model_metadata
from dlops.serve.metrics import Metrics
from dlops.serve.outcome import BatchDone
from dlops.serve.queue import InferenceQueue
from dlops.serve.raws import RawInput
from dlops.serve.repository import Entry, open_entry
from dlops.serve.settings import Settings
from dlops.serve.statistics import Statistics
from dlops.signature import Feed, Signature
from dlops.tasks import open_task

# A run of so little holds up the other requests for no longer than handing it to a thread and back would.
_INLINE_NS = 300_000
_TIMED = 7
# That may wait where no setting says how many.
_QUEUE_ROWS, _QUEUE_REQUESTS = 1024, 64
# ONNX's control flow, and what gives outputs of a size that its input decides.
_DATA_DEPENDENT = frozenset(
    ("Loop", "Scan", "If", "NonZero", "Unique", "NonMaxSuppression", "Compress", "Range", "Expand")
)
# What Triton calls the platforms whose files we serve; others go by our own name.
_PLATFORMS = {"onnx": "onnxruntime_onnx", "torchscript": "pytorch_libtorch"}


class ServedModel:
    """An artifact behind a queue. Made by `load_model`; `close` answers what waits and frees the sessions.

    sessions: of this artifact, one an instance. name, version: what it is called here, its own where they are left
    out. inline: the one instance runs on the event loop. renew: as Instance has it. jpeg: as Decoder has it.
    """

    def __init__(
        self, artifact: Artifact, sessions: Sequence[Session], settings: Settings,
        metrics: Metrics, *, name: str | None = None, version: str | None = None, inline: bool = False,
        renew: Renew | None = None, jpeg: JpegDecoder | None = None,
    ) -> None:  # fmt: skip
        self.artifact = artifact
        self.name = artifact.name if name is None else name
        self.version = artifact.version if version is None else version
        self._users = 0
        self._unused: asyncio.Event | None = None
        self._metrics = metrics
        self.signature: Signature = artifact.signature
        self.placement: Placement = sessions[0].placement
        self.statistics = Statistics(metrics.cells, name=self.name, version=self.version)
        self.max_batch = min(settings.max_batch, artifact.signature.max_batch)
        self.inline = inline
        self._settings = settings
        self._buckets = bucket_sizes(self.max_batch) if settings.cuda_graphs else ()
        self.instances = [Instance(session, buckets=self._buckets, renew=renew) for session in sessions]
        self._task = open_task(artifact.task)

        def count(done: BatchDone) -> None:
            self.statistics.add_batch(done)
            metrics.batch_rows.observe(self.name, value=done.rows)
            metrics.compute_seconds.observe(self.name, value=done.compute_ns)
            metrics.batches.add(self.name, done.reason)
            if done.padded_rows:
                metrics.padded_rows.add(self.name, by=done.padded_rows)

        self.queue = InferenceQueue(
            self.instances,
            max_rows=settings.max_queue_rows or max(_QUEUE_ROWS, _QUEUE_REQUESTS * artifact.signature.max_batch),
            max_bytes=settings.max_queue_bytes,
            max_wait_ns=round(settings.max_wait_s * 1e9),
            max_batch=self.max_batch,
            delay_ns=settings.queue_delay_us * 1000,
            inline=inline,
            # Dynamic int8 takes its scale over the whole batch: a loud neighbour would move a sample's answer.
            batching=artifact.variant.precision != "int8dyn",
            on_batch=count,
        )
        self.raw_input = RawInput.of(artifact)
        self.codec = Codec(
            self.signature, name=self.name, version=self.version, labels=artifact.labels,
            max_bytes=settings.max_response_bytes, raw_input=self.raw_input,
        )  # fmt: skip
        self.decoder = Decoder(artifact, max_pixels=settings.max_pixels, jpeg=jpeg)

    @property
    def title(self) -> str:
        return f"{self.name} version {self.version}"

    @property
    def platform(self) -> str:
        return _PLATFORMS.get(self.artifact.variant.format, f"dlops_{self.artifact.variant.format}")

    async def preprocessed(self, raws: Sequence[Any], *, deadline_ns: int | None) -> Feed:
        """The input made of raw rows, for which there is room in the queue meanwhile. Raises as Decoder.decode does."""
        with self.queue.expecting(len(raws)):
            return await self.decoder.decode(list(raws), deadline_ns=deadline_ns)

    def answers(self, outputs: Feed) -> list[dict[str, Any]]:
        """One JSON object a row, as the task puts it for a person."""
        return self._task.answer(outputs, labels=self.artifact.labels, top=5)

    def check_size(self, size: int) -> None:
        """Raise InputError where an answer of `/predict` has more bytes than the server sends."""
        if size > self._settings.max_response_bytes:
            raise InputError(
                f"the answer would have some {size} bytes, at most {self._settings.max_response_bytes} are sent",
                field="inputs", hint="send fewer inputs in a request",
            )  # fmt: skip

    def metadata(self) -> dict[str, Any]:
        """As the protocol has it."""
        return model_metadata(self.signature, name=self.name, version=self.version, platform=self.platform)

    def config(self) -> dict[str, Any]:
        """As Triton has it."""
        largest, settings = self.signature.max_batch, self._settings
        # A request may have more rows than are joined.
        sizes = self._buckets or ((self.max_batch,) if self.max_batch < largest else ())
        return model_config(
            self.signature, name=self.name, platform=self.platform, device=self.placement.device,
            max_batch=largest if self.queue.batching else 0, instances=len(self.instances) * settings.workers,
            versions=settings.versions, batch_sizes=sizes, queue_delay_us=settings.queue_delay_us,
        )  # fmt: skip

    def describe(self) -> dict[str, str]:
        """What is served and where, as text."""
        return {
            "model": self.name,
            "version": self.version,
            "variant": self.artifact.slug,
            "runtime": self.placement.runtime,
            "provider": self.placement.provider,
            "device": self.placement.device,
            "precision": self.placement.precision,
            "threads": str(self.placement.threads),
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """For as long as a request goes on that is to be answered by this model: until then `retire` waits."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def hold(self) -> None:
        """As `used` at its beginning, and `release` as at its end."""
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._unused is not None and not self._users:
            self._unused.set()

    async def retire(self) -> None:
        """Close once the last request that came to this model is answered. No new ones may come from here on."""
        if self._users:
            self._unused = asyncio.Event()
            await self._unused.wait()
        await asyncio.to_thread(self.close)

    def summary(self) -> str:
        """What is served and where, in a line."""
        placement = self.placement
        return (
            f"{self.title} ({self.artifact.slug}) on {placement.provider} ({placement.runtime}, "
            f"{placement.precision}, {placement.threads} threads)"
        )

    def close(self) -> None:
        """Answer what waits, then free the sessions. Blocks until then; not on the event loop."""
        self.queue.close()
        self.decoder.close()
        for instance in self.instances:
            instance.close()


def load_model(entry: Entry, settings: Settings, metrics: Metrics) -> ServedModel:
    """Open a session an instance, run the artifact's own samples through each, and warm it up. Blocks; takes seconds.

    Raises GateError where the samples give other outputs here than they should, MachineError where the device or
    package is missing, UsageError where the artifact's files are not what they should be.
    """
    artifact = open_entry(entry)
    sessions: list[Session] = []
    try:
        sessions.append(_open(artifact, settings, count=settings.instances or 1))
        # Two on a GPU, so that one copies while the other computes.
        is_gpu = sessions[0].placement.device.startswith("cuda")
        count = settings.instances or (2 if is_gpu else 1)
        if is_gpu:
            metrics.show_gpus()
        while len(sessions) < count:
            sessions.append(_open(artifact, settings, count=count))
        jpeg = None
        if settings.jpeg_decoder == "nvjpeg":
            jpeg = jpeg_decoder(artifact, device=sessions[0].placement.device)
        max_batch = min(settings.max_batch, artifact.signature.max_batch)
        for session in sessions:
            self_test(artifact, session)
            _warm_up(session, max_batch)
        # A request may have all the rows that the artifact allows, and runs whole.
        inline = count == 1 and settings.queue_delay_us == 0 and _is_quick(sessions[0], artifact.signature.max_batch)
        return ServedModel(
            artifact, sessions, settings, metrics, name=entry.name, version=entry.version, inline=inline,
            renew=partial(_renewed, artifact, settings, count), jpeg=jpeg,
        )  # fmt: skip
    except BaseException:
        for session in sessions:
            session.close()
        raise


def _renewed(artifact: Artifact, settings: Settings, count: int, session: Session) -> Session:
    """The session where it runs; else it is closed, and one opened anew that passes the self-test. Raises what that
    raises."""
    try:
        session.run(zeros(session.signature, 1))
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises
        say(f"{artifact.title}: a session no longer runs ({type(error).__name__}: {error}); opening it anew")
    else:
        return session
    # Before the new one: a GPU may have no memory for both.
    with suppress(Exception):
        session.close()
    fresh = _open(artifact, settings, count=count)
    try:
        self_test(artifact, fresh)
        _warm_up(fresh, min(settings.max_batch, artifact.signature.max_batch))
    except BaseException:
        fresh.close()
        raise
    say(f"{artifact.title}: opened anew, self-test passed")
    return fresh


def _open(artifact: Artifact, settings: Settings, *, count: int) -> Session:
    threads = settings.threads or max(1, available_cores() // (settings.workers * count))
    # Threads that spin while no request is there take the cores from whatever else the machine does.
    options = SessionOptions(
        device=settings.device, threads=threads, spin=False, trust=settings.trust, cuda_graph=settings.cuda_graphs
    )
    return open_session(artifact, options)


def _warm_up(session: Session, max_batch: int) -> None:
    """Run the smallest and the largest batch, so that no request pays for the runtime's first allocation."""
    for rows in sorted({1, max_batch}):
        session.run(zeros(session.signature, rows))


def _is_quick(session: Session, max_batch: int) -> bool:
    """Whether the largest batch is done before a thread would have begun it: then it may run on the event loop.

    Not where a batch may take longer than the one that was timed: rows may grow, or a loop depend on what is in them.
    """
    operators = session.placement.nodes.get("CPUExecutionProvider", {})
    if session.placement.device != "cpu" or any(name != "batch" for name in session.signature.dims):
        return False
    # A runtime that does not tell its operators may have any.
    if not operators or not _DATA_DEPENDENT.isdisjoint(operators):
        return False
    feed = zeros(session.signature, max_batch)
    taken = []
    for _ in range(_TIMED):
        began_ns = time.perf_counter_ns()
        session.run(feed)
        taken.append(time.perf_counter_ns() - began_ns)
    return statistics.median(taken) <= _INLINE_NS
