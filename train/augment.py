"""Random flips, shifts, rotations and zooms of a batch, in one resampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict


class Augmentation(BaseModel):
    """flip: mirror left and right, half of the time. crop: largest shift, as a fraction of the size; what moves in is
    black, as in padding and cropping. rotation: largest angle in degrees. zoom: largest change of scale, a fraction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    flip: bool
    crop: float
    rotation: float
    zoom: float

    @property
    def is_none(self) -> bool:
        return not (self.flip or self.crop or self.rotation or self.zoom)


def augmented(pixels: torch.Tensor, augmentation: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """(n, C, H, W) uint8 pixels to float32 pixels of the same range, each image changed by its own draw."""
    images = pixels.to(torch.float32)
    if augmentation.is_none:
        return images
    count, _, height, width = images.shape

    def draw(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle = draw(math.radians(augmentation.rotation))
    # As far in as out: the scale is uniform in the logarithm.
    scale = torch.exp(draw(math.log1p(augmentation.zoom)))
    # Whole pixels, so that a shift alone does not blur.
    down = torch.round(draw(augmentation.crop) * height) * 2 / height
    right = torch.round(draw(augmentation.crop) * width) * 2 / width
    mirror = torch.where(draw(1.0) < 0, -1.0, 1.0) if augmentation.flip else torch.ones(count)
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    # Output coordinates to input coordinates; both run from -1 to 1, so a rotation must know the aspect ratio.
    rows = (
        torch.stack([cosine * mirror, -sine * (height / width), right], dim=1),
        torch.stack([sine * (width / height) * mirror, cosine, down], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
