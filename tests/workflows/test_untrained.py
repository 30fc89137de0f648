"""Networks of random weights, made such that what they compute can be compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from dlops.workflows.untrained import draw_zeros, scale_weights


class _Twice(nn.Module):
    """One layer that runs twice: the second time it sees what it gave the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        answer: torch.Tensor = self.last(x.mean((2, 3)))
        return answer


def test_layers_of_zeros_are_drawn_alike_every_time_and_the_others_stay() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 5))
        nn.init.zeros_(made[2].weight)
        return made

    one, other, before = network(), network(), network()
    for made in (one, other):
        draw_zeros(made)
    assert torch.equal(one[0].weight, before[0].weight)
    assert torch.equal(one[2].weight, other[2].weight)
    assert 0.01 < float(one[2].weight.detach().std()) < 0.03


def test_what_each_layer_gives_first_deviates_by_one() -> None:
    torch.manual_seed(0)
    network = _Twice().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.01)
    layers: tuple[nn.Conv2d | nn.Linear, ...] = (network.first, network.twice, network.last)
    biases = [layer.get_parameter("bias").clone() for layer in layers]
    images = np.random.default_rng(0).normal(size=(8, 3, 12, 12)).astype(np.float32)
    scale_weights(network, {"image": images})

    deviations: dict[nn.Module, float] = {}
    for layer in layers:
        layer.register_forward_hook(lambda one, _, output: deviations.setdefault(one, float(output.std())) and None)
    with torch.no_grad():
        network(torch.from_numpy(images))
    # The biases are as small as they were, beside the weights.
    np.testing.assert_allclose(list(deviations.values()), 1.0, rtol=0.05)
    for layer, bias in zip(layers, biases, strict=True):
        assert torch.equal(layer.get_parameter("bias"), bias)
