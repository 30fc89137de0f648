"""An artifact checked again on this machine; without torch where its format does not need it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from dlops.artifact import Accuracy, Artifact, Parity, open_artifact
from dlops.checkpoint import Checkpoint
from dlops.errors import GateError, UsageError
from dlops.export.accuracy import check_drop, measure_accuracy
from dlops.export.origin import checkpoint_digest
from dlops.export.raw_inputs import answers
from dlops.manifest import Record
from dlops.parity import run_batched, self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.session import Session
from dlops.tasks import open_task

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource

_BATCH = 64
_DEFAULT_MAX_DROP = 1.0
# How far the dense checkpoint's metric may be from the recorded one, in percentage points.
_REFERENCE_POINTS = 0.5


class Verification(Record):
    """What held on this machine. accuracy: null where no checkpoint was given to measure it with."""

    artifact: str
    parity: Parity
    accuracy: Accuracy | None

    def summary(self) -> str:
        """The finding for a person, a line each."""
        parity = self.parity
        exact = "equal to the last bit" if parity.sqnr_db is None else f"signal to noise {parity.sqnr_db:.0f} dB"
        batches = " and ".join(str(size) for size in parity.batches)
        lines = [
            f"{self.artifact}: verified on {parity.provider}",
            f"  files: digests match; {parity.samples} samples: raw to tensor, tensor to output at batch {batches}",
            f"  outputs: {exact}, largest error {parity.max_abs:.2g}; {parity.agreement:.1%} of the decisions stay",
        ]
        if (found := self.accuracy) is not None:
            lines.append(
                f"  {found.metric}: {found.value:.2%} on {found.samples} samples, {found.drop_points:+.2f} points lost "
                f"({found.drop_low:+.2f} to {found.drop_high:+.2f}), {found.flips} decisions flipped"
            )
        return "\n".join(lines)


def verify_artifact(
    artifact: Artifact | Path | str,
    *,
    options: SessionOptions | None = None,
    checkpoint: Checkpoint | None = None,
    model: ModuleSource | None = None,
) -> Verification:
    """Digests, raw → tensor, tensor → output on the samples that the artifact carries, on this machine.

    With the checkpoint that it was made from, accuracy too, on all its evaluation samples (model: as for
    export_variants), and what the dense checkpoint scores is compared with what the artifact records of it. Raises
    CorruptError for an altered file, GateError for what the artifact no longer keeps.
    """
    # Read again where it was opened already: what is verified is the file as it is now.
    artifact = open_artifact(artifact.directory if isinstance(artifact, Artifact) else artifact)
    if checkpoint is not None:
        _check_origin(artifact, checkpoint)
    session = open_session(artifact, options)
    try:
        parity = self_test(artifact, session)
        accuracy = None if checkpoint is None else _accuracy(artifact, session, checkpoint, model)
    finally:
        session.close()
    if accuracy is not None:
        _check_reference(artifact, accuracy)
        check_drop(accuracy, title=artifact.title)
    return Verification(artifact=artifact.title, parity=parity, accuracy=accuracy)


def _check_origin(artifact: Artifact, checkpoint: Checkpoint) -> None:
    if checkpoint_digest(checkpoint) != artifact.provenance.checkpoint_sha256:
        raise UsageError(
            f"{artifact.title} was not made from the checkpoint in {checkpoint.directory}",
            hint=f"it was made from {artifact.provenance.checkpoint}",
        )


def _check_reference(artifact: Artifact, found: Accuracy) -> None:
    """Raise GateError where the dense checkpoint does not score here what the artifact says that it scored."""
    recorded = artifact.accuracy
    if recorded is None:
        return
    # Another CPU may decide a tie the other way.
    allowed = max(_REFERENCE_POINTS / 100, 1 / found.samples)
    if found.samples == recorded.samples and abs(found.reference - recorded.reference) <= allowed + 1e-9:
        return
    raise GateError(
        f"{artifact.title}: the dense checkpoint's {found.metric} is {found.reference:.2%} on {found.samples} samples "
        f"here, the artifact records {recorded.reference:.2%} on {recorded.samples}",
        hint="its record does not belong to this checkpoint, or torch computes otherwise here: export it again",
    )


def _accuracy(
    artifact: Artifact, session: Session, checkpoint: Checkpoint, model: ModuleSource | None
) -> Accuracy | None:
    import torch

    from dlops.export.module import eager_outputs

    evaluation = checkpoint.samples("evaluation")
    if evaluation is None or evaluation.targets is None:
        raise UsageError(f"checkpoint {checkpoint.name!r} has no evaluation samples with targets to measure with")
    feed = evaluation.feed(checkpoint.spec.preprocess, checkpoint.signature.inputs[0].name)
    if checkpoint.dense is not None:
        # It is pruned itself, and carries what the dense one answers.
        dense = evaluation.outputs
    else:
        own = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model
        dense = eager_outputs(checkpoint.build_module(own), feed, checkpoint.signature)
    if artifact.variant.raw:
        assert artifact.preprocess is not None
        dense = answers(dense[checkpoint.signature.outputs[0].name])
        feed = {artifact.signature.inputs[0].name: artifact.preprocess.batch(evaluation.raw)}
    outputs = run_batched(session, feed, min(_BATCH, artifact.signature.max_batch))
    recorded = artifact.accuracy
    return measure_accuracy(
        dense,
        outputs,
        evaluation.targets,
        task=open_task(artifact.task),
        max_drop=recorded.max_drop if recorded else _DEFAULT_MAX_DROP,
        strict=recorded.strict if recorded else False,
    )
