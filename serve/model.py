"""One artifact, loaded, tested on its own samples and ready to answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dlops.artifact import Artifact, newest_artifact, open_artifact
from dlops.environment import available_cores
from dlops.errors import UsageError
from dlops.parity import self_test
from dlops.runtimes import Placement, SessionOptions, open_session
from dlops.runtimes.session import Session
from dlops.serve.decoding import Decoder
from dlops.serve.queue import BatchDone, InferenceQueue
from dlops.serve.settings import Settings
from dlops.serve.statistics import Statistics
from dlops.signature import Feed, Signature
from dlops.tasks import open_task

_STORE = "bentoml:"
# What Triton calls the platforms whose files we serve; others go by our own name.
_PLATFORMS = {"onnx": "onnxruntime_onnx", "torchscript": "pytorch_libtorch"}


class ServedModel:
    """An artifact behind a queue. Made by `load_model`; `close` answers what waits and frees the session."""

    def __init__(
        self, artifact: Artifact, session: Session, settings: Settings, on_batch: Callable[[BatchDone], None]
    ) -> None:
        self.artifact = artifact
        self.signature: Signature = artifact.signature
        self.placement: Placement = session.placement
        self.statistics = Statistics()
        self.max_batch = min(settings.max_batch, artifact.signature.max_batch)
        self._session = session
        self._task = open_task(artifact.task)

        def count(done: BatchDone) -> None:
            self.statistics.add_batch(done)
            on_batch(done)

        self.queue = InferenceQueue(
            session,
            max_rows=settings.max_queue_rows,
            max_batch=self.max_batch,
            # Dynamic int8 takes its scale over the whole batch: a loud neighbour would move a sample's answer.
            batching=artifact.variant.precision != "int8dyn",
            on_batch=count,
        )
        self.decoder = Decoder(artifact, max_pixels=settings.max_pixels)

    @property
    def name(self) -> str:
        return self.artifact.name

    @property
    def version(self) -> str:
        return self.artifact.version

    @property
    def platform(self) -> str:
        return _PLATFORMS.get(self.artifact.variant.format, f"dlops_{self.artifact.variant.format}")

    def answers(self, outputs: Feed) -> list[dict[str, Any]]:
        """One JSON object a row, as the task puts it for a person."""
        return self._task.answer(outputs, labels=self.artifact.labels, top=5)

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

    def close(self) -> None:
        """Answer what waits, then free the session. Blocks until then."""
        self.queue.close()
        self.decoder.close()
        self._session.close()


def choose_artifact(settings: Settings) -> Artifact:
    """The artifact that the settings name, its digests checked; the newest under ./artifacts where they name none."""
    if settings.artifact is None:
        return newest_artifact()
    if not settings.artifact.startswith(_STORE):
        return open_artifact(settings.artifact)
    import bentoml
    from bentoml.exceptions import BentoMLException

    tag = settings.artifact.removeprefix(_STORE)
    try:
        return open_artifact(Path(bentoml.models.get(tag).path))
    except BentoMLException as error:
        raise UsageError(f"{tag}: not in BentoML's model store ({error})", hint="bentoml models list") from None


def load_model(
    artifact: Artifact, settings: Settings, *, on_batch: Callable[[BatchDone], None] = lambda done: None
) -> ServedModel:
    """Open a session, run the artifact's own samples through it, and warm it up. Blocks; takes seconds.

    Raises GateError where the samples give other outputs here than they should, MachineError where the device or
    package is missing.
    """
    threads = settings.threads or max(1, available_cores() // settings.workers)
    # Threads that spin while no request is there take the cores from whatever else the machine does.
    session = open_session(
        artifact, SessionOptions(device=settings.device, threads=threads, spin=False, trust=settings.trust)
    )
    try:
        self_test(artifact, session)
        _warm_up(session, min(settings.max_batch, artifact.signature.max_batch))
    except BaseException:
        session.close()
        raise
    return ServedModel(artifact, session, settings, on_batch)


def _warm_up(session: Session, max_batch: int) -> None:
    """Run the smallest and the largest batch, so that no request pays for the runtime's first allocation."""
    for rows in sorted({1, max_batch}):
        sizes = {name: limits.min for name, limits in session.signature.dims.items()} | {"batch": rows}
        session.run(
            {
                spec.name: np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape], spec.dtype)
                for spec in session.signature.inputs
            }
        )
