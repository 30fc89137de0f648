"""A multi-layer perceptron on flattened images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


def mlp(*, shape: Sequence[int], classes: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.0) -> nn.Module:
    """(n, *shape) to logits (n, classes), through linear-BN-ReLU layers of `hidden` widths.

    shape: of one input, (channels, height, width) for images. dropout: after each hidden layer.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += linear_bn_relu(width, size)
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = size
    layers.append(nn.Linear(width, classes))
    return nn.Sequential(*layers)


def mlp_small(*, shape: Sequence[int], classes: int) -> nn.Module:
    """Two hidden layers of 256 and 128: the recipe's default."""
    return mlp(shape=shape, classes=classes, hidden=(256, 128))


def linear_bn_relu(inputs: int, outputs: int) -> list[nn.Module]:
    # The batch norm's shift takes the place of a bias.
    return [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
