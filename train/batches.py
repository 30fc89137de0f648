"""The batches of one epoch: which images, in which order, augmented how, all decided by seed, epoch and rank alone.

So an epoch can be run again from its number, without any generator's state: a resumed run draws what an uninterrupted
one draws, and the number of loader workers changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dlops.errors import UsageError
from dlops.preprocess import Preprocess
from dlops.train.augment import Augmentation, augmented
from dlops.train.defaults import MIN_PER_PROCESS, Plan, check_batch_size
from dlops.train.images import Pixels, normalized

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Batch = tuple[torch.Tensor, torch.Tensor]
T = TypeVar("T", covariant=True)


class Sized(Protocol[T]):
    """What a loop needs of a loader."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[T]: ...


def epoch_order(count: int, *, batch_size: int, seed: int, epoch: int, rank: int, world: int) -> list[torch.Tensor]:
    """The places of each batch's images for one of `world` processes, all of the same number of batches.

    batch_size counts the images of all processes together. What does not fill a last batch waits for another epoch's
    shuffle; where there is less than one batch in all, that is the batch.
    """
    check_batch_size(batch_size, devices=world)
    size = min(batch_size, count - count % world)
    if size // world < MIN_PER_PROCESS:
        raise UsageError(
            f"{count} training images are too few for {world} processes: batch norm needs two a process",
            hint="train with fewer devices, or add images",
        )
    shuffled = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(count))
    return [shuffled[i * size + rank : (i + 1) * size : world] for i in range(count // size)]


def training_batches(
    split: Pixels, *, plan: Plan, preprocess: Preprocess, seed: int, epoch: int, fabric: Fabric, num_workers: int
) -> Sized[Batch]:
    """This process's batches of an epoch, on its device: images (n, C, H, W) float32 normalized, targets (n,)."""
    rank, world = fabric.global_rank, fabric.world_size
    order = epoch_order(len(split), batch_size=plan.batch_size, seed=seed, epoch=epoch, rank=rank, world=world)
    loader = DataLoader(
        _EpochBatches(split, order, preprocess, plan.augmentation, (seed, epoch, rank)),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=fabric.device.type == "cuda",
        # Loader workers start anew each epoch: kept ones would go on from where the first epoch left them.
        persistent_workers=False,
        # One of its own, so that making a loader does not draw from the generator that dropout uses.
        generator=torch.Generator(),
    )
    # The order is split among the processes already.
    return cast("Sized[Batch]", fabric.setup_dataloaders(loader, use_distributed_sampler=False))


def evaluation_batches(split: Pixels, *, preprocess: Preprocess, batch_size: int) -> Iterator[Batch]:
    """Every image once, in order, without augmentation."""
    for start in range(0, len(split), batch_size):
        chosen = slice(start, start + batch_size)
        yield normalized(split.pixels[chosen], preprocess), split.targets[chosen]


class _EpochBatches(Dataset[Batch]):
    """Item i is the whole batch i."""

    def __init__(
        self,
        split: Pixels,
        order: list[torch.Tensor],
        preprocess: Preprocess,
        augmentation: Augmentation,
        seed: tuple[int, ...],
    ) -> None:
        self._split, self._order, self._preprocess = split, order, preprocess
        self._augmentation, self._seed = augmentation, seed

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self._order):
            raise IndexError(number)
        places = self._order[number]
        generator = torch.Generator().manual_seed(derived_seed(*self._seed, number))
        pixels = augmented(self._split.pixels[places], self._augmentation, generator)
        return normalized(pixels, self._preprocess), self._split.targets[places]


def derived_seed(*parts: int) -> int:
    """One seed from several numbers, so that neighbours share nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
