"""Multiply-accumulates of a module: counted as it runs, and reckoned ahead for layers of other widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dlops.errors import UsageError

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Prunable = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
# Each of these runs as one fused operator, whose multiplications no counter sees.
_UNCOUNTED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


def check_countable(module: nn.Module, *, title: str) -> None:
    """Raise UsageError, naming the layers, where the MACs that can be counted are not all of the module's."""
    found = [
        f"{name or 'the module'} ({type(m).__name__})"
        for name, m in module.named_modules()
        if isinstance(m, _UNCOUNTED)
    ]
    if found:
        raise UsageError(
            f"{title}: the MACs of {', '.join(found[:5])} are not counted, so no fraction of them can be asked for",
            hint="modules of convolutions and linear layers can be pruned; export this one dense",
        )


def count_macs(module: nn.Module, example: tuple[torch.Tensor, ...]) -> int:
    """Multiply-accumulates of all convolutions (transposed too) and matrix products of one call on `example`."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with counter, torch.no_grad():
        module(*example)
    # It counts a multiplication and an addition as two.
    return int(counter.get_total_flops()) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMacs:
    """macs: of one call of the dense module. out_channels, in_channels: its widths there. depthwise: cut by `out`."""

    macs: int
    out_channels: int
    in_channels: int
    depthwise: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupling:
    """A channel that goes from the layer `root` takes `each` channels from `layer`, of its output or of its input."""

    root: str
    layer: str
    is_out: bool
    each: float


def layer_macs(module: nn.Module, example: tuple[torch.Tensor, ...]) -> dict[str, LayerMacs]:
    """The convolutions and linear layers that run, by name, in the order in which they first do."""
    found: dict[str, LayerMacs] = {}

    def count(name: str, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        positions = inputs[0] if isinstance(layer, _TRANSPOSED) else output
        before = found[name].macs if name in found else 0
        groups = getattr(layer, "groups", 1)
        found[name] = LayerMacs(
            macs=before + positions.numel() * layer.weight[0].numel(),
            out_channels=out_channels(layer),
            in_channels=layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels,
            depthwise=groups > 1 and groups == out_channels(layer) == layer.in_channels,
        )

    handles = [
        layer.register_forward_hook(lambda *call, name=name: count(name, *call))
        for name, layer in module.named_modules()
        if isinstance(layer, Prunable)
    ]
    try:
        with torch.inference_mode():
            module(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def removed_fraction(
    gone: Mapping[str, int], *, couplings: Sequence[Coupling], layers: Mapping[str, LayerMacs], total: int
) -> float:
    """The fraction of `total` MACs that goes with `gone` channels of each root, by proportion layer by layer."""
    lost_out, lost_in = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    for coupling in couplings:
        lost = lost_out if coupling.is_out else lost_in
        lost[coupling.layer] += coupling.each * gone[coupling.root]
    removed = 0.0
    for name, layer in layers.items():
        kept = 1 - lost_out[name] / layer.out_channels
        if not layer.depthwise:
            kept *= 1 - lost_in[name] / layer.in_channels
        removed += layer.macs * (1 - kept)
    return removed / total


def out_channels(layer: nn.Module) -> int:
    """Width of a convolution's or linear layer's output."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


# The kernel that the CPU takes for scaled dot products is the one that torch's own table lacks.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
