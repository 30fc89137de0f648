from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, resnet18

from dlops.checkpoint import Checkpoint
from dlops.errors import UsageError
from dlops.export import prune as pruning
from dlops.export import recover as recovery
from dlops.export.macs import count_macs, out_channels
from dlops.export.module import eager_outputs
from dlops.export.prune import grain, prune, rounded_width
from dlops.export.recover import recover, reestimate_batch_norms
from dlops.pruning import apply_pruning

from .conftest import PREPROCESS, SmallNet

IMAGE = (torch.zeros(2, 3, 64, 64),)


def test_macs_are_counted_per_output_value() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    assert count_macs(layers, (torch.zeros(1, 3, 4, 4),)) == 8 * 16 * 27 + 10 * 128


def test_macs_of_transposed_and_grouped_convolutions_and_of_products_are_counted() -> None:
    transposed = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert count_macs(transposed, (torch.zeros(1, 4, 5, 5),)) == 25 * 4 * 6 * 4
    grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
    assert count_macs(grouped, (torch.zeros(1, 8, 5, 5),)) == 25 * 16 * 2 * 9

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_macs(Attention(), (torch.zeros(1, 2, 7, 4),)) == 2 * 2 * 7 * 7 * 4


@pytest.mark.parametrize(
    "layer", [nn.LSTM(8, 64, batch_first=True), nn.GRU(8, 64), nn.MultiheadAttention(64, 4), nn.Bilinear(8, 8, 4)]
)
def test_layers_whose_macs_cannot_be_counted_are_refused_by_name(layer: nn.Module) -> None:
    module = nn.ModuleDict({"inner": layer, "head": nn.Linear(64, 10)}).eval()
    with pytest.raises(UsageError, match=rf"MACs of inner \({type(layer).__name__}\)"):
        prune(module, fraction=0.5, example=(torch.zeros(2, 8, 8),), title="it")


class _Shuffled(nn.Module):
    """The pixel shuffle binds its layer's channels in fours: torch-pruning's dependency graph fails on them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shuffle = nn.Conv2d(1, 32, 3, padding=1), nn.PixelShuffle(2)
        self.second, self.head = nn.Conv2d(8, 16, 3), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(self.shuffle(self.first(x)))).mean((2, 3)))


class _Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 48), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x.flatten(1)).view(-1, 2, 24).sum(1))


class _Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(64, 48), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x.flatten(1))
        if hidden.shape[1] != 48:
            raise LookupError("48 channels are wanted here")
        return self.head(hidden)


@pytest.mark.parametrize("build", [_Shuffled, _Reshaped, _Raising])
def test_a_structure_that_cannot_be_pruned_is_refused_in_words(build: type[nn.Module]) -> None:
    with pytest.raises(UsageError, match=r"remove channels|channel can be removed") as refused:
        prune(build().eval(), fraction=0.5, example=(torch.zeros(2, 1, 8, 8),), title="it")
    assert "dense" in (refused.value.hint or "")


class _TwoHeads(nn.Module):
    """The layer that runs last makes one output of two, and cutting the other's layer fails."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.shuffle = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 16, 1), nn.PixelShuffle(2)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.relu(self.stem(x))
        image = self.shuffle(self.wide(features))
        return image, self.head(torch.relu(self.hidden(features.mean((2, 3)))))


def test_where_keeping_the_last_layer_fails_all_as_wide_as_an_output_are_kept() -> None:
    torch.manual_seed(0)
    pruned = prune(_TwoHeads().eval(), fraction=0.5, example=(torch.zeros(2, 1, 8, 8),), title="it").module
    assert out_channels(pruned.get_submodule("wide")) == 16
    assert out_channels(pruned.get_submodule("head")) == 10
    assert out_channels(pruned.get_submodule("stem")) < 64


@pytest.mark.parametrize("build", [SmallNet, resnet18, mobilenet_v3_small])
def test_what_is_reckoned_for_widths_is_what_a_cut_copy_counts(build: type[nn.Module]) -> None:
    example = (torch.zeros(2, 1, 8, 8),) if build is SmallNet else IMAGE
    search = pruning._Search(build().eval(), example, "it")
    widths = {name: rounded_width(dense, 0.3 + 0.02 * i) for i, (name, dense) in enumerate(search.dense_widths.items())}
    assert search.removed(widths) == pytest.approx(search.cut(widths).removed, abs=1e-9)


def test_where_the_reckoning_is_off_every_candidate_is_counted(
    digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning._Search, "_coupled", lambda self: ())
    pruned = prune(digits_model, fraction=0.5, example=(torch.zeros(2, 1, 8, 8),), title="it")
    assert pruned.record.macs_removed == pytest.approx(0.5, abs=0.02)


def test_wide_layers_keep_whole_blocks_and_narrow_ones_a_channel_or_two() -> None:
    assert [grain(dense) for dense in (8, 15, 16, 31, 32, 512)] == [1, 1, 8, 8, 16, 16]
    assert all(rounded_width(dense, ratio / 20) % 16 == 0 for dense in (32, 64, 96, 512) for ratio in range(20))
    assert rounded_width(64, 0.3, coarsest=8) == 48
    assert rounded_width(16, 0.3) == 8
    assert rounded_width(15, 0.3) == 10
    assert rounded_width(2, 0.98) == 2
    assert rounded_width(1, 0.98) == 1


@pytest.mark.parametrize("build", [SmallNet, resnet18, mobilenet_v3_small])
@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_the_asked_fraction_of_macs_is_removed(build: type[nn.Module], fraction: float) -> None:
    torch.manual_seed(0)
    dense = build().eval()
    example = (torch.zeros(2, 1, 8, 8),) if build is SmallNet else IMAGE
    pruned = prune(dense, fraction=fraction, example=example, title="it")
    removed = 1 - count_macs(pruned.module, example) / count_macs(dense, example)
    assert removed == pytest.approx(fraction, abs=0.02)
    assert pruned.record.macs_removed == pytest.approx(removed)
    wide = {name for name, layer in dense.named_modules() if hasattr(layer, "weight") and _width(layer) >= 64}
    kept = {name: _width(layer) for name, layer in pruned.module.named_modules() if name in wide}
    assert any(width < 64 for width in kept.values())
    assert all(width % 8 == 0 for width in kept.values())
    assert pruned.module(*example).shape == dense(*example).shape


def _width(layer: nn.Module) -> int:
    return out_channels(layer) if isinstance(layer, (nn.Conv2d, nn.Linear)) else 0


def test_the_record_rebuilds_the_pruned_structure_from_the_dense_module() -> None:
    torch.manual_seed(0)
    dense = resnet18().eval()
    pruned = prune(dense, fraction=0.4, example=IMAGE, title="it")
    rebuilt = apply_pruning(resnet18(), pruned.record, example=IMAGE)
    rebuilt.load_state_dict(pruned.module.state_dict())
    inputs = torch.randn(2, 3, 64, 64)
    assert torch.equal(rebuilt.eval()(inputs), pruned.module(inputs))


def test_pruning_leaves_the_dense_module_alone(digits_model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in digits_model.state_dict().items()}
    prune(digits_model, fraction=0.5, example=(torch.zeros(2, 1, 8, 8),), title="it")
    assert all(torch.equal(tensor, before[name]) for name, tensor in digits_model.state_dict().items())


def test_a_model_of_one_layer_cannot_be_pruned() -> None:
    with pytest.raises(UsageError, match="output"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), fraction=0.5, example=(torch.zeros(2, 64),), title="it")


def test_recovery_brings_the_accuracy_back_and_is_deterministic(
    checkpoint: Checkpoint, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough for a small network: what a user gets takes twice as long.
    monkeypatch.setattr(recovery, "EPOCHS", 30)
    monkeypatch.setattr(recovery, "MIN_STEPS", 0)
    calibration, evaluation = checkpoint.samples("calibration"), checkpoint.samples("evaluation")
    assert calibration is not None
    assert evaluation is not None
    feed = calibration.feed(PREPROCESS, "input")
    held_out = evaluation.feed(PREPROCESS, "input")

    def accuracy(module: nn.Module) -> float:
        logits = eager_outputs(module, held_out, checkpoint.signature)["logits"]
        return float((logits.argmax(axis=1) == evaluation.targets).mean())

    def recovered() -> tuple[nn.Module, float, float]:
        student = prune(digits_model, fraction=0.6, example=checkpoint.example(), title="it").module
        found = recover(
            student, digits_model, signature=checkpoint.signature, feed=feed, targets=calibration.targets, seed=3,
            device=torch.device("cpu"), title="recovering",
        )  # fmt: skip
        assert found.loss_after < found.loss_before
        assert not student.training
        return student, found.loss_before, found.loss_after

    pruned = prune(digits_model, fraction=0.6, example=checkpoint.example(), title="it").module
    torch.manual_seed(1)
    first, *losses = recovered()
    torch.manual_seed(2)
    second, *again = recovered()
    assert accuracy(first) > max(0.95, accuracy(pruned) + 0.1)
    assert losses == again
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_recovery_begins_with_the_statistics_of_the_samples(
    checkpoint: Checkpoint, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "EPOCHS", 1)
    monkeypatch.setattr(recovery, "MIN_STEPS", 0)
    calibration = checkpoint.samples("calibration")
    assert calibration is not None

    def loss_before(shift: float) -> float:
        student = prune(digits_model, fraction=0.3, example=checkpoint.example(), title="it").module
        for layer in student.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                layer.running_mean += shift
        return recover(
            student, digits_model, signature=checkpoint.signature, feed=calibration.feed(PREPROCESS, "input"),
            targets=calibration.targets, seed=3, device=torch.device("cpu"), title="recovering",
        ).loss_before  # fmt: skip

    assert loss_before(0.0) == pytest.approx(loss_before(5.0), rel=1e-5)


class _Ticking:
    """Seconds that pass by a given amount an epoch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _course(losses: list[float], *, each_s: float = 0.0, budget_s: float = 1e9) -> tuple[int, str, list[float]]:
    """(epochs, why annealing began, the last rate of each epoch) where the held-out loss goes as `losses` say."""
    clock = _Ticking()
    course = recovery._Course(per_epoch=100, budget_s=budget_s, clock=clock)
    rates: list[float] = []
    while not course.is_over:
        rates.append([course.next_rate() for _ in range(100)][-1] / recovery.LEARNING_RATE)
        clock.now += each_s
        course.end_epoch(losses[min(course.epoch, len(losses) - 1)])
    return course.epoch, course.ended, rates


def test_recovery_anneals_once_the_held_out_loss_no_longer_falls() -> None:
    epochs, ended, rates = _course([1.0, 0.8, 0.6, 0.4, 0.39, 0.38])
    # The loss fell by a tenth in the fourth epoch for the last time; two more, and half of six to anneal.
    assert (epochs, ended) == (9, "plateau")
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0], abs=1e-9)


def test_recovery_of_a_loss_that_keeps_falling_ends_with_its_epochs_and_is_annealed_by_then() -> None:
    epochs, ended, rates = _course([0.8**epoch for epoch in range(100)])
    assert (epochs, ended) == (recovery.EPOCHS, "epochs")
    assert rates[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("budget_s", [1.0, 10.0, 31.0, 95.0, 200.0])
def test_recovery_keeps_its_time_budget_and_is_annealed_by_then(budget_s: float) -> None:
    epochs, ended, rates = _course([0.8**epoch for epoch in range(100)], each_s=10.0, budget_s=budget_s)
    assert ended == "budget"
    assert epochs * 10 <= max(20.0, budget_s)
    assert epochs * 10 >= min(budget_s, 500) - 25
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_batch_norm_statistics_become_those_of_the_samples() -> None:
    inputs = torch.from_numpy(np.random.default_rng(0).normal(5, 2, (256, 4)).astype(np.float32))
    norm = nn.BatchNorm1d(4)
    reestimate_batch_norms(norm, (inputs,))
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, inputs.mean(dim=0), rtol=1e-4, atol=1e-4)
    assert norm.momentum == 0.1
    assert not norm.training
