"""From a checkpoint to gated artifacts: prune, export, check parity and accuracy, then commit."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import JsonValue

from dlops import catalog
from dlops.adapters import Detector
from dlops.artifact import (
    Accuracy,
    Artifact,
    Parity,
    ParityCase,
    Provenance,
    Repair,
    Tolerance,
    Variant,
    Worth,
    open_artifact,
)
from dlops.checkpoint import Checkpoint, DenseOrigin, load_checkpoint
from dlops.console import say
from dlops.directory import DirectoryWriter
from dlops.environment import describe_environment
from dlops.errors import CorruptError, DlopsError, GateError, InputError, LossError, UsageError, from_os_error
from dlops.export import latency
from dlops.export.accuracy import at_chance, check_drop, measure_accuracy
from dlops.export.cases import check_cases, make_cases
from dlops.export.existing import unchanged_artifact
from dlops.export.formats import (
    BUDGET_S,
    Calibration,
    Exported,
    ExportRequest,
    check_no_machine_paths,
    portable_argument,
)
from dlops.export.latency import Fitted, fit_latency
from dlops.export.layers import Ranking, rank_layers
from dlops.export.module import check_module, eager_outputs
from dlops.export.origin import checkpoint_digest
from dlops.export.parity import check_variant
from dlops.export.plan import FROM_ONNX, check_disjoint, check_fitting, needs_calibration, plan_variants
from dlops.export.prune import prune
from dlops.export.quantize import spread
from dlops.export.raw_inputs import RawInputs, Size, plan_raw
from dlops.export.record import FILE_NAME, ROLE, ExportRecord, Settings, answers_of, embedded_in, record_export
from dlops.export.reduce import Lessons, reduced
from dlops.export.repair import repair_int8
from dlops.export.to_onnx import calibrated
from dlops.export.worth import narrowed_widths, parent_of, weigh, worth_text
from dlops.export.zeros import check_zeros
from dlops.manifest import Payload, sha256_of
from dlops.parity import run_batched, self_test
from dlops.preprocess import Preprocess
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.eager import choose_device
from dlops.runtimes.session import Device, Session
from dlops.samples import MAX_ARTIFACT_SAMPLES, Samples, row_fingerprints
from dlops.signature import Feed, Signature
from dlops.tasks import Task, open_task

if TYPE_CHECKING:
    from torch import nn

    from dlops.checkpoint import ModuleSource

SUFFIXES = {
    "torchscript": "pt", "onnx": "onnx", "torchexport": "pt2", "aotinductor": "pt2", "openvino": "xml",
    "executorch": "pte",
}  # fmt: skip
# The samples that an artifact carries are copied with it everywhere; large inputs come in smaller number.
MAX_CARRIED_BYTES = 16 * 1024 * 1024
MIN_CARRIED = 4
ACCURACY_BATCH = 64


def export_variants(
    checkpoint: Checkpoint | Path | str,
    *,
    variants: Sequence[Variant | str],
    out: Path | str = "artifacts",
    model: ModuleSource | None = None,
    max_drop: float = 1.0,
    strict: bool = False,
    calibration_method: Calibration = "minmax",
    repair: bool = True,
    worth: bool = False,
    image_size: Size | None = None,
    device: Device = "cpu",
    force: bool = False,
    recovery_budget_s: float = BUDGET_S,
    command: Sequence[str] = (),
) -> list[Artifact]:
    """Write `out/<name>/<slug>/` for each variant that passes its gates, and return those artifacts in order.

    variants: slugs or Variants. model: the module or a function that makes it, where the checkpoint names no builder.
    max_drop: percentage points of the task's metric that may be lost against the dense checkpoint; with `strict` the
    upper end of the 95 % interval must keep it too. calibration_method: how static int8 chooses the range of each
    activation (`activation_ranges` says what each does). repair: where int8 loses too much, return the layers at fault
    to fp32, as few as pass, and refuse only when none of them help. worth: time each variant that passed, for about a
    second, against what it was made of, and record whether it is faster or smaller; it decides nothing. image_size:
    (height, width) of all images that a variant of raw inputs is to take, for one that resizes or crops itself (left
    out, that stays outside of the file). device: where pruned models are recovered and the gates run. force: make a
    variant anew where it lies there already, unchanged, which is otherwise kept as it is.
    recovery_budget_s: how long a pruned or sparse model may take to recover, once for all of its variants.

    A variant that fails leaves an older artifact of it untouched, and the others are still made. Then GateError lists
    each that failed and why. Raises UsageError, before any work, for what cannot be made.
    """
    results = list(
        export_each(
            checkpoint, variants=variants, out=out, model=model, max_drop=max_drop, strict=strict,
            calibration_method=calibration_method, repair=repair, worth=worth, image_size=image_size,
            device=device, force=force, recovery_budget_s=recovery_budget_s, command=command,
        )
    )  # fmt: skip
    made = [result for _, result in results if isinstance(result, Artifact)]
    failed = {variant.slug: result for variant, result in results if isinstance(result, DlopsError)}
    if failed:
        _raise_failures(failed, made, planned=len(results))
    return made


def export_each(
    checkpoint: Checkpoint | Path | str,
    *,
    variants: Sequence[Variant | str],
    out: Path | str = "artifacts",
    model: ModuleSource | None = None,
    max_drop: float = 1.0,
    strict: bool = False,
    calibration_method: Calibration = "minmax",
    repair: bool = True,
    worth: bool = False,
    image_size: Size | None = None,
    device: Device = "cpu",
    force: bool = False,
    recovery_budget_s: float = BUDGET_S,
    command: Sequence[str] = (),
) -> Iterator[tuple[Variant, Artifact | GateError | UsageError]]:
    """`export_variants` one variant at a time: each with its artifact, or with the error that refused it."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    checkpoint_digest(checkpoint)
    planned = plan_variants(
        variants, checkpoint, max_drop=max_drop, strict=strict, calibration_method=calibration_method,
        recovery_budget_s=recovery_budget_s,
    )  # fmt: skip
    if image_size is not None and not any(variant.raw for variant in planned):
        raise UsageError(
            "an image size was given, and no variant takes raw images", hint="--embed-preprocess, or onnx-fp32-raw, say"
        )
    export = _Export(
        checkpoint, out=Path(out), model=model, max_drop=max_drop, strict=strict, repair=repair, worth=worth,
        device=device, force=force, command=command, calibrates=any(map(needs_calibration, planned)),
        calibration_method=calibration_method,
        raw=plan_raw(checkpoint, image_size=image_size) if any(variant.raw for variant in planned) else None,
        image_size=image_size, recovery_budget_s=recovery_budget_s,
    )  # fmt: skip
    for variant in planned:
        try:
            result: Artifact | GateError | UsageError = export.make(variant)
        except (GateError, UsageError) as error:
            say(f"{variant.slug}: not exported: {error.message}")
            result = error
        yield variant, result


def rank_variant(
    checkpoint: Checkpoint | Path | str,
    *,
    variant: Variant | str,
    model: ModuleSource | None = None,
    calibration_method: Calibration = "minmax",
    device: Device = "cpu",
) -> Ranking:
    """The layers of an int8 variant by the error that each of them adds. Nothing is exported.

    model, calibration_method, device: as for `export_variants`. Raises UsageError for a variant without quantized
    layers.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    (planned,) = plan_variants(
        [variant], checkpoint, max_drop=100.0, strict=False, calibration_method=calibration_method
    )
    if planned.precision != "int8" or planned.format not in FROM_ONNX:
        why = "by another quantizer" if planned.precision == "int8" else "none of its layers is quantized"
        raise UsageError(
            f"{planned.slug}: {why}, so there is no such error to explain",
            hint="onnx-int8 and openvino-int8 can be explained, each also with -prunedNN",
        )
    # The layers are those of the model inside, whatever is around it.
    planned = planned.model_copy(update={"raw": False})
    export = _Export(
        checkpoint, out=Path(), model=model, max_drop=100.0, strict=False, repair=False, worth=False, device=device,
        force=True, command=(), calibrates=True, calibration_method=calibration_method,
    )  # fmt: skip
    return export.rank(planned)


def prune_to_latency(
    checkpoint: Checkpoint | Path | str,
    *,
    variant: Variant | str,
    target_s: float,
    model: ModuleSource | None = None,
    calibration_method: Calibration = "minmax",
    device: Device = "cpu",
) -> Fitted:
    """Which pruning makes a dense `variant` answer one sample in at most `target_s` seconds (p50). Nothing is exported.

    Every candidate is cut, exported and timed in its runtime on this machine; recovery changes no shapes, so it waits
    for the export of the variant that is found. Raises GateError where no pruning is enough, UsageError for a variant
    that is not dense.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    if not 0 < target_s < float("inf"):
        raise UsageError(f"a latency of {target_s:g} s cannot be kept", hint="seconds above 0: 0.005, say")
    (planned,) = plan_variants(
        [variant], checkpoint, max_drop=100.0, strict=False, calibration_method=calibration_method
    )
    if planned.raw:
        raise UsageError(
            f"{planned.slug}: its preprocessing would be timed along", hint="search without -raw, then export with it"
        )
    if planned.sparsity:
        raise UsageError(f"{planned.slug} is pruned already", hint="name the dense variant: its pruning is searched")
    plan_variants([f"{planned.slug}-pruned50"], checkpoint, max_drop=100.0, strict=False)
    export = _Export(
        checkpoint, out=Path(), model=model, max_drop=100.0, strict=False, repair=False, worth=False, device=device,
        force=True, command=(), calibrates=True, calibration_method=calibration_method,
    )  # fmt: skip
    return fit_latency(planned, target_s=target_s, time_of=export.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Structure:
    """A module that variants are made of, and what it answers on the evaluation samples: the reference of parity.

    records, masks: as in Reduced; none of the dense module.
    """

    module: nn.Module
    reference: Feed
    notes: dict[str, JsonValue]
    records: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    captured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """What passed every gate, in a temporary folder still."""

    artifact: Artifact
    exported: Exported

    def noting(self, record: Repair) -> _Candidate:
        return replace(self, artifact=self.artifact.model_copy(update={"repair": record}))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Face:
    """What callers of a variant's file see: its signature, what is done outside of it, the evaluation samples so."""

    signature: Signature
    preprocess: Preprocess | None
    feed: Feed
    raw: RawInputs | None = None

    def reference(self, outputs: Feed) -> Feed:
        """What it is to answer where the module gives `outputs`."""
        return outputs if self.raw is None else self.raw.reference(outputs)


class _Export:
    """One checkpoint under export: what its variants share is made once."""

    def __init__(
        self, checkpoint: Checkpoint, *, out: Path, model: ModuleSource | None, max_drop: float, strict: bool,
        repair: bool, worth: bool, device: Device, force: bool, command: Sequence[str], calibrates: bool,
        calibration_method: Calibration, raw: RawInputs | None = None, image_size: Size | None = None,
        recovery_budget_s: float = BUDGET_S,
    ) -> None:  # fmt: skip
        self.checkpoint, self.out, self.signature = checkpoint, out, checkpoint.signature
        self.max_drop, self.strict, self.command, self.force = max_drop, strict, tuple(command), force
        self.calibration_method, self.repair, self.worth = calibration_method, repair, worth
        self.recovery_budget_s = recovery_budget_s
        self.options = SessionOptions(device=device)
        self.task: Task = open_task(checkpoint.spec.task)
        evaluation = checkpoint.samples("evaluation")
        assert evaluation is not None
        self.evaluation = evaluation
        self.feed = self._feed(evaluation)
        check_fitting(evaluation, self.feed, checkpoint, split="evaluation")
        self.calibration = checkpoint.samples("calibration") if calibrates else None
        self.calibration_feed = None if self.calibration is None else self._calibration_feed(self.calibration)
        # A module object belongs to the caller: weights are loaded into a copy of it.
        own = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model
        dense = checkpoint.build_module(own)
        check_module(dense, self.feed, self.signature, title=checkpoint.name)
        self.dense = _Structure(module=dense, reference=eager_outputs(dense, self.feed, self.signature), notes={})
        self.answers = answers_of(self.dense.reference)
        # A pruned checkpoint carries what the dense one that it was cut from answers.
        self.judge: Feed = self.dense.reference if checkpoint.dense is None else evaluation.outputs
        self._structures: dict[str | None, _Structure | DlopsError] = {None: self.dense}
        self.image_size, self.raw = image_size, raw
        self.raw_feed = None if raw is None else self._raw_feed(raw)
        # Last, so that it stands for all that was read from the directory above.
        self.digest = checkpoint_digest(checkpoint)
        self.notes = self._doubts()

    def make(self, variant: Variant) -> Artifact:
        """The committed artifact, or the one that lies there and would come out the same.

        Raises GateError or UsageError, and then nothing was written.
        """
        title = f"{self.checkpoint.name}/{variant.slug}"
        try:
            if kept := self._kept(variant):
                return kept
            artifact = self._make(variant, self._structure(variant), title)
        except OSError as error:
            raise from_os_error(error, doing=f"exporting {title}") from error
        say(_summary(artifact))
        return artifact

    def rank(self, variant: Variant) -> Ranking:
        """The layers of an int8 variant by the error that they add. Nothing is written."""
        title = f"{self.checkpoint.name}/{variant.slug}"
        try:
            return self._rank(variant, self._structure(variant), title)
        except OSError as error:
            raise from_os_error(error, doing=f"explaining {title}") from error

    def time(self, variant: Variant) -> float:
        """Its p50 for one sample, in seconds, in its runtime; pruned it is not recovered."""
        title = f"{self.checkpoint.name}/{variant.slug}"
        structure = self.dense
        if variant.pruned_fraction:
            cut = prune(
                structure.module, fraction=variant.pruned_fraction, example=self.checkpoint.example(), title=title
            )
            structure = _Structure(module=cut.module, reference={}, notes={})
        try:
            with tempfile.TemporaryDirectory(prefix="dlops-export-") as folder:
                exported = self._export(variant, structure, Path(folder), title, ())
                session = open_session(self._draft(variant, structure, exported), self.options)
                try:
                    return latency.p50_s(session, self.feed, budget_s=latency.TIMED_S)
                finally:
                    session.close()
        except OSError as error:
            raise from_os_error(error, doing=f"timing {title}") from error

    def _make(self, variant: Variant, structure: _Structure, title: str) -> Artifact:
        say(f"{variant.slug}: exporting")
        with tempfile.TemporaryDirectory(prefix="dlops-export-") as name:

            def attempt(excluded: tuple[str, ...]) -> _Candidate:
                return self._attempt(variant, structure, excluded, Path(name, str(len(excluded))), title)

            try:
                candidate = attempt(())
            except LossError as refusal:
                if not self._can_repair(variant, structure):
                    raise
                say(f"{refusal.message}; looking for the layers at fault")
                ranking = self._rank(variant, structure, title)
                repaired = repair_int8(attempt, refusal=refusal, ranking=ranking, slug=variant.slug)
                candidate = repaired.result.noting(repaired.record)
            artifact = candidate.artifact
            if self.worth:
                artifact = artifact.model_copy(update={"worth": self._weigh(artifact, structure, Path(name, "parent"))})
            return self._write(artifact, structure, candidate.exported, self._place(variant))

    def _weigh(self, artifact: Artifact, structure: _Structure, folder: Path) -> Worth | None:
        """Whether it is faster or smaller than its parent; null, with the reason said, where that cannot be told."""
        parent = parent_of(artifact.variant)
        # Of a pruned checkpoint the dense one, which it would be compared with, is not at hand.
        if parent is None or self.checkpoint.dense is not None:
            return None
        try:
            return weigh(
                artifact, self._parent(parent, folder), self._face(parent).feed, options=self.options,
                widths=narrowed_widths(structure.module, self.dense.module),
            )  # fmt: skip
        except DlopsError as error:
            say(f"{artifact.slug}: not compared with {parent.slug}: {error.message}")
            return None

    def _parent(self, variant: Variant, folder: Path) -> Artifact:
        """The one of this checkpoint that lies there, else one made in `folder` for this alone, past no gate."""
        place = self._place(variant)
        if (place / Artifact.file_name).is_file():
            try:
                found = open_artifact(place)
            except CorruptError as error:
                say(f"{variant.slug}: passed over: {error.message}")
            else:
                if found.provenance.checkpoint_sha256 == self.digest:
                    return found
        folder.mkdir()
        exported = self._export(variant, self.dense, folder, f"{self.checkpoint.name}/{variant.slug}", ())
        return self._draft(variant, self.dense, exported)

    def _attempt(
        self, variant: Variant, structure: _Structure, excluded: tuple[str, ...], folder: Path, title: str
    ) -> _Candidate:
        """Export into `folder` and ask every gate. Raises GateError, and then the folder is gone."""
        folder.mkdir()
        try:
            exported = self._export(variant, structure, folder, title, excluded)
            draft = self._draft(variant, structure, exported)
            checked = self._gate(draft, structure)
            final = self._write(checked, structure, exported, folder / "whole")
            # The samples are the user's own data, whatever their metadata say; the rest was written by us.
            written = [final.path(role) for role in final.files if role != "samples"]
            for path in (final.directory / Artifact.file_name, *written):
                check_no_machine_paths(path, title=title)
            session = open_session(open_artifact(final.directory), self.options)
            try:
                self_test(final, session)
            finally:
                session.close()
        except GateError:
            # Several attempts of a large model would fill the disk.
            shutil.rmtree(folder)
            raise
        return _Candidate(artifact=final, exported=exported)

    def _kept(self, variant: Variant) -> Artifact | None:
        if self.force:
            return None
        directory = self._place(variant)
        artifact = unchanged_artifact(directory, wanted=self._record(variant), options=self.options)
        if artifact is not None:
            say(f"{variant.slug}: already exported, unchanged: {directory}")
        return artifact

    def _place(self, variant: Variant) -> Path:
        return self.out / self.checkpoint.name / variant.slug

    def _face(self, variant: Variant) -> _Face:
        if not variant.raw:
            return _Face(signature=self.signature, preprocess=self.checkpoint.spec.preprocess, feed=self.feed)
        assert self.raw is not None
        assert self.raw_feed is not None
        return _Face(signature=self.raw.signature, preprocess=self.raw.outside, feed=self.raw_feed, raw=self.raw)

    def _raw_feed(self, raw: RawInputs) -> Feed:
        try:
            return raw.feed(self.evaluation)
        except InputError as error:
            raise UsageError(
                f"{self.checkpoint.name}: the raw evaluation samples do not fit a model that takes raw inputs: "
                f"{error.message}",
                hint="all images must have the size that --image-size names; without it resizing stays outside",
            ) from None

    def _record(self, variant: Variant) -> ExportRecord:
        static_int8 = variant.precision == "int8" and variant.format in FROM_ONNX
        return record_export(
            self.checkpoint, variant, sha256=self.digest, calibration=self.calibration,
            answers=self.answers, command=self.command,
            settings=Settings(
                max_drop=self.max_drop, strict=self.strict, device=self.options.device,
                # What has no ranges to choose, and no layers to return, comes out the same by any.
                calibration_method=self.calibration_method if static_int8 else "minmax",
                repair=self.repair if static_int8 else True,
                image_size=self.image_size if variant.raw else None,
                recovery_budget_s=self.recovery_budget_s if variant.sparsity else BUDGET_S,
            ),
        )  # fmt: skip

    def _can_repair(self, variant: Variant, structure: _Structure) -> bool:
        """Whether int8 is what loses too much, and layers may be returned: pruning may have lost it before."""
        if variant.precision != "int8" or variant.format not in FROM_ONNX or not self.repair:
            return False
        plain = self._face(variant.model_copy(update={"raw": False}))
        accuracy = self._accuracy(structure.reference, plain)
        try:
            if accuracy is not None:
                check_drop(accuracy, title=variant.slug)
        except LossError as error:
            say(f"{variant.slug}: the same in fp32 is refused, too, so no layer is at fault: {error.message}")
            return False
        return True

    def _rank(self, variant: Variant, structure: _Structure, title: str) -> Ranking:
        with tempfile.TemporaryDirectory(prefix="dlops-export-") as folder:
            request = self._request(variant, structure, Path(folder), title)
            assert request.calibration is not None
            return rank_layers(calibrated(request), request.calibration, self.signature)

    def _structure(self, variant: Variant) -> _Structure:
        sparsity = variant.sparsity
        if sparsity not in self._structures:
            try:
                self._structures[sparsity] = self._reduced(variant)
            except (GateError, UsageError) as error:
                self._structures[sparsity] = error
        found = self._structures[sparsity]
        if isinstance(found, DlopsError):
            raise found
        return found

    def _reduced(self, variant: Variant) -> _Structure:
        if self.checkpoint.dense is not None:
            return self._cut_already(self.checkpoint.dense)
        assert self.calibration is not None
        assert self.calibration_feed is not None
        lessons = Lessons(
            calibration=self.calibration,
            feed=self.calibration_feed,
            device=choose_device(self.options),
            budget_s=self.recovery_budget_s,
        )
        found = reduced(self.dense.module, variant, self.checkpoint, lessons)
        check_module(found.module, self.feed, self.signature, title=str(variant.sparsity))
        return _Structure(
            module=found.module,
            reference=eager_outputs(found.module, self.feed, self.signature),
            notes=found.notes,
            records=found.records,
            masks=found.masks,
        )

    def _cut_already(self, origin: DenseOrigin) -> _Structure:
        """The checkpoint as it is: it was pruned before, and trained since."""
        record = self.checkpoint.spec.pruning
        assert record is not None
        return replace(
            self.dense,
            notes={"macs_removed": record.macs_removed, "dense_checkpoint_sha256": origin.sha256},
            records={"pruning": record.model_dump_json()},
        )

    def _export(
        self, variant: Variant, structure: _Structure, folder: Path, title: str, excluded: tuple[str, ...]
    ) -> Exported:
        request = replace(self._request(variant, structure, folder, title), excluded=excluded)
        exported: Exported = catalog.resolve(catalog.FORMATS, "format", variant.format)(request)
        for path in exported.files.values():
            check_no_machine_paths(path, title=title)
        if structure.masks:
            found = check_zeros(exported.path, variant.format, structure.masks, title=title)
            exported = replace(exported, notes={**exported.notes, **found})
        return exported

    def _request(self, variant: Variant, structure: _Structure, folder: Path, title: str) -> ExportRequest:
        face = self._face(variant)
        return ExportRequest(
            module=copy.deepcopy(structure.module),
            signature=self.signature,
            variant=variant,
            into=folder / f"model.{SUFFIXES[variant.format]}",
            title=title,
            calibration=self.calibration_feed if variant.precision == "int8" else None,
            calibration_method=self.calibration_method,
            captured=structure.captured,
            embedded=embedded_in(
                self.checkpoint, variant, sha256=self.digest, signature=face.signature, preprocess=face.preprocess
            ),
            raw=face.raw,
            device=self.options.device,
        )

    def _draft(self, variant: Variant, structure: _Structure, exported: Exported) -> Artifact:
        """The artifact as the runtime needs it, before anything was measured; it is never written."""
        face = self._face(variant)
        nothing = Parity(
            provider="", batches=(), samples=0, max_abs=0, max_rel=0, sqnr_db=None, agreement=0, tolerance=Tolerance()
        )
        return Artifact(
            name=self.checkpoint.name,
            version=self.checkpoint.version,
            created=datetime.now(UTC),
            variant=variant,
            signature=face.signature,
            preprocess=face.preprocess,
            labels=self.checkpoint.spec.labels,
            task=self.checkpoint.spec.task,
            requires=_required(variant, structure.module),
            parity=nothing,
            accuracy=None,
            provenance=Provenance(
                checkpoint=portable_argument(str(self.checkpoint.directory.resolve())),
                checkpoint_sha256=self.digest,
                environment=describe_environment(),
                command=tuple(portable_argument(argument) for argument in self.command),
                notes={**self.notes, **structure.notes, **exported.notes},
            ),
            files={role: _payload(path) for role, path in exported.files.items()},
        ).located_at(exported.path.parent)

    def _gate(self, draft: Artifact, structure: _Structure) -> Artifact:
        """Parity against the same structure, then accuracy against the dense checkpoint."""
        session, face = open_session(draft, self.options), self._face(draft.variant)
        try:
            parity = check_variant(
                session, face.feed, face.reference(structure.reference), task=self.task,
                precision=draft.variant.precision, title=draft.title,
            )  # fmt: skip
            if face.raw is None:
                parity = parity.model_copy(update={"cases": self._cases(session, structure, draft, parity.tolerance)})
            outputs = run_batched(session, face.feed, min(ACCURACY_BATCH, self.signature.max_batch))
            accuracy = self._accuracy(outputs, face)
        finally:
            session.close()
        if accuracy is not None:
            check_drop(accuracy, title=draft.title)
        return draft.model_copy(update={"parity": parity, "accuracy": accuracy})

    def _cases(
        self, session: Session, structure: _Structure, draft: Artifact, tolerance: Tolerance
    ) -> tuple[ParityCase, ...]:
        """Parity at other sizes and at the edges; the references are made once a structure."""
        if "cases" not in structure.captured:
            structure.captured["cases"] = make_cases(structure.module, self.feed, self.signature)
        return check_cases(
            session, structure.captured["cases"], task=self.task, precision=draft.variant.precision,
            tolerance=tolerance, title=draft.title,
        )  # fmt: skip

    def _accuracy(self, outputs: Feed, face: _Face) -> Accuracy | None:
        if self.evaluation.targets is None:
            return None
        return measure_accuracy(
            face.reference(self.judge), outputs, self.evaluation.targets, task=self.task,
            max_drop=self.max_drop, strict=self.strict,
        )  # fmt: skip

    def _write(self, artifact: Artifact, structure: _Structure, exported: Exported, directory: Path) -> Artifact:
        with DirectoryWriter(directory) as writer:
            files = {
                **_stored(writer, exported),
                "samples": writer.add("samples.safetensors", self._carried(artifact.variant, structure).to_bytes()),
                ROLE: writer.add(FILE_NAME, self._record(artifact.variant).to_json().encode()),
            }
            for role, record in structure.records.items():
                files[role] = writer.add(f"{role}.json", record.encode())
            return writer.commit(artifact.model_copy(update={"files": files}))

    def _carried(self, variant: Variant, structure: _Structure) -> Samples:
        """Real inputs for any machine to check itself with: raw, tensors, and what the reference answered."""
        face = self._face(variant)
        size = sum(array[0].nbytes for array in face.feed.values()) * (1 if self.checkpoint.spec.preprocess else 2)
        size += sum(array[0].nbytes for array in structure.reference.values())
        limit = max(MIN_CARRIED, min(MAX_ARTIFACT_SAMPLES, MAX_CARRIED_BYTES // max(size, 1)))
        chosen = [int(i) for i in spread({"index": np.arange(len(self.evaluation))}, limit)["index"]]
        taken = self.evaluation.take(chosen)
        return Samples(
            raw=taken.raw,
            inputs={name: array[chosen] for name, array in face.feed.items()},
            outputs={name: array[chosen] for name, array in face.reference(structure.reference).items()},
            targets=taken.targets,
        )

    def _calibration_feed(self, calibration: Samples) -> Feed:
        """Its tensors, which must fit the model and be other ones than those that accuracy is measured on."""
        feed, specs = self._feed(calibration), self.signature.inputs
        check_fitting(calibration, feed, self.checkpoint, split="calibration")
        check_disjoint(row_fingerprints(feed, specs), row_fingerprints(self.feed, specs), title=self.checkpoint.name)
        return feed

    def _doubts(self) -> dict[str, JsonValue]:
        """What makes the accuracy gate say little, said now and noted in every artifact."""
        if self.evaluation.targets is None:
            say(
                f"WARNING: the evaluation samples of {self.checkpoint.name} have no targets: accuracy is not measured, "
                f"and max_drop {self.max_drop:g} holds nothing back; parity alone is checked"
            )
            return {"accuracy": "not measured: the evaluation samples have no targets"}
        dense = float(self.task.score(self.judge, self.evaluation.targets).mean())
        if self.task.name != "classification" or not at_chance(self.judge, dense):
            return {}
        say(
            f"WARNING: the dense checkpoint {self.checkpoint.name} scores {dense:.2%} {self.task.metric}, no better "
            "than guessing: that a variant loses nothing against it says nothing. Is it trained, are the targets right?"
        )
        return {"dense_accuracy": f"{dense:.2%}: no better than guessing"}

    def _feed(self, samples: Samples) -> Feed:
        return samples.feed(self.checkpoint.spec.preprocess, self.signature.inputs[0].name)


def _stored(writer: DirectoryWriter, exported: Exported) -> dict[str, Payload]:
    """The model's files among the payloads, by role."""
    if exported.together:
        payloads = writer.add_together("model", list(exported.files.values()))
        return dict(zip(exported.files, payloads, strict=True))
    extra = {role: writer.add_file(f"{role}{path.suffix}", path) for role, path in exported.extra.items()}
    return {"model": writer.add_file(exported.path.name, exported.path), **extra}


def _required(variant: Variant, module: nn.Module) -> tuple[str, ...]:
    """The packages that running the file takes."""
    packages = catalog.REQUIREMENTS[variant.format]
    return (*packages, "torchvision") if variant.format == "torchscript" and isinstance(module, Detector) else packages


def _payload(path: Path) -> Payload:
    return Payload(path=path.name, sha256=sha256_of(path), bytes=path.stat().st_size)


def _raise_failures(failed: Mapping[str, DlopsError], made: list[Artifact], *, planned: int) -> None:
    if planned == 1:
        raise next(iter(failed.values()))
    reasons = "; ".join(f"{slug}: {error.message}" for slug, error in failed.items())
    kept = f"; exported: {', '.join(artifact.slug for artifact in made)}" if made else ""
    hints = dict.fromkeys(error.hint for error in failed.values() if error.hint)
    raise GateError(
        f"{len(failed)} of {planned} variants were not exported: {reasons}{kept}", hint="; ".join(hints) or None
    )


def _summary(artifact: Artifact) -> str:
    parity, accuracy = artifact.parity, artifact.accuracy
    exact = "equal" if parity.sqnr_db is None else f"{parity.sqnr_db:.0f} dB"
    parts: list[Any] = [f"{artifact.slug}: {artifact.model_bytes / 1e6:.2f} MB", f"parity {exact}"]
    if accuracy is not None:
        parts.append(
            f"{accuracy.metric} {accuracy.value:.2%}, {accuracy.drop_points:+.2f} points lost "
            f"({accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f}), {accuracy.flips} flips"
        )
    if artifact.repair is not None:
        parts.append(f"{len(artifact.repair.layers)} of {artifact.repair.of} layers in fp32")
    summary = " · ".join(parts)
    return summary if artifact.worth is None else f"{summary}\n  {worth_text(artifact.worth)}"
