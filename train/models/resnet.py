"""Residual networks for small images: He, Zhang, Ren and Sun 2016, "Deep Residual Learning", section 4.2.

Three stages of two-convolution blocks at full, half and quarter size. Where a stage changes the shape, the shortcut is
a 1×1 convolution (the paper's option B) and not a strided slice padded with zeros (option A, as the paper has for
CIFAR): pruning can follow a channel through a convolution but not through the padding, and every runtime fuses it with
its batch norm. It costs 1 % of ResNet-20's weights and multiply-accumulates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def resnet(
    *, in_channels: int, classes: int, blocks: Sequence[int] = (3, 3, 3), widths: Sequence[int] = (16, 32, 64)
) -> nn.Module:
    """Images (n, in_channels, H, W), H and W at least 8 and otherwise free, to logits (n, classes).

    blocks: of two convolutions each, in every stage. widths: channels of each stage; every stage but the first halves
    height and width. The depth that names such a network is 2 + 2 × the number of blocks.
    """
    if len(blocks) != len(widths):
        raise ValueError(f"{len(blocks)} numbers of blocks for {len(widths)} stages")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = nn.Sequential(_convolution(in_channels, widths[0]), nn.BatchNorm2d(widths[0]), nn.ReLU())
    channels = widths[0]
    for number, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        strides = [1 if number == 1 else 2, *[1] * (count - 1)]
        inputs = [channels, *[width] * (count - 1)]
        layers[f"stage{number}"] = nn.Sequential(
            *(Block(i, width, stride=s) for i, s in zip(inputs, strides, strict=True))
        )
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # He et al. 2015: keeps the variance through convolutions that ReLU follows.
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet20(*, in_channels: int, classes: int) -> nn.Module:
    """The smallest of the paper's networks for CIFAR: 0.27 million weights, 41 million MACs at 32×32."""
    return resnet(in_channels=in_channels, classes=classes, blocks=(3, 3, 3))


class Block(nn.Module):
    """Two convolutions beside a shortcut, added before the last ReLU."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = _convolution(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _convolution(inputs: int, outputs: int, *, stride: int = 1) -> nn.Conv2d:
    # The batch norm's shift takes the place of a bias.
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
