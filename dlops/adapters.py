"""torchvision's detectors and RAFT as modules from tensors to tensors, which is what can be exported and compared.

A detector takes a list of images and gives a list of dictionaries, of as many boxes as it finds; RAFT gives every step
of its refinement.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

# What adapted modules take: a traced detector holds the loop over its images unrolled, and torch.export takes the batch
# of RAFT's grids for a constant.
ADAPTED_BATCH = 1


class Detector(nn.Module):
    """(n, 3, height, width) in [0, 1] to boxes, labels, scores and what else the detector gives, (n, most, ...) each.

    An image with fewer than `most` detections is filled up with zeros; a score of 0 is none.
    """

    def __init__(self, detector: nn.Module, most: int) -> None:
        super().__init__()
        self.detector = detector
        # Scripted, torchvision's would say in the first run of every process that they give their losses, too.
        if hasattr(detector, "_has_warned"):
            detector.__dict__["_has_warned"] = True
        self.most = most

    # The annotations are read by torch.jit.script, which knows neither `dict` nor postponed ones of other names.
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        listed: list[Tensor] = []
        for place in range(images.shape[0]):
            listed.append(images[place])
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # Scripted, a detector gives its losses, too.
            _, found = self.detector(listed)
        else:
            found = self.detector(listed)
        filled: dict[str, list[Tensor]] = {}
        for one in found:
            for name, tensor in one.items():
                # torch.jit.script unpacks no list into another.
                shape = [self.most] + list(tensor.shape[1:])  # noqa: RUF005
                room = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
                if name not in filled:
                    filled[name] = []
                filled[name].append(torch.cat([tensor, room])[: self.most])
        outputs: dict[str, Tensor] = {}
        for name, tensors in filled.items():
            outputs[name] = torch.stack(tensors)
        return outputs


class LastFlow(nn.Module):
    """Two images to the flow between them, (n, 2, height, width): the last of RAFT's refinements."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        flows: list[Tensor] = self.network(first, second)
        return flows[-1]


def adapted(module: nn.Module) -> nn.Module:
    """The module, or what makes it one from tensors to tensors; adapted ones as they are."""
    # Whoever made one of torchvision's has imported it.
    if "torchvision" not in sys.modules:
        return module
    most = _most_detections(module)
    if most is not None:
        return Detector(module, most)
    from torchvision.models.optical_flow import RAFT

    return LastFlow(module) if isinstance(module, RAFT) else module


def task_of(module: nn.Module) -> str | None:
    """What an adapted module is for; None of any other."""
    return "detection" if isinstance(module, Detector) else "regression" if isinstance(module, LastFlow) else None


def is_adapted(module: nn.Module) -> bool:
    """Whether it takes one sample at a time, and is scripted for TorchScript: it branches and loops on its data."""
    return task_of(module) is not None


def named_for(tensors: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """Weights under the names of the adapted module, where they are those of the one inside."""
    inside = {Detector: "detector.", LastFlow: "network."}.get(type(module))
    if inside is None or any(name.startswith(inside) for name in tensors):
        return tensors
    return {f"{inside}{name}": tensor for name, tensor in tensors.items()}


def _most_detections(module: nn.Module) -> int | None:
    """How many one of torchvision's detectors gives for an image at most; None for what is no detector."""
    from torchvision.models.detection.fcos import FCOS
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.retinanet import RetinaNet
    from torchvision.models.detection.ssd import SSD

    if isinstance(module, GeneralizedRCNN):
        return int(module.roi_heads.detections_per_img)
    return int(module.detections_per_img) if isinstance(module, (FCOS, RetinaNet, SSD)) else None
