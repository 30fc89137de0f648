"""What the settings that a config leaves to the data become, once the data is known.

A thousand digits and fifty thousand photos want different batches, epochs and augmentation; naming the data alone must
be enough for a sensible run.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, JsonValue

from dlops.console import say
from dlops.errors import UsageError
from dlops.train.augment import Augmentation
from dlops.train.images import Images
from dlops.train.optimizers import LEARNING_RATES, WEIGHT_DECAYS, OptimizerName

# About what a small network needs to see to converge; fewer images are seen more often, within limits.
_IMAGES_SEEN = 600_000
_EPOCHS = (12, 60)
# Steps an epoch below which small sets would hardly move, and above which small batches only cost time.
_STEPS_PER_EPOCH = 40
_BATCHES = (16, 128)
# Below this many images a network memorizes them unless each epoch shows them differently.
_FEW_IMAGES = 10_000
# Batch norm takes its statistics over them.
MIN_PER_PROCESS = 2


class Plan(BaseModel):
    """A config's open settings, decided. learning_rate is the peak."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    augmentation: Augmentation

    def steps_per_epoch(self, images: int) -> int:
        return max(1, images // self.batch_size)


def as_run(config: Mapping[str, JsonValue], plan: Plan) -> dict[str, JsonValue]:
    """The config with the plan's values in place of its open settings: what a checkpoint records."""
    decided = plan.model_dump(mode="json")
    decided |= decided.pop("augmentation")
    return {key: decided.get(key, value) for key, value in config.items()}


def check_batch_size(batch_size: int | None, *, devices: int) -> None:
    """Raise UsageError where it leaves a process with too few images for batch norm. None is chosen to fit."""
    if batch_size is not None and batch_size // devices < MIN_PER_PROCESS:
        raise UsageError(
            f"a batch of {batch_size} is too small for {devices} processes: batch norm needs two images a process",
            hint=f"--set batch_size={MIN_PER_PROCESS * devices} or more, or train with fewer devices",
        )


def plan_for(
    images: Images,
    *,
    epochs: int | None,
    batch_size: int | None,
    devices: int,
    optimizer: OptimizerName,
    lr: float | None,
    weight_decay: float | None,
    flip: bool | None,
    crop: float,
    rotation: float | None,
    zoom: float | None,
) -> Plan:
    """The plan, announced in one line. A value that is given stays as it is."""
    count = len(images.train)
    few = count < _FEW_IMAGES
    plan = Plan(
        epochs=epochs or min(max(round(_IMAGES_SEEN / count), _EPOCHS[0]), _EPOCHS[1]),
        batch_size=batch_size or _batch_size(count, devices),
        lr=LEARNING_RATES[optimizer] if lr is None else lr,
        weight_decay=WEIGHT_DECAYS[optimizer] if weight_decay is None else weight_decay,
        augmentation=Augmentation(
            # Photos can be mirrored; digits, letters and most scans, which are grey, cannot.
            flip=images.shape[0] == 3 if flip is None else flip,
            crop=crop,
            rotation=(10.0 if few else 0.0) if rotation is None else rotation,
            zoom=(0.1 if few else 0.0) if zoom is None else zoom,
        ),
    )
    settings = plan.augmentation
    say(
        f"{images.data.name}: {count} training, {len(images.validation)} validation, {len(images.test)} test images "
        f"of {'×'.join(str(n) for n in images.shape)} in {images.classes} classes"
        + (f"; {images.data.duplicates_dropped} duplicates dropped" if images.data.duplicates_dropped else "")
    )
    say(
        f"{plan.epochs} epochs of {plan.steps_per_epoch(count)} batches of {plan.batch_size}, {optimizer} at "
        f"{plan.lr:g}; flip {'on' if settings.flip else 'off'}, crop {settings.crop:g}, "
        f"rotation {settings.rotation:g}°, zoom {settings.zoom:g}"
    )
    return plan


def _batch_size(count: int, devices: int) -> int:
    """A power of two, so that it divides among devices as they usually come; else the next multiple of theirs."""
    size = _BATCHES[0]
    while size * 2 <= _BATCHES[1] and count / (size * 2) >= _STEPS_PER_EPOCH * 0.75:
        size *= 2
    size = max(size, 2 * devices)
    return -(-size // devices) * devices
