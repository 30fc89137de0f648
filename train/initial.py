"""What a fine-tuning starts from: a checkpoint's network and weights, and its preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.errors import UsageError
from dlops.samples import Samples
from dlops.train.images import Images, spatial
from dlops.train.optimizers import LEARNING_RATES, OptimizerName

# A trained network is near its goal: at the full rate it would first leave it.
FINE_TUNING = 0.1


def open_initial(path: str) -> Checkpoint:
    """The checkpoint at `path`. Raises UsageError where no recipe can train its network."""
    initial = load_checkpoint(Path(path))
    if initial.spec.builder is None:
        whose = initial.spec.source or "a module of your own"
        raise UsageError(
            f"{path}: it holds the weights of {whose}, whose code no recipe has",
            hint="a checkpoint of a recipe, or of torchvision: or timm:, can be fine-tuned",
        )
    return initial


def as_initial_knows(initial: Checkpoint, images: Images) -> Images:
    """The images normalized as its network knows them.

    Raises UsageError where its classes, or size and colour of its images, are others than the data's.
    """
    path, spec = initial.directory, initial.spec
    if spec.labels != images.data.labels:
        raise UsageError(
            f"{path}: {initial.name} tells {_shown(spec.labels)} apart, {images.data.name} has "
            f"{_shown(images.data.labels)}",
            hint="fine-tune on data of the same classes",
        )
    if spec.preprocess is None or spatial(spec.preprocess.steps) != spatial(images.preprocess.steps):
        raise UsageError(
            f"{path}: {initial.name} takes images decoded or resized otherwise than {images.data.name} is here",
            hint="leave out image_size and channels: they are its own",
        )
    return replace(images, preprocess=spec.preprocess)


def fine_tuning_rate(optimizer: OptimizerName) -> float:
    """The peak learning rate where none is set: a tenth of what training from random weights takes."""
    return FINE_TUNING * LEARNING_RATES[optimizer]


def with_dense_answers(evaluation: Samples, initial: Checkpoint) -> Samples:
    """The evaluation samples with what the dense model answered to them, where `initial` is a pruned one of it.

    Raises UsageError where the dense model was asked about other samples.
    """
    if initial.dense is None:
        return evaluation
    answered = initial.samples("evaluation")
    assert answered is not None
    if answered.fingerprints() != evaluation.fingerprints():
        raise UsageError(
            f"{initial.directory}: its evaluation samples are others than this data's, so what is lost against the "
            f"dense {initial.dense.name} could not be told",
            hint="fine-tune it on the data of the dense checkpoint, with its split_seed",
        )
    return replace(evaluation, outputs=answered.outputs)


def _shown(labels: Sequence[str]) -> str:
    return f"{len(labels)} classes ({', '.join(labels[:3])}{', …' if len(labels) > 3 else ''})"
