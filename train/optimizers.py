"""SGD, Adam and AdamW, with weight decay on weights only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

OptimizerName = Literal["sgd", "adam", "adamw"]
# What works from small to mid-sized networks with batch norm, at the batch sizes that defaults.py chooses.
LEARNING_RATES: dict[OptimizerName, float] = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3}
# Decoupled decay (AdamW) is multiplied by the learning rate, so it is far larger for the same pull.
WEIGHT_DECAYS: dict[OptimizerName, float] = {"sgd": 5e-4, "adam": 0.0, "adamw": 5e-2}


def build_optimizer(
    name: OptimizerName, module: nn.Module, *, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """momentum: of SGD (Nesterov); Adam and AdamW take it as their first beta.

    Biases and batch norm's parameters are not decayed: pulling them to zero regularizes nothing.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    match name:
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999))
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
