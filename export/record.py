"""reproduce.json: what decided an export. Enough to make the variant again, or to see that it need not be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationError

from dlops.artifact import Artifact, Variant
from dlops.checkpoint import Checkpoint
from dlops.embedded import Embedded
from dlops.environment import describe_environment
from dlops.errors import CorruptError, UsageError, from_os_error
from dlops.export.formats import BUDGET_S, Calibration, portable_argument
from dlops.export.plan import STATIC, needs_calibration
from dlops.manifest import MAX_MANIFEST_BYTES, Record, Sha256, explain_validation
from dlops.preprocess import Preprocess
from dlops.runtimes.session import Device
from dlops.samples import Samples
from dlops.signature import Array, Feed, Signature

ROLE = "reproduce"
FILE_NAME = "reproduce.json"
# Those of the environment that write the file, calibrate it or decide whether it passes.
_PACKAGES = (
    "dlops", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino",
    "executorch", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "torchao", "torch-pruning", "numpy", "pillow",
)  # fmt: skip
# Of an output, as much as tells apart two modules that give the same numbers in another order.
_FIRST_VALUES = 16
# Of the largest value: other thread counts and processors move sums by less, a module that was edited by more.
_SAME_ANSWER = 1e-4


class CheckpointUsed(Record):
    """path: for a person to recognise. sha256: of its manifest, which decides."""

    name: str
    version: str
    path: str
    sha256: Sha256


class Settings(Record):
    """The arguments of `export_variants` that decide the outcome, under their names there."""

    max_drop: float = Field(ge=0, le=100)
    strict: bool
    calibration_method: Calibration = "minmax"
    repair: bool = True
    image_size: tuple[int, int] | None = None
    device: Device
    recovery_budget_s: float = Field(BUDGET_S, gt=0)


class CalibrationUsed(Record):
    """samples: in the checkpoint. sha256: of their file. method: of int8's ranges, else null."""

    samples: int
    sha256: Sha256
    method: str | None


class Machine(Record):
    """gpus: with their drivers, empty where the export was told to keep to the CPU."""

    machine: str
    cpu: str
    instruction_sets: tuple[str, ...]
    cores: int
    gpus: tuple[str, ...]


class Answer(Record):
    """One output of the dense module over all evaluation samples. first: the leading values of the first sample."""

    mean: float
    std: float
    largest: float
    first: tuple[float, ...]

    def is_near(self, other: Answer) -> bool:
        """Whether two runs of the same code on the same weights may differ so."""
        mine, others = ([one.mean, one.std, one.largest, *one.first] for one in (self, other))
        size = max(abs(self.largest), abs(other.largest))
        return len(mine) == len(others) and bool(np.allclose(mine, others, rtol=0, atol=_SAME_ANSWER * size))


class ExportRecord(Record):
    """answers: what the dense module gives, by output; the code of a person's own module shows in nothing else.

    seeds: by what draws from them. packages: name to version, Python among them.
    """

    newest_schema: ClassVar[int] = 1

    kind: Literal["reproduce"] = "reproduce"
    schema_version: int = Field(1, alias="schema", ge=1)
    command: tuple[str, ...]
    checkpoint: CheckpointUsed
    variant: Variant
    settings: Settings
    calibration: CalibrationUsed | None
    seeds: dict[str, int]
    packages: dict[str, str]
    machine: Machine
    answers: dict[str, Answer]

    def to_json(self) -> str:
        """The file's text."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    def differences(self, now: ExportRecord) -> list[str]:
        """What decides the outcome and is other in `now`, a clause each; empty where it would come out the same."""
        found = _changed({"variant": self.variant.slug}, {"variant": now.variant.slug})
        if self.checkpoint.sha256 != now.checkpoint.sha256:
            before, after = (f"{one.checkpoint.name} {one.checkpoint.sha256[:12]}…" for one in (self, now))
            found.append(f"checkpoint {before}, now {after}")
        elif self.answers.keys() != now.answers.keys() or any(
            not answer.is_near(now.answers[name]) for name, answer in self.answers.items()
        ):
            found.append("the module answers otherwise with the same weights: its code was changed")
        found += _changed(self.settings.model_dump(), now.settings.model_dump())
        found += _changed(_calibration(self), _calibration(now))
        found += _changed(
            {f"seed of {name}": seed for name, seed in self.seeds.items()},
            {f"seed of {name}": seed for name, seed in now.seeds.items()},
        )
        found += _changed(self.packages, now.packages)
        return found + _changed(_kind_of_machine(self), _kind_of_machine(now))

    def circumstances(self, now: ExportRecord) -> list[str]:
        """What may move last bits and decides nothing: which processor of its kind, and how many cores."""
        before, after = self.machine, now.machine
        return _changed({"CPU": before.cpu, "cores": before.cores}, {"CPU": after.cpu, "cores": after.cores})


def record_export(
    checkpoint: Checkpoint, variant: Variant, *, sha256: str, calibration: Samples | None, settings: Settings,
    answers: Mapping[str, Answer], command: Sequence[str],
) -> ExportRecord:  # fmt: skip
    """What an export of `variant` would record now.

    sha256: of the manifest that was loaded. calibration: its samples, where the variant needs them. answers: by
    `answers_of` from the dense module.
    """
    environment = describe_environment()
    return ExportRecord(
        command=tuple(portable_argument(argument) for argument in command),
        checkpoint=CheckpointUsed(
            name=checkpoint.name,
            version=checkpoint.version,
            path=portable_argument(str(checkpoint.directory.resolve())),
            sha256=sha256,
        ),
        variant=variant,
        settings=settings,
        calibration=_calibration_of(checkpoint, variant, calibration, settings.calibration_method),
        seeds={"recovery": checkpoint.seed or 0} if variant.sparsity else {},
        packages={
            "python": environment.python,
            **{name: version for name, version in environment.packages.items() if name in _PACKAGES},
        },
        machine=Machine(
            machine=environment.machine,
            cpu=environment.cpu,
            instruction_sets=environment.instruction_sets,
            cores=environment.cores,
            gpus=environment.gpus if settings.device != "cpu" else (),
        ),
        answers=dict(answers),
    )


def answers_of(reference: Feed) -> dict[str, Answer]:
    """By output. reference: what the dense module gives on all evaluation samples."""
    return {name: _answer(array) for name, array in reference.items()}


def embedded_in(
    checkpoint: Checkpoint, variant: Variant, *, sha256: str, signature: Signature, preprocess: Preprocess | None
) -> Embedded:
    """What the model file of `variant` says of itself. signature, preprocess: the file's, with what is outside it."""
    return Embedded(
        name=checkpoint.name,
        version=checkpoint.version,
        variant=variant.slug,
        task=checkpoint.spec.task,
        labels=checkpoint.spec.labels,
        preprocess=preprocess,
        signature=signature,
        checkpoint_sha256=sha256,
    )


def read_record(artifact: Artifact) -> ExportRecord:
    """The record beside an artifact, whose digests were checked when it was opened.

    Raises UsageError where an older dlops wrote none, CorruptError where it cannot be read or is another artifact's.
    """
    if ROLE not in artifact.files:
        raise UsageError(
            f"{artifact.title}: it has no {FILE_NAME}: an older dlops exported it",
            hint="export it again from its checkpoint",
        )
    path = artifact.path(ROLE)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES)
        document = json.loads(text)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: truncated or not JSON ({error})", hint="export it again") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, int) and schema > ExportRecord.newest_schema:
        raise CorruptError(
            f"{path}: schema {schema} is newer than this dlops reads ({ExportRecord.newest_schema})",
            hint=f"it was written by dlops {artifact.provenance.dlops_version}: upgrade to that",
        )
    try:
        record = ExportRecord.model_validate_json(text)
    except ValidationError as error:
        raise CorruptError(f"{path}: not one that dlops wrote: {explain_validation(error)}") from None
    if (record.variant, record.checkpoint.sha256) != (artifact.variant, artifact.provenance.checkpoint_sha256):
        raise CorruptError(f"{path}: it is the record of another artifact than {artifact.title}")
    return record


def _calibration_of(
    checkpoint: Checkpoint, variant: Variant, samples: Samples | None, method: Calibration
) -> CalibrationUsed | None:
    if not needs_calibration(variant):
        return None
    assert samples is not None
    return CalibrationUsed(
        samples=len(samples),
        sha256=checkpoint.files["calibration"].sha256,
        method=method if variant.precision in STATIC else None,
    )


def _answer(array: Array) -> Answer:
    values = np.asarray(array, np.float64)
    return Answer(
        mean=float(values.mean()),
        std=float(values.std()),
        largest=float(np.abs(values).max()),
        first=tuple(float(value) for value in values[0].ravel()[:_FIRST_VALUES]),
    )


def _calibration(record: ExportRecord) -> dict[str, object]:
    used = record.calibration
    return {} if used is None else {"calibration samples": used.sha256[:12], "calibration method": used.method}


def _kind_of_machine(record: ExportRecord) -> dict[str, object]:
    machine = record.machine
    return {
        "machine": machine.machine,
        "instruction sets": ", ".join(machine.instruction_sets) or "none",
        "GPUs": ", ".join(machine.gpus) or "none",
    }


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    return [
        f"{name} {before.get(name, 'none')}, now {after.get(name, 'none')}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, "none") != after.get(name, "none")
    ]
