"""Random weights that answer as trained ones do: differently to different inputs, and with confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dlops.signature import Feed
from dlops.tensors import to_tensor

if TYPE_CHECKING:
    import torch
    from torch import nn


def draw_zeros(module: nn.Module) -> None:
    """Draw the weights of the layers that begin at zero, in place, as those of transformers begin (deviation 0.02).

    A head of zeros, as torchvision's vision transformers have, answers everything alike.
    """
    import torch
    from torch import nn

    draw = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not layer.weight.any():
            with torch.no_grad():
                layer.weight.normal_(std=0.02, generator=draw)


def settle_statistics(module: nn.Module, feed: Feed) -> None:
    """Have batch normalization estimate its means and variances on these inputs, in place; the rest stays in eval mode.

    At 0 and 1, as they are before training, what an untrained network answers hardly depends on what it is given, and
    an export of it would prove nothing.
    """
    import torch
    from torch import nn

    norms = [one for one in module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [one.momentum for one in norms]
    try:
        for one in norms:
            # None: the plain average of all batches.
            one.momentum = None
            one.reset_running_stats()
            one.train()
        with torch.no_grad():
            module(*(to_tensor(np.ascontiguousarray(array)) for array in feed.values()))
    finally:
        for one, momentum in zip(norms, momenta, strict=True):
            one.momentum = momentum
            one.eval()


def scale_weights(module: nn.Module, feed: Feed) -> None:
    """Scale each convolution and linear layer, in place, so that what it gives for these inputs deviates by 1.

    Layer-sequential unit variance (Mishkin and Matas 2016) in one pass; of a layer that runs several times the first
    time counts. A detector drawn at random gives all boxes one score otherwise, and which it keeps is rounding.
    """
    import torch
    from torch import nn

    seen: set[nn.Module] = set()

    def scale(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if layer in seen:
            return None
        seen.add(layer)
        assert isinstance(layer.weight, torch.Tensor)
        shift = layer.bias if isinstance(layer.bias, torch.Tensor) else torch.zeros(())
        if isinstance(layer, nn.Conv2d) and shift.ndim:
            shift = shift[:, None, None]
        # The bias stays: beside small weights it would be what deviates.
        deviation = float((output - shift).std())
        if not np.isfinite(deviation) or deviation == 0:
            return None
        layer.weight.div_(deviation)
        return (output - shift) / deviation + shift

    layers = [one for one in module.modules() if isinstance(one, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        with torch.no_grad():
            module(*(to_tensor(np.ascontiguousarray(array)) for array in feed.values()))
    finally:
        for hook in hooks:
            hook.remove()
