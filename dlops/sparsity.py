"""Which weights of a module are zero: chosen by magnitude, recorded, and zeroed the same way again.

Shapes stay as they are. So no record is needed to load sparse weights, only to know that they are meant to be sparse
and to find the same zeros from the dense weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from dlops.errors import UsageError
from dlops.manifest import Record, Sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

# Two of four: what the sparse tensor cores of Ampere and later skip.
SEMI_STRUCTURED = "sparse24"
_GROUP, _KEPT = 4, 2
_UNSTRUCTURED = re.compile(r"^sparse([0-9]{2})$")


class SparseLayer(Record):
    """name: of the weight, "features.0.weight". elements, zeros: how many it has."""

    name: str
    elements: int = Field(gt=0)
    zeros: int = Field(ge=0)


class SparsityRecord(Record):
    """pattern: sparseNN (NN % zeros over all layers) or sparse24. sha256: of the masks that the dense weights give."""

    pattern: str = Field(pattern=_UNSTRUCTURED.pattern)
    layers: tuple[SparseLayer, ...]
    sha256: Sha256

    @property
    def elements(self) -> int:
        return sum(layer.elements for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)


def magnitude_masks(module: nn.Module, pattern: str, *, title: str) -> dict[str, torch.Tensor]:
    """True where a weight stays, by its name, for the convolutions and linear layers that the pattern covers.

    sparseNN: the NN % smallest of all those weights together. sparse24: of every four weights along a layer's input
    dimension the two smallest go; layers whose inputs are no multiple of four stay dense and are not in the result.
    Raises UsageError where there is nothing to zero.
    """
    weights = _weights(module)
    if pattern == SEMI_STRUCTURED:
        masks = {name: _two_of_four(weight, axis) for name, (weight, axis) in weights.items() if _fits(weight, axis)}
    else:
        match = _UNSTRUCTURED.fullmatch(pattern)
        assert match, pattern
        masks = _largest({name: weight for name, (weight, _) in weights.items()}, zero=int(match[1]) / 100)
    if not masks:
        raise UsageError(
            f"{title}: none of its {len(weights)} convolutions and linear layers can be made {pattern}",
            hint="sparse24 needs layers whose inputs are a multiple of four" if weights else "export it dense",
        )
    return masks


def record_of(masks: Mapping[str, torch.Tensor], pattern: str) -> SparsityRecord:
    """What says where the zeros are."""
    import numpy as np

    digest = hashlib.sha256()
    layers = []
    for name, mask in masks.items():
        kept = mask.cpu().numpy()
        digest.update(f"{name} {list(kept.shape)} ".encode() + np.packbits(kept).tobytes())
        layers.append(SparseLayer(name=name, elements=kept.size, zeros=int(kept.size - kept.sum())))
    return SparsityRecord(pattern=pattern, layers=tuple(layers), sha256=digest.hexdigest())


def zero_out(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Set every weight to zero that its mask does not keep, in place."""
    import torch

    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))


def apply_sparsity(module: nn.Module, record: SparsityRecord) -> dict[str, torch.Tensor]:
    """Zero the recorded weights of the dense `module`, in place, and return the masks.

    Raises UsageError where its weights are not those that the record was made from.
    """
    masks = magnitude_masks(module, record.pattern, title=record.pattern)
    if record_of(masks, record.pattern) != record:
        raise UsageError(
            f"{record.pattern}: these weights give other zeros than the recorded ones",
            hint="pass the dense module with the weights of the checkpoint that the variant was made from",
        )
    zero_out(module, masks)
    return masks


def _weights(module: nn.Module) -> dict[str, tuple[torch.Tensor, int]]:
    """The weights of convolutions and linear layers by name, each once, with the axis of their inputs."""
    from torch import nn

    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed, nn.Linear)
    owners = {id(m.weight): m for m in module.modules() if isinstance(m, layers)}
    return {
        name: (parameter.detach(), 0 if isinstance(owners[id(parameter)], transposed) else 1)
        for name, parameter in module.named_parameters()
        if id(parameter) in owners
    }


def _largest(weights: Mapping[str, torch.Tensor], *, zero: float) -> dict[str, torch.Tensor]:
    import torch

    if not weights:
        return {}
    sizes = torch.cat([weight.abs().flatten() for weight in weights.values()])
    kept = torch.ones(len(sizes), dtype=torch.bool)
    # Stable, so that of equal weights the same ones go every time.
    kept[torch.sort(sizes, stable=True).indices[: round(zero * len(sizes))]] = False
    parts = torch.split(kept, [weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _fits(weight: torch.Tensor, axis: int) -> bool:
    return weight.shape[axis] % _GROUP == 0


def _two_of_four(weight: torch.Tensor, axis: int) -> torch.Tensor:
    import torch

    grouped = weight.abs().movedim(axis, -1)
    groups = grouped.reshape(-1, _GROUP)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :_KEPT], True)
    return kept.view(grouped.shape).movedim(-1, axis).contiguous()
