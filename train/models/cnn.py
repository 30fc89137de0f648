"""A plain convolutional network: stages of conv-BN-ReLU, each halving the image, then the average over what is left.

Without branches or squeezes, so that every channel can be pruned, every layer fuses with its batch norm, and any
runtime has a fast kernel for all of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

MIN_IMAGE_SIZE = 8


class Numbers(NamedTuple):
    """What `cnn` needs to know beside channels and classes. Widths are multiples of 16: what int8 and fp16 kernels are
    tiled by, and so still multiples of 8 after half is pruned.
    """

    widths: tuple[int, ...]
    first_stride: Literal[1, 2]


# By the smaller side of the images. A first stage at full size would cost three quarters of all the work from 24 pixels
# on; from 64 on, three stages would leave a map so large that its average sees textures only.
_BY_SIZE = (
    (64, Numbers((32, 64, 128, 192, 256), 2)),
    (24, Numbers((48, 96, 192), 2)),
    (MIN_IMAGE_SIZE, Numbers((32, 64, 128), 1)),
)


def numbers_for(height: int, width: int) -> Numbers:
    """The numbers that suit images of that size."""
    return next((numbers for size, numbers in _BY_SIZE if min(height, width) >= size), _BY_SIZE[-1][1])


def cnn(
    *,
    in_channels: int,
    classes: int,
    widths: Sequence[int] = (32, 64, 128),
    depth: int = 2,
    first_stride: int = 1,
    dropout: float = 0.0,
) -> nn.Module:
    """Images (n, in_channels, H, W), H and W at least 8 and otherwise free, to logits (n, classes).

    widths: channels of each stage; every stage but the first halves height and width with its first convolution.
    depth: convolutions a stage. first_stride: of the first stage, 2 for large images. dropout: before the last layer.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_channels
    for number, width in enumerate(widths, start=1):
        layers[f"stage{number}"] = stage(channels, width, depth=depth, stride=first_stride if number == 1 else 2)
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["head"] = nn.Linear(channels, classes)
    return nn.Sequential(layers)


def cnn_small(*, in_channels: int, classes: int) -> nn.Module:
    """For images of 8 to 23 pixels: 0.29 million weights."""
    return cnn(in_channels=in_channels, classes=classes, **numbers_for(8, 8)._asdict())


def cnn_medium(*, in_channels: int, classes: int) -> nn.Module:
    """For images of 24 to 63 pixels: 0.65 million weights."""
    return cnn(in_channels=in_channels, classes=classes, **numbers_for(32, 32)._asdict())


def cnn_photo(*, in_channels: int, classes: int) -> nn.Module:
    """For images of 64 pixels and more: 1.9 million weights."""
    return cnn(in_channels=in_channels, classes=classes, **numbers_for(128, 128)._asdict())


def stage(inputs: int, outputs: int, *, depth: int, stride: int) -> nn.Sequential:
    """`depth` convolutions with `outputs` channels; the first has the stride."""
    first = conv_bn_relu(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(conv_bn_relu(outputs, outputs) for _ in range(depth - 1)))


def conv_bn_relu(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    # The batch norm's shift takes the place of a bias.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
