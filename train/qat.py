"""Quantization-aware training: the network learns with the rounding that int8 will put on weights and activations.

Weights are rounded symmetrically with a scale for each output channel, and the inputs of convolutions and linear layers
to 8 bits over the range seen so far in the epoch: what static int8 export writes. Rounding passes the gradient on as it
is (Bengio et al. 2013; Jacob et al. 2018). The network's parameters, and their names, stay what they were.

A batch norm that follows a convolution multiplies whole output channels, and so the scale of each: rounding before it
is folded in is rounding after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from dlops.train.run import State

# Seven bits: what export keeps weights to on x86 without VNNI. What holds for them holds for the finer eight.
WEIGHT_LEVELS = 63
_ACTIVATION_LEVELS = 255
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@contextmanager
def fake_quantization(network: nn.Module, *, enabled: bool) -> Iterator[None]:
    """While the block runs, `network` computes with rounded weights and activations; afterwards as before.

    Ranges of activations begin anew with each block, in training mode; in eval mode they stay.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _LAYERS)] if enabled else []
    for layer in layers:
        rounded: Callable[..., torch.Tensor] = _linear if isinstance(layer, nn.Linear) else _convolution
        # On the instance, so that neither the class nor the parameters know of it.
        layer.forward = partial(rounded, layer, _Range())  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@dataclass(frozen=True, slots=True)
class Rounding:
    """Which epochs of a training round: from number `first` on, counted from 0; None rounds in none."""

    first: int | None

    @classmethod
    def in_last(cls, count: int | None, *, of: int, enabled: bool) -> Rounding:
        """The last `count` of so many epochs, where that is None a quarter of them."""
        return cls(of - min(of, count or math.ceil(of / 4)) if enabled else None)

    @contextmanager
    def next_epoch(self, state: State, network: nn.Module) -> Iterator[None]:
        """The block is the epoch that comes next."""
        if state.epoch == self.first:
            # What was best without rounding is not what int8 is made of.
            state.forget_best()
        with fake_quantization(network, enabled=self.first is not None and state.epoch >= self.first):
            yield

    def stops(self, state: State, *, patience: int | None) -> bool:
        """Whether no better epoch came for too long; before rounding has begun a better one may still come."""
        if patience is None or (self.first is not None and state.epoch <= self.first):
            return False
        return state.epochs_since_best >= patience


@dataclass(slots=True)
class _Range:
    """Smallest and largest value of an activation so far, as export's minmax has them; None before the first batch."""

    low: torch.Tensor | None = None
    high: torch.Tensor | None = None

    def follow(self, x: torch.Tensor) -> None:
        low, high = torch.aminmax(x.detach().float())
        # Zero must be exact: it is what padding adds.
        low, high = low.clamp(max=0), high.clamp(min=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def _linear(layer: nn.Linear, seen: _Range, x: torch.Tensor) -> torch.Tensor:
    return F.linear(_rounded_activation(x, seen, layer.training), rounded_weight(layer.weight), layer.bias)


def _convolution(layer: Any, seen: _Range, x: torch.Tensor) -> torch.Tensor:
    weight = rounded_weight(layer.weight)
    result: torch.Tensor = layer._conv_forward(_rounded_activation(x, seen, layer.training), weight, layer.bias)
    return result


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as int8 will hold it, a scale for each output channel (the first axis)."""
    largest = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    # A channel of zeros has no size to go by.
    scale = torch.where(largest > 0, largest / WEIGHT_LEVELS, torch.ones_like(largest))
    return _straight_through(weight, torch.round(weight.detach() / scale) * scale)


def _rounded_activation(x: torch.Tensor, seen: _Range, training: bool) -> torch.Tensor:
    if training:
        seen.follow(x)
    if seen.low is None or seen.high is None:
        # Evaluated before any training in this block: there is no range to round to.
        return x
    scale = (seen.high - seen.low).clamp(min=1e-8) / _ACTIVATION_LEVELS
    zero = torch.round(-seen.low / scale)
    levels = (torch.round(x.detach() / scale) + zero).clamp(0, _ACTIVATION_LEVELS)
    clipped = torch.minimum(torch.maximum(x, seen.low), seen.high)
    return _straight_through(clipped, (levels - zero) * scale)


def _straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """The value of `rounded` with the gradient of `exact`."""
    return exact + (rounded - exact).detach()
