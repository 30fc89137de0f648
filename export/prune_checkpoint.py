"""A checkpoint pruned into another one, to be fine-tuned by the recipe that trained it and exported as its variant."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlops.artifact import Variant
from dlops.checkpoint import Checkpoint, DenseOrigin, check_vacant, load_checkpoint
from dlops.console import say
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.errors import UsageError
from dlops.export.module import check_module, eager_outputs
from dlops.export.origin import checkpoint_digest
from dlops.export.plan import plan_variants
from dlops.export.prune import prune
from dlops.export.recover import reestimate_batch_norms
from dlops.saving import weights_bytes
from dlops.tasks import open_task
from dlops.tensors import to_tensor

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource


def prune_checkpoint(
    checkpoint: Checkpoint | Path | str, directory: Path | str, *, sparsity: str, model: ModuleSource | None = None
) -> Checkpoint:
    """Write what is left of `checkpoint` without the MACs that `sparsity` ("pruned50") names, as a checkpoint.

    Batch norms take their statistics anew from the calibration samples; nothing is trained. Its evaluation samples
    carry what the dense model answers to them, so that exports of it, and of what is fine-tuned from it, are judged
    against the dense model. Raises UsageError where `directory` holds a checkpoint or a run, for a sparsity that is not
    prunedNN, and for a checkpoint that is pruned already or has no calibration samples; GateError where the fraction
    cannot be met.
    """
    check_vacant(Path(directory))
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    (variant,) = plan_variants([Variant(format="onnx", sparsity=sparsity)], checkpoint, max_drop=100.0, strict=False)
    if not variant.pruned_fraction or checkpoint.spec.pruning is not None:
        raise UsageError(
            f"{checkpoint.name}: {sparsity} cannot be cut from it"
            + (": it is pruned already" if checkpoint.spec.pruning is not None else ""),
            hint="a dense checkpoint and prunedNN are wanted: pruned50, say",
        )
    title = f"{checkpoint.name}/{sparsity}"
    evaluation, calibration = checkpoint.samples("evaluation"), checkpoint.samples("calibration")
    assert evaluation is not None
    assert calibration is not None
    first = checkpoint.signature.inputs[0].name
    feed, lessons = (samples.feed(checkpoint.spec.preprocess, first) for samples in (evaluation, calibration))
    # A module object belongs to the caller.
    dense = checkpoint.build_module(copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model)
    check_module(dense, feed, checkpoint.signature, title=checkpoint.name)
    reference = eager_outputs(dense, feed, checkpoint.signature)
    pruned = prune(dense, fraction=variant.pruned_fraction, example=checkpoint.example(), title=title)
    inputs = tuple(to_tensor(np.array(lessons[spec.name])) for spec in checkpoint.signature.inputs)
    reestimate_batch_norms(pruned.module, inputs)
    task = open_task(checkpoint.spec.task)
    metrics: dict[str, float] = {}
    if evaluation.targets is not None:
        answers = eager_outputs(pruned.module, feed, checkpoint.signature)
        metrics[task.metric] = float(task.score(answers, evaluation.targets).mean())
    with DirectoryWriter(Path(directory)) as writer:
        files = {
            "weights": writer.add("weights.safetensors", weights_bytes(pruned.module)),
            "evaluation": writer.add("evaluation.safetensors", replace(evaluation, outputs=reference).to_bytes()),
            "calibration": writer.add("calibration.safetensors", calibration.to_bytes()),
        }
        origin = DenseOrigin(
            name=checkpoint.name, version=checkpoint.version, sha256=checkpoint_digest(checkpoint)
        )  # fmt: skip
        changes = {
            "created": datetime.now(UTC), "spec": checkpoint.spec.model_copy(update={"pruning": pruned.record}),
            "dense": origin, "metrics": metrics, "environment": describe_environment(), "files": files,
        }  # fmt: skip
        made = writer.commit(checkpoint.model_copy(update=changes))
    measured = "".join(f", {name} {value:.2%} before any fine-tuning" for name, value in metrics.items())
    say(f"{title}: {pruned.record.macs_removed:.1%} of the MACs removed{measured}")
    return made
