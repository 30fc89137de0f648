"""A module with channels or single weights removed, then recovered: what pruned and sparse variants are made of."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pydantic import JsonValue
from torch import nn

from dlops.artifact import Variant
from dlops.checkpoint import Checkpoint
from dlops.console import say
from dlops.export.prune import prune
from dlops.export.recover import Recovery, recover
from dlops.samples import Samples
from dlops.signature import Feed
from dlops.sparsity import apply_sparsity, magnitude_masks, record_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """module: recovered, in eval mode. notes: for the artifact's provenance.

    records: the role in an artifact to the JSON that removes the same from the dense module. masks: of a sparse module,
    by the weight's name, true where it stays.
    """

    module: nn.Module
    notes: dict[str, JsonValue]
    records: dict[str, str]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What recovery learns from, and for how long. calibration, feed: the samples and their tensors."""

    calibration: Samples
    feed: Feed
    device: torch.device
    budget_s: float


def reduced(dense: nn.Module, variant: Variant, checkpoint: Checkpoint, lessons: Lessons) -> Reduced:
    """What `variant`'s sparsity leaves of the dense module, taught by it.

    Raises UsageError for a structure that cannot be reduced so, GateError where the fraction cannot be met.
    """
    return (_pruned if variant.pruned_fraction else _sparse)(dense, variant, checkpoint, lessons)


def _pruned(dense: nn.Module, variant: Variant, checkpoint: Checkpoint, lessons: Lessons) -> Reduced:
    name = str(variant.sparsity)
    say(f"{name}: removing {variant.pruned_fraction:.0%} of the MACs")
    pruned = prune(
        dense, fraction=variant.pruned_fraction, example=checkpoint.example(), title=f"{checkpoint.name}/{name}"
    )
    recovery = _recovered(pruned.module, dense, name, checkpoint, lessons, masks={})
    say(f"{name}: {pruned.record.macs_removed:.1%} of the MACs removed, {_summary(recovery)}")
    return Reduced(
        module=pruned.module,
        notes={"macs_removed": pruned.record.macs_removed, **_notes(recovery)},
        records={"pruning": pruned.record.model_dump_json()},
    )


def _sparse(dense: nn.Module, variant: Variant, checkpoint: Checkpoint, lessons: Lessons) -> Reduced:
    name = str(variant.sparsity)
    record = record_of(magnitude_masks(dense, name, title=f"{checkpoint.name}/{name}"), name)
    say(f"{name}: setting {record.zeros} of {record.elements} weights in {len(record.layers)} layers to zero")
    module = copy.deepcopy(dense)
    # By the record, as its reader will: what goes on from here must be what the record gives.
    masks = apply_sparsity(module, record)
    recovery = _recovered(module, dense, name, checkpoint, lessons, masks=masks)
    share = record.zeros / record.elements
    say(f"{name}: {share:.1%} of the weights of {len(record.layers)} layers are zero, {_summary(recovery)}")
    return Reduced(module=module, notes=_notes(recovery), records={"sparsity": record.model_dump_json()}, masks=masks)


def _recovered(
    module: nn.Module, dense: nn.Module, name: str, checkpoint: Checkpoint, lessons: Lessons, *,
    masks: Mapping[str, torch.Tensor],
) -> Recovery:  # fmt: skip
    return recover(
        module,
        dense,
        signature=checkpoint.signature,
        feed=lessons.feed,
        targets=lessons.calibration.targets,
        seed=checkpoint.seed or 0,
        device=lessons.device,
        title=f"{name}: recovering",
        masks=masks,
        budget_s=lessons.budget_s,
    )


def _summary(recovery: Recovery) -> str:
    return (
        f"recovered in {recovery.epochs} epochs on {recovery.samples} samples (held-out loss "
        f"{recovery.loss_before:.3f} to {recovery.loss_after:.3f}"
        f"{'; ended by its time budget' if recovery.ended == 'budget' else ''})"
    )


def _notes(recovery: Recovery) -> dict[str, JsonValue]:
    return {
        "recovery_epochs": recovery.epochs,
        "recovery_samples": recovery.samples,
        "recovery_loss_before": recovery.loss_before,
        "recovery_loss_after": recovery.loss_after,
        "recovery_ended_by": recovery.ended,
    }
