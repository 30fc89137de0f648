"""The modules that a checkpoint's variants are made of: the dense one, and each that its sparsities leave of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dlops.errors import DlopsError, GateError, UsageError
from dlops.export.module import check_module, eager_outputs
from dlops.export.prune import prune
from dlops.export.reduce import Lessons, reduced

if TYPE_CHECKING:
    import torch
    from pydantic import JsonValue
    from torch import nn

    from dlops.artifact import Variant
    from dlops.checkpoint import Checkpoint, DenseOrigin
    from dlops.signature import Feed


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A module that variants are made of, and what it answers on the evaluation samples: the reference of parity.

    records, masks: as in Reduced; none of the dense module. captured: what formats and gates make once of it.
    """

    module: nn.Module
    reference: Feed
    notes: dict[str, JsonValue]
    records: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    captured: dict[str, Any] = field(default_factory=dict)


class Structures:
    """Those of one checkpoint, each made when a variant first asks for it, and then kept."""

    def __init__(self, checkpoint: Checkpoint, dense: nn.Module, feed: Feed, lessons: Lessons | None) -> None:
        """feed: the evaluation samples. lessons: what recovery learns from; None where no variant is to recover."""
        self._checkpoint, self._feed, self._lessons = checkpoint, feed, lessons
        self.dense = Structure(module=dense, reference=eager_outputs(dense, feed, checkpoint.signature), notes={})
        self._made: dict[str | None, Structure | DlopsError] = {None: self.dense}

    def of(self, variant: Variant) -> Structure:
        """Raises UsageError and GateError as `reduced` does; what one variant was refused for, its likes are, too."""
        if variant.sparsity not in self._made:
            try:
                self._made[variant.sparsity] = self._reduced(variant)
            except (GateError, UsageError) as error:
                self._made[variant.sparsity] = error
        found = self._made[variant.sparsity]
        if isinstance(found, DlopsError):
            raise found
        return found

    def unrecovered(self, variant: Variant, title: str) -> Structure:
        """Of the shapes alone, for timing: a pruned one is cut but not taught, and has no reference."""
        if not variant.pruned_fraction:
            return self.dense
        cut = prune(
            self.dense.module, fraction=variant.pruned_fraction, example=self._checkpoint.example(), title=title
        )
        return Structure(module=cut.module, reference={}, notes={})

    def _reduced(self, variant: Variant) -> Structure:
        if self._checkpoint.dense is not None:
            return self._cut_already(self._checkpoint.dense)
        assert self._lessons is not None
        found = reduced(self.dense.module, variant, self._checkpoint, self._lessons)
        signature = self._checkpoint.signature
        check_module(found.module, self._feed, signature, title=str(variant.sparsity))
        return Structure(
            module=found.module,
            reference=eager_outputs(found.module, self._feed, signature),
            notes=found.notes,
            records=found.records,
            masks=found.masks,
        )

    def _cut_already(self, origin: DenseOrigin) -> Structure:
        """The checkpoint as it is: it was pruned before, and trained since."""
        record = self._checkpoint.spec.pruning
        assert record is not None
        return replace(
            self.dense,
            notes={"macs_removed": record.macs_removed, "dense_checkpoint_sha256": origin.sha256},
            records={"pruning": record.model_dump_json()},
        )
