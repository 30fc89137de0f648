"""TensorBoard curves of a run, in its directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dlops.errors import missing_package
from dlops.train.run import CURVES_DIRECTORY


class Curves(Protocol):
    def add(self, step: int, **values: float) -> None: ...


@contextmanager
def open_curves(directory: Path, *, from_epoch: int, enabled: bool) -> Iterator[Curves]:
    """Curves under `directory`/tensorboard; what an earlier attempt wrote from `from_epoch` on is hidden.

    enabled: of several processes only the first writes.
    """
    if not enabled:
        yield _NoCurves()
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise missing_package("tensorboard", extra="train", needed_for="training curves") from None
    writer = SummaryWriter(str(directory / CURVES_DIRECTORY), purge_step=from_epoch or None)
    try:
        yield _TensorBoard(writer)
    finally:
        writer.close()


class _NoCurves:
    def add(self, step: int, **values: float) -> None:
        """Nothing: another process writes them."""


class _TensorBoard:
    def __init__(self, writer: object) -> None:
        self._writer = writer

    def add(self, step: int, **values: float) -> None:
        """One point a name at `step`; `train_loss` becomes the curve `train/loss`."""
        for name, value in values.items():
            self._writer.add_scalar(name.replace("_", "/", 1), value, step)  # type: ignore[attr-defined]
