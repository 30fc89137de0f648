"""How good a classifier is on a split: loss, accuracy, and per class precision, recall and F1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import nn

from dlops.train.batches import Batch, evaluation_batches
from dlops.train.images import Images

if TYPE_CHECKING:
    from lightning_fabric import Fabric

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

    For one process at a time: nothing is exchanged between processes. A class that is never found has a precision of 0,
    one that has no samples a recall of 0.
    """
    # Here and not on top: it takes a second to import, and a mistake in a config should be told in one.
    from sklearn.metrics import precision_recall_fscore_support

    loss, found, expected = _answers(module, batches, device=device)
    precision, recall, f1, _ = precision_recall_fscore_support(
        expected.numpy(), found.numpy(), labels=range(classes), zero_division=0
    )
    return Scores(
        loss=loss,
        accuracy=_accuracy(found, expected),
        precision=tuple(precision.tolist()),
        recall=tuple(recall.tolist()),
        f1=tuple(f1.tolist()),
        samples=len(expected),
    )


def validate(fabric: Fabric, network: nn.Module, images: Images) -> tuple[float, float]:
    """(accuracy, loss) on the validation split, the same in every process.

    The first process does it alone, on the plain network: so the result does not depend on how many there are.
    """
    scores = (0.0, 0.0)
    if fabric.is_global_zero:
        batches = evaluation_batches(images.validation, preprocess=images.preprocess, batch_size=BATCH_SIZE)
        loss, found, expected = _answers(network, batches, device=fabric.device)
        scores = (_accuracy(found, expected), loss)
    accuracy, loss = fabric.broadcast(scores)
    return accuracy, loss


def _answers(
    module: nn.Module, batches: Iterable[Batch], *, device: torch.device
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The mean loss, the class found for each sample (n,), and the right one (n,)."""
    loss = 0.0
    found: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            for images, targets in batches:
                logits = module(images.to(device))
                loss += float(F.cross_entropy(logits, targets.to(device), reduction="sum"))
                found.append(logits.argmax(1).cpu())
                right.append(targets.cpu())
    finally:
        module.train(was_training)
    expected = torch.cat(right)
    return loss / len(expected), torch.cat(found), expected


def _accuracy(found: torch.Tensor, expected: torch.Tensor) -> float:
    return int((found == expected).sum()) / len(expected)
