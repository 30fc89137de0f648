"""What every variant of a checkpoint must pass: parity with its own structure, then accuracy against the dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dlops.console import say
from dlops.errors import GateError, LossError
from dlops.export.accuracy import at_chance, check_drop, measure_accuracy
from dlops.export.cases import check_cases, make_cases
from dlops.export.parity import check_variant, measure_own_error
from dlops.parity import has_own_error, is_ill_conditioned, own_error_text, run_batched
from dlops.tasks import open_task

if TYPE_CHECKING:
    from pydantic import JsonValue

    from dlops.artifact import Accuracy, Artifact, OwnError, Parity, ParityCase, Tolerance
    from dlops.checkpoint import Checkpoint
    from dlops.export.face import Face
    from dlops.export.structures import Structure
    from dlops.runtimes.session import Session
    from dlops.samples import Samples
    from dlops.signature import Feed

ACCURACY_BATCH = 64


class Gates:
    """Those of one checkpoint. max_drop: percentage points that may be lost; strict: by the interval's upper end."""

    def __init__(
        self, checkpoint: Checkpoint, evaluation: Samples, face: Face, judge: Feed, *, max_drop: float, strict: bool
    ) -> None:
        """face: the one that takes tensors. judge: what the dense checkpoint answers on the evaluation samples."""
        self._name, self._signature = checkpoint.name, checkpoint.signature
        self._task = open_task(checkpoint.spec.task)
        self._targets, self._face, self._judge = evaluation.targets, face, judge
        self._max_drop, self._strict = max_drop, strict

    def check(self, draft: Artifact, session: Session, structure: Structure, face: Face) -> Artifact:
        """The draft with what was found. Raises GateError, LossError for the parity and the accuracy."""
        parity = self._parity(draft, session, structure, face)
        outputs = run_batched(session, face.feed, min(ACCURACY_BATCH, self._signature.max_batch))
        accuracy = self._accuracy(outputs, face)
        if accuracy is not None:
            check_drop(accuracy, title=draft.title)
        return draft.model_copy(update={"parity": parity, "accuracy": accuracy})

    def passes_unquantized(self, structure: Structure, slug: str) -> bool:
        """Whether the structure in fp32 keeps its accuracy: else pruning has lost it, and no layer's precision."""
        accuracy = self._accuracy(structure.reference, self._face)
        try:
            if accuracy is not None:
                check_drop(accuracy, title=slug)
        except LossError as error:
            say(f"{slug}: the same in fp32 is refused, too, so no layer is at fault: {error.message}")
            return False
        return True

    def doubts(self) -> dict[str, JsonValue]:
        """What makes the accuracy gate say little, said now, to be noted in every artifact."""
        if self._targets is None:
            say(
                f"WARNING: the evaluation samples of {self._name} have no targets: accuracy is not measured, "
                f"and max_drop {self._max_drop:g} holds nothing back; parity alone is checked"
            )
            return {"accuracy": "not measured: the evaluation samples have no targets"}
        dense = float(self._task.score(self._judge, self._targets).mean())
        if self._task.name != "classification" or not at_chance(self._judge, dense):
            return {}
        say(
            f"WARNING: the dense checkpoint {self._name} scores {dense:.2%} {self._task.metric}, no better "
            "than guessing: that a variant loses nothing against it says nothing. Is it trained, are the targets right?"
        )
        return {"dense_accuracy": f"{dense:.2%}: no better than guessing"}

    def _parity(self, draft: Artifact, session: Session, structure: Structure, face: Face) -> Parity:
        """By the fixed tolerance; where fp32 breaks that, by one with room for the module's own error."""
        try:
            return self._compared(draft, session, structure, face)
        except LossError as refusal:
            if not has_own_error(self._task.name, draft.variant.precision):
                raise
            own = self._own_error(structure, face, draft.slug)
            if isinstance(own, GateError):
                unmeasured = f"{refusal.message}; the module's own error was not measured: {own.message}"
                raise LossError(unmeasured, hint=refusal.hint) from refusal
            try:
                parity = self._compared(draft, session, structure, face, own)
            except LossError as error:
                hint = (
                    "rounding alone moves its answers that far on any machine: is it trained, and are its inputs "
                    "scaled as in training?" if is_ill_conditioned(own) else error.hint
                )  # fmt: skip
                raise LossError(f"{error.message}; {own_error_text(own)}", hint=hint) from error
        bounds = parity.tolerance
        say(f"{draft.slug}: {own_error_text(own)}, so its bounds are {bounds.max_abs:.2g} and {bounds.max_rel:.2g}")
        return parity

    def _compared(
        self, draft: Artifact, session: Session, structure: Structure, face: Face, own: OwnError | None = None
    ) -> Parity:
        parity = check_variant(
            session, face.feed, face.reference(structure.reference), task=self._task,
            precision=draft.variant.precision, title=draft.title, own=own,
        )  # fmt: skip
        if face.raw is not None:
            return parity
        return parity.model_copy(update={"cases": self._cases(session, structure, draft, parity.tolerance)})

    def _own_error(self, structure: Structure, face: Face, slug: str) -> OwnError | GateError:
        """Once for all variants of a structure that answer alike; the error where it cannot be measured."""
        key = f"own error, {'plain' if face.raw is None else 'raw'}"
        if key not in structure.captured:
            say(f"{slug}: beyond the tolerance of fp32; how far is eager fp32 from float64?")
            try:
                structure.captured[key] = measure_own_error(
                    structure, self._face.feed, face, self._signature, task=self._task
                )
            except GateError as error:
                structure.captured[key] = error
        found: OwnError | GateError = structure.captured[key]
        return found

    def _cases(
        self, session: Session, structure: Structure, draft: Artifact, tolerance: Tolerance
    ) -> tuple[ParityCase, ...]:
        """Parity at other sizes and at the edges; the references are made once a structure."""
        if "cases" not in structure.captured:
            structure.captured["cases"] = make_cases(structure.module, self._face.feed, self._signature)
        return check_cases(
            session, structure.captured["cases"], task=self._task, precision=draft.variant.precision,
            tolerance=tolerance, title=draft.title,
        )  # fmt: skip

    def _accuracy(self, outputs: Feed, face: Face) -> Accuracy | None:
        if self._targets is None:
            return None
        return measure_accuracy(
            face.reference(self._judge), outputs, self._targets, task=self._task, max_drop=self._max_drop,
            strict=self._strict,
        )  # fmt: skip
