"""Networks whose activations are of real images and have the sizes of a trained network's, made in seconds.

Weights are random, batch norms hold the statistics of the images, and the last layer is fitted to tell eight classes
apart: two photos that scikit-learn brings, four quarters of each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision.models import resnet18

from dlops.checkpoint import Checkpoint
from dlops.saving import save_checkpoint

CLASSES = 8
# Weak features would get large weights, and quantization noise with them.
_RIDGE = 0.3
_PATCH = 8


class Block(nn.Module):
    """Attention and a wide layer, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_wide = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.project(self.before_attention(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.merge(attended)
        return x + self.narrow(F.gelu(self.widen(self.before_wide(x))))


class Transformer(nn.Module):
    """Over the 64 patches of a 64×64 image, 3.2 million weights."""

    def __init__(self, width: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, _PATCH, stride=_PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.norm(self.blocks(tokens)).mean(dim=1))


class Perceptron(nn.Module):
    """Three layers on 32×32 images, 10.5 million weights."""

    def __init__(self, width: int = 2048) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(3072, width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))


def resnet() -> nn.Module:
    return resnet18(num_classes=CLASSES)


# name: how to make it, and the sides of its images.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet, 224),
    "transformer": (Transformer, 64),
    "perceptron": (Perceptron, 32),
}


def crops(count: int, side: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random squares of the quarters of two photos, normalized: (count, 3, side, side), and the class of each."""
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    images, targets = np.empty((count, 3, side, side), np.float32), rng.integers(0, CLASSES, count)
    for i, target in enumerate(targets):
        photo, quarter = photos[target // 4], target % 4
        height, width = photo.shape[0] // 2, photo.shape[1] // 2
        part = photo[quarter // 2 * height :, quarter % 2 * width :][:height, :width]
        size = int(rng.integers(height // 2, height + 1))
        top, left = rng.integers(0, height - size + 1), rng.integers(0, width - size + 1)
        square = (
            torch.from_numpy(part[top : top + size, left : left + size].copy()).permute(2, 0, 1)[None].float() / 255
        )
        scaled = F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)[0].numpy()
        images[i] = (scaled * rng.uniform(0.6, 1.2) - 0.45) / 0.25
    return images, targets.astype(np.int64)


def make_checkpoint(name: str, directory: Path, *, evaluation: int, training: int) -> Checkpoint:
    """A checkpoint of one of NETWORKS with that many samples; calibration is the training samples."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    module = make()
    train, held_out = crops(training, side, seed=0), crops(evaluation, side, seed=1)
    _settle_norms(module, train[0])
    _fit_last_layer(module, *train)
    return save_checkpoint(module, directory, evaluation=held_out, calibration=train, name=name, max_batch=8, seed=0)


def _settle_norms(module: nn.Module, images: np.ndarray) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the plain mean over the batches
            part.reset_running_stats()
    module.train()
    with torch.no_grad():
        for batch in torch.from_numpy(images).split(32):
            module(batch)
    module.eval()


def _fit_last_layer(module: nn.Module, images: np.ndarray, targets: np.ndarray) -> None:
    """By ridge regression on what reaches it, so that decisions have the margins of a model that was fitted."""
    reached: list[torch.Tensor] = []
    last = module.get_submodule("fc")
    hook = last.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    with torch.no_grad():
        for batch in torch.from_numpy(images).split(32):
            module(batch)
        hook.remove()
        features = torch.cat(reached).double()
        # One scale for all features: one each would give those that hardly vary the largest weights.
        mean = features.mean(0)
        scale = (features - mean).std()
        normal = (features - mean) / scale
        wanted = 10 * F.one_hot(torch.from_numpy(targets), CLASSES).double()
        gram = normal.T @ normal + _RIDGE * len(normal) * torch.eye(normal.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, normal.T @ (wanted - wanted.mean(0))) / scale
        last.weight.copy_(weight.T)
        last.bias.copy_(wanted.mean(0) - mean @ weight)
