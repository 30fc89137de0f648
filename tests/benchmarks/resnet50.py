"""A ResNet-50 for what is measured on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import dlops
from dlops.checkpoint import Checkpoint


def make_resnet50(directory: Path, *, max_batch: int) -> Checkpoint:
    """Random weights, and labels that are its own decisions: speed does not depend on them."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50().eval()
    images = np.random.default_rng(0).standard_normal((64, 3, 224, 224), np.float32)
    with torch.no_grad():
        targets = np.concatenate([model(part).argmax(dim=1).numpy() for part in torch.from_numpy(images).split(8)])
    return dlops.save_checkpoint(
        model, directory, evaluation=(images, targets), builder="torchvision:resnet50", name="resnet50",
        max_batch=max_batch,
    )  # fmt: skip
