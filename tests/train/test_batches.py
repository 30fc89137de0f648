from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dlops.errors import UsageError
from dlops.train.augment import Augmentation, augmented
from dlops.train.batches import derived_seed, epoch_order
from dlops.train.optimizers import build_optimizer
from dlops.train.schedules import warmup_cosine

STILL = Augmentation(flip=False, crop=0, rotation=0, zoom=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 64, height: int = 12, width: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=seeded(), dtype=torch.uint8)


def test_no_augmentation_changes_no_pixel() -> None:
    images = some_images()
    assert torch.equal(augmented(images, STILL, seeded()), images.float())


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_rest() -> None:
    images = some_images()
    changed = augmented(images, STILL.model_copy(update={"flip": True}), seeded())
    same = [torch.allclose(a, b.float(), atol=0.02) for a, b in zip(changed, images, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1).float(), atol=0.02) for a, b in zip(changed, images, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 20 < sum(mirrored) < 44


def test_a_crop_shifts_by_whole_pixels_up_to_its_share_and_fills_with_black() -> None:
    images = some_images()
    changed = augmented(images, STILL.model_copy(update={"crop": 0.25}), seeded())
    found = set()
    padded = torch.nn.functional.pad(images.float(), (5, 5, 3, 3))
    for image, result in zip(padded, changed, strict=True):
        at = [
            (down, right)
            for down in range(7)
            for right in range(11)
            if torch.allclose(image[:, down : down + 12, right : right + 20], result, atol=0.05)
        ]
        assert len(at) == 1
        found.add(at[0])
    assert len(found) > 20


def test_a_rotation_keeps_shapes_in_images_that_are_not_square() -> None:
    # A disc in the middle is the same disc after any rotation, unless the aspect ratio is forgotten.
    rows, columns = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    disc = ((rows**2 + columns**2) < 100).float()[None, None].mul(255).to(torch.uint8).repeat(8, 1, 1, 1)
    changed = augmented(disc, STILL.model_copy(update={"rotation": 90.0}), seeded())
    assert (changed - disc.float()).abs().mean() < 5


def test_a_zoom_goes_in_and_out_within_its_limit() -> None:
    square = torch.zeros(64, 1, 40, 40, dtype=torch.uint8)
    square[..., 10:30, 10:30] = 255
    areas = augmented(square, STILL.model_copy(update={"zoom": 0.2}), seeded()).sum((1, 2, 3)) / 255 / 400
    assert areas.min() < 0.85
    assert areas.max() > 1.15
    assert areas.min() > 1 / 1.2**2 - 0.02
    assert areas.max() < 1.2**2 + 0.02


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_processes_share_each_batch_without_overlap_and_see_every_image_once(world: int) -> None:
    orders = [epoch_order(100, batch_size=12, seed=1, epoch=1, rank=rank, world=world) for rank in range(world)]
    whole = epoch_order(100, batch_size=12, seed=1, epoch=1, rank=0, world=1)
    assert {len(order) for order in orders} == {8}
    for number, batch in enumerate(whole):
        parts = torch.cat([order[number] for order in orders])
        assert sorted(parts.tolist()) == sorted(batch.tolist())
        assert {len(order[number]) for order in orders} == {12 // world}
    assert len(set(torch.cat(whole).tolist())) == 96


def test_each_epoch_and_seed_has_its_own_order_and_always_the_same() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat(epoch_order(50, batch_size=10, seed=seed, epoch=epoch, rank=0, world=1)).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert len({derived_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_fewer_images_than_a_batch_are_one_batch_and_too_few_for_batch_norm_are_refused() -> None:
    assert [len(batch) for batch in epoch_order(7, batch_size=64, seed=0, epoch=1, rank=0, world=2)] == [3]
    with pytest.raises(UsageError, match="3 training images are too few for 2 processes"):
        epoch_order(3, batch_size=64, seed=0, epoch=1, rank=0, world=2)
    with pytest.raises(UsageError, match=r"a batch of 2 is too small for 2 processes.*batch_size=4"):
        epoch_order(1000, batch_size=2, seed=0, epoch=1, rank=0, world=2)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    rates = [warmup_cosine(step, steps=100, warmup_steps=10) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert np.argmax(rates) == 10
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert all(math.isfinite(warmup_cosine(step, steps=3, warmup_steps=5)) for step in range(4))


def test_biases_and_batch_norms_are_not_decayed() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for name in ("sgd", "adam", "adamw"):
        optimizer = build_optimizer(name, module, lr=0.1, weight_decay=0.5, momentum=0.9)
        decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert [decayed[id(p)] for p in module.parameters()] == [0.5, 0, 0, 0]
