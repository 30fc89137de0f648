"""From a trained network to the run's checkpoint: metrics on test, and the samples that travel with it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn

from dlops.checkpoint import Checkpoint
from dlops.console import say
from dlops.samples import MAX_SAMPLES, MAX_SAMPLES_BYTES, Samples
from dlops.saving import save_checkpoint
from dlops.train.batches import evaluation_batches
from dlops.train.data.dataset import Split
from dlops.train.evaluation import BATCH_SIZE, evaluate
from dlops.train.images import Images
from dlops.train.initial import with_dense_answers
from dlops.train.run import Run, State

# Static ranges of int8 settle within hundreds of images, and recovery after pruning profits from thousands.
MAX_CALIBRATION = 4_096
MAX_CALIBRATION_BYTES = 48 * 1024 * 1024


def write_checkpoint(
    network: nn.Module,
    *,
    images: Images,
    state: State,
    run: Run,
    device: torch.device,
    name: str,
    builder: str | None,
    kwargs: Mapping[str, JsonValue],
    config: Mapping[str, JsonValue],
    seed: int,
    initial: Checkpoint | None = None,
) -> Checkpoint:
    """Load the best epoch's weights into `network`, measure it on test, write the checkpoint, drop the resume state.

    name: of the checkpoint. builder, kwargs: what built the network. initial: what it was fine-tuned from; of a pruned
    one the record, and the dense model's answers, go on into this one.
    """
    network.load_state_dict(state.best_weights)
    # In the layout that everyone else builds it in.
    network.to(memory_format=torch.contiguous_format)
    batches = evaluation_batches(images.test, preprocess=images.preprocess, batch_size=BATCH_SIZE)
    scores = evaluate(network, batches, classes=images.classes, device=device)
    data = images.data
    metrics: dict[str, JsonValue] = {
        "accuracy": scores.accuracy,
        "test": scores.as_json(data.labels),
        "validation": {"accuracy": state.best_rank[0], "loss": -state.best_rank[1], "samples": len(data.validation)},
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "stopped_early": state.stopped_early,
        "train_samples": len(data.train),
        "duplicates_dropped": data.duplicates_dropped,
        "corrupt_skipped": len(data.skipped),
    }
    evaluation = chosen_samples(data.test, MAX_SAMPLES, MAX_SAMPLES_BYTES)
    checkpoint = save_checkpoint(
        network.cpu(),
        run.directory,
        evaluation=evaluation if initial is None else with_dense_answers(evaluation, initial),
        calibration=chosen_samples(data.train, MAX_CALIBRATION, MAX_CALIBRATION_BYTES),
        labels=data.labels,
        preprocess=images.preprocess,
        name=name,
        builder=builder,
        kwargs=kwargs,
        pruning=None if initial is None else initial.spec.pruning,
        dense=None if initial is None else initial.dense,
        recipe=run.recipe,
        config=config,
        metrics=metrics,
        seed=seed,
    )
    run.drop_state()
    worst = min(range(images.classes), key=lambda i: scores.f1[i])
    say(
        f"test accuracy {scores.accuracy:.2%} on {scores.samples} images (best epoch {state.best_epoch} of "
        f"{state.epoch}; lowest F1 {scores.f1[worst]:.2f} for {data.labels[worst]!r}); checkpoint in {run.directory}"
    )
    return checkpoint


def chosen_samples(split: Split, most: int, most_bytes: int) -> Samples:
    """Of a split, what `chosen` takes, read."""
    return read(chosen(split, most, most_bytes))


def read(split: Split) -> Samples:
    """All of a split, in memory."""
    return Samples(raw=tuple(split.raw), targets=split.targets)


def chosen(split: Split, most: int, most_bytes: int) -> Split:
    """A split in its order: all of it, or as many samples drawn at random as both limits allow.

    The draw has a fixed seed: runs with different seeds then report on the same images.
    """
    kept: list[int] = []
    size = 0
    for place in np.random.default_rng(0).permutation(len(split))[:most]:
        raw = split.raw[int(place)]
        length = len(raw) if isinstance(raw, bytes) else raw.nbytes
        # The first is kept whatever its size: a checkpoint without samples can be neither checked nor exported.
        if kept and size + length > most_bytes:
            break
        kept.append(int(place))
        size += length
    return split.take(sorted(kept))
