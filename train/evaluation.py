"""How good a classifier is on a split: loss, accuracy, and per class precision, recall and F1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import nn

from dlops.train.batches import Batch, evaluation_batches
from dlops.train.images import Images

if TYPE_CHECKING:
    from lightning.fabric import Fabric

BATCH_SIZE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """loss: mean cross-entropy without smoothing. accuracy: of all samples. The lists have one entry a class."""

    loss: float
    accuracy: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    samples: int

    def as_json(self, labels: Sequence[str]) -> dict[str, JsonValue]:
        per_class: dict[str, JsonValue] = {
            label: {"precision": precision, "recall": recall, "f1": f1}
            for label, precision, recall, f1 in zip(labels, self.precision, self.recall, self.f1, strict=True)
        }
        return {"accuracy": self.accuracy, "loss": self.loss, "samples": self.samples, "classes": per_class}


def evaluate(module: nn.Module, batches: Iterable[Batch], *, classes: int, device: torch.device) -> Scores:
    """Scores of `module` in fp32, which is what export starts from; its mode is left as it was.

    For one process at a time: nothing is exchanged between processes.
    """
    # Here and not on top: it takes seconds to import, and a mistake in a config should be told in one.
    from torchmetrics import MetricCollection, classification

    local: dict[str, Any] = {"sync_on_compute": False}
    metrics = MetricCollection(
        {
            "accuracy": classification.MulticlassAccuracy(classes, average="micro", **local),
            "precision": classification.MulticlassPrecision(classes, average="none", zero_division=0, **local),
            "recall": classification.MulticlassRecall(classes, average="none", zero_division=0, **local),
            "f1": classification.MulticlassF1Score(classes, average="none", zero_division=0, **local),
        }
    ).to(device)
    loss, samples = 0.0, 0
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            for images, targets in batches:
                inputs, expected = images.to(device), targets.to(device)
                logits = module(inputs)
                loss += float(F.cross_entropy(logits, expected, reduction="sum"))
                samples += len(targets)
                metrics.update(logits, expected)
    finally:
        module.train(was_training)
    found = metrics.compute()
    return Scores(
        loss=loss / samples,
        accuracy=float(found["accuracy"]),
        precision=tuple(found["precision"].tolist()),
        recall=tuple(found["recall"].tolist()),
        f1=tuple(found["f1"].tolist()),
        samples=samples,
    )


def validate(fabric: Fabric, network: nn.Module, images: Images) -> tuple[float, float]:
    """(accuracy, loss) on the validation split, the same in every process.

    The first process does it alone, on the plain network: so the result does not depend on how many there are.
    """
    found = (0.0, 0.0)
    if fabric.is_global_zero:
        batches = evaluation_batches(images.validation, preprocess=images.preprocess, batch_size=BATCH_SIZE)
        scores = evaluate(network, batches, classes=images.classes, device=fabric.device)
        found = (scores.accuracy, scores.loss)
    accuracy, loss = fabric.broadcast(found)
    return accuracy, loss
