"""One checkpoint under export: each variant is made in a temporary folder, gated there, repaired, then committed."""

from __future__ import annotations

import copy
import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dlops import catalog
from dlops.adapters import Detector
from dlops.artifact import Artifact, Parity, Provenance, Repair, Tolerance, Variant, Worth, open_artifact
from dlops.console import say
from dlops.directory import DirectoryWriter, check_writable
from dlops.environment import describe_environment
from dlops.errors import CorruptError, DlopsError, GateError, LossError, from_os_error
from dlops.export import latency
from dlops.export.contents import carried_samples, stored_files
from dlops.export.existing import unchanged_artifact
from dlops.export.face import Face, raw_face
from dlops.export.formats import (
    BUDGET_S,
    Calibration,
    Exported,
    ExportRequest,
    check_no_machine_paths,
    portable_argument,
)
from dlops.export.gates import Gates
from dlops.export.independence import check_independent
from dlops.export.layers import Ranking, rank_layers
from dlops.export.module import check_module
from dlops.export.origin import checkpoint_digest
from dlops.export.plan import STATIC, check_disjoint, check_fitting, is_layered, needs_calibration
from dlops.export.raw_inputs import Size, plan_raw
from dlops.export.record import FILE_NAME, ROLE, ExportRecord, Settings, answers_of, embedded_in, record_export
from dlops.export.reduce import Lessons
from dlops.export.repair import repair_layers
from dlops.export.structures import Structure, Structures
from dlops.export.summary import summary
from dlops.export.to_onnx import quantizer_of
from dlops.export.worth import narrowed_widths, parent_of, weigh
from dlops.export.zeros import check_zeros
from dlops.manifest import Payload, sha256_of
from dlops.parity import self_test
from dlops.runtimes import SessionOptions, open_session
from dlops.runtimes.eager import choose_device
from dlops.runtimes.session import Device
from dlops.samples import Samples, row_fingerprints
from dlops.signature import Feed
from dlops.tasks import open_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dlops.checkpoint import Checkpoint, ModuleSource

SUFFIXES = {
    "torchscript": "pt", "onnx": "onnx", "torchexport": "pt2", "aotinductor": "pt2", "openvino": "xml",
    "executorch": "pte", "tensorrt": "engine",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of all variants of one export; `export_variants` says what each means."""

    max_drop: float = 1.0
    strict: bool = False
    calibration_method: Calibration = "minmax"
    repair: bool = True
    worth: bool = False
    image_size: Size | None = None
    device: Device = "cpu"
    force: bool = False
    recovery_budget_s: float = BUDGET_S
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """What passed every gate, in a temporary folder still."""

    artifact: Artifact
    exported: Exported

    def noting(self, record: Repair) -> _Candidate:
        return replace(self, artifact=self.artifact.model_copy(update={"repair": record}))


class Export:
    """One checkpoint under export: what its variants share is made once."""

    def __init__(
        self, checkpoint: Checkpoint, variants: Sequence[Variant], *, out: Path, model: ModuleSource | None,
        asked: Asked,
    ) -> None:  # fmt: skip
        """variants: planned. model: as for `export_variants`.

        Raises UsageError where the checkpoint's samples do not fit it, or what is asked does not fit the samples.
        """
        self.checkpoint, self.out, self.asked, self.signature = checkpoint, out, asked, checkpoint.signature
        self.options = SessionOptions(device=asked.device)
        raw = plan_raw(checkpoint, image_size=asked.image_size) if any(variant.raw for variant in variants) else None
        evaluation = checkpoint.samples("evaluation")
        assert evaluation is not None
        self.evaluation, feed = evaluation, self._feed(evaluation)
        check_fitting(evaluation, feed, checkpoint, split="evaluation")
        self.plain = Face(signature=self.signature, preprocess=checkpoint.spec.preprocess, feed=feed)
        self.calibration = checkpoint.samples("calibration") if any(map(needs_calibration, variants)) else None
        self.calibration_feed = None if self.calibration is None else self._calibration_feed(self.calibration)
        # A module object belongs to the caller: weights are loaded into a copy of it.
        own = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model
        dense = checkpoint.build_module(own)
        check_module(dense, feed, self.signature, title=checkpoint.name)
        self.structures = Structures(checkpoint, dense, feed, self._lessons())
        reference = self.structures.dense.reference
        check_independent(
            dense, feed, reference, self.signature, task=open_task(checkpoint.spec.task), title=checkpoint.name
        )
        self.answers = answers_of(reference)
        # A pruned checkpoint carries what the dense one that it was cut from answers.
        judge = reference if checkpoint.dense is None else evaluation.outputs
        self.gates = Gates(checkpoint, evaluation, self.plain, judge, max_drop=asked.max_drop, strict=asked.strict)
        self.raw = None if raw is None else raw_face(raw, evaluation, checkpoint)
        # Last, so that it stands for all that was read from the directory above.
        self.digest = checkpoint_digest(checkpoint)
        self.notes = self.gates.doubts()

    def make(self, variant: Variant) -> Artifact:
        """The committed artifact, or the one that lies there and would come out the same.

        Raises GateError or UsageError, and then nothing was written.
        """
        title = f"{self.checkpoint.name}/{variant.slug}"
        try:
            if kept := self._kept(variant):
                return kept
            # Before the work, which may be minutes of recovery.
            check_writable(self.place(variant), what=title)
            artifact = self._make(variant, self.structures.of(variant), title)
        except OSError as error:
            raise from_os_error(error, doing=f"exporting {title}") from error
        say(summary(artifact))
        return artifact

    def rank(self, variant: Variant) -> Ranking:
        """The layers of a quantized variant by the error that they add. Nothing is written."""
        title = f"{self.checkpoint.name}/{variant.slug}"
        try:
            return self._rank(variant, self.structures.of(variant), title)
        except OSError as error:
            raise from_os_error(error, doing=f"explaining {title}") from error

    def time(self, variant: Variant) -> float:
        """Its p50 for one sample, in seconds, in its runtime; pruned it is not recovered."""
        title = f"{self.checkpoint.name}/{variant.slug}"
        structure = self.structures.unrecovered(variant, title)
        try:
            with tempfile.TemporaryDirectory(prefix="dlops-export-") as folder:
                exported = self._export(variant, structure, Path(folder), title, ())
                session = open_session(self._draft(variant, structure, exported), self.options)
                try:
                    return latency.p50_s(session, self.plain.feed, budget_s=latency.TIMED_S)
                finally:
                    session.close()
        except OSError as error:
            raise from_os_error(error, doing=f"timing {title}") from error

    def _make(self, variant: Variant, structure: Structure, title: str) -> Artifact:
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
                repaired = repair_layers(attempt, refusal=refusal, ranking=ranking, slug=variant.slug)
                candidate = repaired.result.noting(repaired.record)
            artifact = candidate.artifact
            if self.asked.worth:
                artifact = artifact.model_copy(update={"worth": self._weigh(artifact, structure, Path(name, "parent"))})
            return self._write(artifact, structure, candidate.exported, self.place(variant))

    def _weigh(self, artifact: Artifact, structure: Structure, folder: Path) -> Worth | None:
        """Whether it is faster or smaller than its parent; null, with the reason said, where that cannot be told."""
        parent = parent_of(artifact.variant)
        # Of a pruned checkpoint the dense one, which it would be compared with, is not at hand.
        if parent is None or self.checkpoint.dense is not None:
            return None
        try:
            return weigh(
                artifact, self._parent(parent, folder), self._face(parent).feed, options=self.options,
                widths=narrowed_widths(structure.module, self.structures.dense.module),
            )  # fmt: skip
        except DlopsError as error:
            say(f"{artifact.slug}: not compared with {parent.slug}: {error.message}")
            return None

    def _parent(self, variant: Variant, folder: Path) -> Artifact:
        """The one of this checkpoint that lies there, else one made in `folder` for this alone, past no gate."""
        place = self.place(variant)
        if (place / Artifact.file_name).is_file():
            try:
                found = open_artifact(place)
            except CorruptError as error:
                say(f"{variant.slug}: passed over: {error.message}")
            else:
                if found.provenance.checkpoint_sha256 == self.digest:
                    return found
        folder.mkdir()
        exported = self._export(variant, self.structures.dense, folder, f"{self.checkpoint.name}/{variant.slug}", ())
        return self._draft(variant, self.structures.dense, exported)

    def _attempt(
        self, variant: Variant, structure: Structure, excluded: tuple[str, ...], folder: Path, title: str
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
        if self.asked.force:
            return None
        directory = self.place(variant)
        artifact = unchanged_artifact(directory, wanted=self._record(variant), options=self.options)
        if artifact is not None:
            say(f"{variant.slug}: already exported, unchanged: {directory}")
        return artifact

    def place(self, variant: Variant) -> Path:
        return self.out / self.checkpoint.name / variant.slug

    def _face(self, variant: Variant) -> Face:
        if not variant.raw:
            return self.plain
        assert self.raw is not None
        return self.raw

    def _lessons(self) -> Lessons | None:
        if self.calibration is None or self.calibration_feed is None:
            return None
        return Lessons(
            calibration=self.calibration,
            feed=self.calibration_feed,
            device=choose_device(self.options),
            budget_s=self.asked.recovery_budget_s,
        )

    def _record(self, variant: Variant) -> ExportRecord:
        layered = is_layered(variant)
        return record_export(
            self.checkpoint, variant, sha256=self.digest, calibration=self.calibration,
            answers=self.answers, command=self.asked.command,
            settings=Settings(
                max_drop=self.asked.max_drop, strict=self.asked.strict, device=self.options.device,
                # What has no ranges to choose, and no layers to return, comes out the same by any.
                calibration_method=(
                    self.asked.calibration_method if layered and variant.precision in STATIC else "minmax"
                ),
                repair=self.asked.repair if layered else True,
                image_size=self.asked.image_size if variant.raw else None,
                recovery_budget_s=self.asked.recovery_budget_s if variant.sparsity else BUDGET_S,
            ),
        )  # fmt: skip

    def _can_repair(self, variant: Variant, structure: Structure) -> bool:
        """Whether quantization is what loses too much, and layers may be returned."""
        if not is_layered(variant) or not self.asked.repair:
            return False
        if "calibration" not in self.checkpoint.files:
            say(f"{variant.slug}: no calibration samples in the checkpoint, by which to look for layers at fault")
            return False
        return self.gates.passes_unquantized(structure, variant.slug)

    def _rank(self, variant: Variant, structure: Structure, title: str) -> Ranking:
        with tempfile.TemporaryDirectory(prefix="dlops-export-") as folder:
            request = self._request(variant, structure, Path(folder), title)
            # Says which package is missing, if one is.
            catalog.resolve(catalog.FORMATS, "format", variant.format)
            if variant.format == "executorch":
                from dlops.export.layers_executorch import rank_program

                return rank_program(request, self._ranking_feed())
            return rank_layers(quantizer_of(request), self._ranking_feed(), self.signature)

    def _export(
        self, variant: Variant, structure: Structure, folder: Path, title: str, excluded: tuple[str, ...]
    ) -> Exported:
        request = replace(self._request(variant, structure, folder, title), excluded=excluded)
        exported: Exported = catalog.resolve(catalog.FORMATS, "format", variant.format)(request)
        for path in exported.files.values():
            check_no_machine_paths(path, title=title)
        if structure.masks:
            file = exported.source or exported.path
            found = check_zeros(file, variant.format, structure.masks, title=title)
            exported = replace(exported, notes={**exported.notes, **found})
        return exported

    def _request(self, variant: Variant, structure: Structure, folder: Path, title: str) -> ExportRequest:
        face = self._face(variant)
        return ExportRequest(
            module=copy.deepcopy(structure.module),
            signature=self.signature,
            variant=variant,
            into=folder / f"model.{SUFFIXES[variant.format]}",
            title=title,
            calibration=self.calibration_feed if variant.precision in STATIC else None,
            calibration_method=self.asked.calibration_method,
            captured=structure.captured,
            embedded=embedded_in(
                self.checkpoint, variant, sha256=self.digest, signature=face.signature, preprocess=face.preprocess
            ),
            raw=face.raw,
            device=self.options.device,
        )

    def _draft(self, variant: Variant, structure: Structure, exported: Exported) -> Artifact:
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
                command=tuple(portable_argument(argument) for argument in self.asked.command),
                notes={**self.notes, **structure.notes, **exported.notes},
            ),
            files={role: _payload(path) for role, path in exported.files.items()},
        ).located_at(exported.path.parent)

    def _gate(self, draft: Artifact, structure: Structure) -> Artifact:
        session = open_session(draft, self.options)
        try:
            return self.gates.check(draft, session, structure, self._face(draft.variant))
        finally:
            session.close()

    def _write(self, artifact: Artifact, structure: Structure, exported: Exported, directory: Path) -> Artifact:
        carried = carried_samples(
            self.evaluation, self._face(artifact.variant), structure.reference,
            preprocess=self.checkpoint.spec.preprocess,
        )  # fmt: skip
        with DirectoryWriter(directory) as writer:
            files = {
                **stored_files(writer, exported),
                "samples": writer.add("samples.safetensors", carried.to_bytes()),
                ROLE: writer.add(FILE_NAME, self._record(artifact.variant).to_json().encode()),
            }
            for role, record in structure.records.items():
                files[role] = writer.add(f"{role}.json", record.encode())
            return writer.commit(artifact.model_copy(update={"files": files}))

    def _ranking_feed(self) -> Feed:
        """Calibration samples, which a variant that is made without them is ranked on all the same."""
        if self.calibration_feed is None:
            calibration = self.checkpoint.samples("calibration")
            assert calibration is not None
            self.calibration_feed = self._calibration_feed(calibration)
        return self.calibration_feed

    def _calibration_feed(self, calibration: Samples) -> Feed:
        """Its tensors, which must fit the model and be other ones than those that accuracy is measured on."""
        feed, specs = self._feed(calibration), self.signature.inputs
        check_fitting(calibration, feed, self.checkpoint, split="calibration")
        check_disjoint(
            row_fingerprints(feed, specs), row_fingerprints(self.plain.feed, specs), title=self.checkpoint.name
        )
        return feed

    def _feed(self, samples: Samples) -> Feed:
        return samples.feed(self.checkpoint.spec.preprocess, self.signature.inputs[0].name)


def _required(variant: Variant, module: nn.Module) -> tuple[str, ...]:
    """The packages that running the file takes."""
    packages = catalog.REQUIREMENTS[variant.format]
    return (*packages, "torchvision") if variant.format == "torchscript" and isinstance(module, Detector) else packages


def _payload(path: Path) -> Payload:
    return Payload(path=path.name, sha256=sha256_of(path), bytes=path.stat().st_size)
