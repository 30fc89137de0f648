"""An exported model with its manifest, ready to serve: written by export, read by everything after it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, JsonValue

from dlops import catalog
from dlops.checkpoint import NAME_PATTERN
from dlops.environment import Environment
from dlops.errors import UsageError, unknown_name
from dlops.manifest import Manifest, Record, Sha256, newest_manifest, read_manifest
from dlops.preprocess import Preprocess
from dlops.samples import Samples, read_samples
from dlops.signature import Signature
from dlops.version import __version__

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8dyn", "int8wo", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "int8dyn", "int8wo", "fp8")
# The roles of files that are the model: the second one where a format keeps its weights beside the graph, or has to.
MODEL_ROLES = ("model", "weights")
_RAW = "raw"
_SPARSITY = re.compile(r"^(pruned|sparse)([0-9]{2})$")


class Variant(Record):
    """format × precision × sparsity; `slug` names the artifact's folder.

    sparsity: None for dense, "prunedNN" (NN % of the dense model's MACs removed), "sparseNN" or "sparse24". raw: the
    file takes raw inputs and gives probabilities and labels: what scales and normalizes is in it.
    """

    format: str = Field(pattern=r"^[a-z0-9]+$")
    precision: Precision = "fp32"
    sparsity: str | None = Field(None, pattern=_SPARSITY.pattern)
    raw: bool = False

    @property
    def slug(self) -> str:
        parts = (self.format, self.precision, self.sparsity, _RAW if self.raw else None)
        return "-".join(part for part in parts if part)

    @property
    def pruned_fraction(self) -> float:
        """Fraction of the dense model's MACs to remove, 0 where it is not pruned."""
        match = _SPARSITY.fullmatch(self.sparsity or "")
        return int(match[2]) / 100 if match and match[1] == "pruned" else 0.0

    @classmethod
    def parse(cls, slug: str) -> Self:
        """From `<format>-<precision>[-<sparsity>][-raw]`. Raises UsageError naming every part that is wrong."""
        rest = slug.removesuffix(f"-{_RAW}")
        form, named, sparsity = [*rest.split("-", 2), None, None][:3]
        precision, where = "fp32" if named is None else named, f"variant {slug!r}"
        wrong: list[UsageError] = []
        if form not in catalog.FORMATS:
            wrong.append(unknown_name("format", str(form), catalog.FORMATS, where=where))
        if precision not in PRECISIONS:
            wrong.append(unknown_name("precision", precision, PRECISIONS, where=where))
        try:
            check_sparsity(sparsity, where=where)
        except UsageError as error:
            wrong.append(error)
        if wrong:
            hints = "; ".join(error.hint for error in wrong if error.hint)
            raise UsageError("; ".join(error.message for error in wrong), hint=hints)
        return cls.model_validate({"format": form, "precision": precision, "sparsity": sparsity, "raw": rest != slug})


def check_sparsity(sparsity: str | None, *, where: str) -> None:
    """Raise UsageError unless it is None, prunedNN, sparseNN or sparse24."""
    if sparsity is not None and not (_SPARSITY.fullmatch(sparsity) and sparsity[-2:] != "00"):
        raise UsageError(
            f"{where}: unknown sparsity {sparsity!r}",
            hint="prunedNN (NN % of the MACs removed), sparseNN (NN % of the weights zero), or sparse24 (2 of every 4)",
        )


class Tolerance(Record):
    """What parity demands. A null bound is not asked of this precision.

    max_abs: of the output, over the reference's standard deviation where that is above 1. max_rel: the largest error
    over the largest reference value. min_sqnr_db: signal-to-quantization-noise ratio. min_agreement: fraction of
    the decisions that stay. min_iou: intersection over union from which on two boxes are the same.
    """

    max_abs: float | None = None
    max_rel: float | None = None
    min_sqnr_db: float | None = None
    min_agreement: float | None = None
    min_iou: float | None = None


class OwnError(Record):
    """How far eager fp32 is from what the same module answers in float64, over `samples` real inputs.

    The fields are Parity's.
    """

    samples: int
    max_abs: float
    max_rel: float


class ParityCase(Record):
    """What came out for inputs other than the samples themselves: of another size, black, saturated, tiny or huge.

    The fields are Parity's. held: whether the tolerance was demanded here; where not (8 bits at the edges, or a
    module whose own rounding there comes near the tolerance), only that no NaN or infinity comes out.
    """

    name: str
    samples: int
    max_abs: float
    max_rel: float
    sqnr_db: float | None
    agreement: float
    held: bool


class Parity(Record):
    """How far an artifact's outputs are from the eager fp32 module's, over `samples` real inputs at each batch.

    provider: what truly ran. The errors are the worst over all batches and outputs. cases: other inputs than those.
    own_error: measured where fp32 breaks the fixed tolerance; the recorded one follows from it. Null: not measured.
    """

    provider: str
    batches: tuple[int, ...]
    samples: int
    max_abs: float
    max_rel: float
    sqnr_db: float | None
    agreement: float
    tolerance: Tolerance
    cases: tuple[ParityCase, ...] = ()
    own_error: OwnError | None = None


class Accuracy(Record):
    """The task's metric against the dense checkpoint's, paired on the same samples.

    value, reference: fractions. drop_points: percentage points lost, with its 95 % interval low and high.
    flips: samples with a decision that differs.
    """

    metric: str
    samples: int
    value: float
    reference: float
    drop_points: float
    drop_low: float
    drop_high: float
    flips: int
    max_drop: float
    strict: bool


class FloatLayer(Record):
    """A layer of an int8 model that stays in fp32. weights: elements.

    alone_db: SQNR of the model's outputs where this layer alone was int8, on calibration samples; null without any
    error. share: of the error power that all layers added, each alone, in [0, 1].
    """

    name: str
    operator: str
    weights: int
    alone_db: float | None
    share: float


class Repair(Record):
    """Why and how layers of an int8 model were returned to fp32.

    because: what the gate said of the model with all of them in int8. layers: worst first. of: the number of layers
    that were int8. float_share: fraction of their weights that is fp32 now. tries: how often the gates were asked on
    the evaluation samples, the first time included; the last of several answers on the same samples is a flattered one.
    """

    because: str
    layers: tuple[FloatLayer, ...]
    of: int
    float_share: float
    tries: int


Verdict = Literal["both", "faster", "smaller", "neither", "unsure"]


class Worth(Record):
    """Whether the variant is faster or smaller than `parent`, a slug, on the machine that exported it.

    speed: the parent's median latency over this one's at `batch`, in turns, with its 95 % interval. size: the parent's
    bytes over this one's. verdict: faster where all of the interval is above 1; "unsure" where it is no smaller and the
    machine was too unsteady to say that it is no faster. reason: why it is not faster, as far as the runtime tells;
    null where it is, or where nothing was found.
    """

    parent: str
    batch: int
    speed: float
    speed_low: float
    speed_high: float
    size: float
    verdict: Verdict
    reason: str | None


class Provenance(Record):
    """checkpoint_sha256: of the manifest it was made from. notes: what the export did that one should know."""

    checkpoint: str
    checkpoint_sha256: Sha256
    dlops_version: str = __version__
    environment: Environment
    command: tuple[str, ...] = ()
    notes: dict[str, JsonValue] = {}


class Artifact(Manifest):
    """artifact.json: files hold the roles model and samples, and weights where the model is two files.

    repair: null where no layer had to be returned to fp32. worth: null where it was not compared.
    """

    file_name: ClassVar[str] = "artifact.json"
    required_roles: ClassVar[tuple[str, ...]] = ("model", "samples")

    kind: Literal["artifact"] = "artifact"
    schema_version: int = Field(1, alias="schema", ge=1)
    name: str = Field(pattern=NAME_PATTERN)
    version: str = "1"
    variant: Variant
    signature: Signature
    preprocess: Preprocess | None
    labels: tuple[str, ...] = ()
    task: str
    requires: tuple[str, ...]
    parity: Parity
    accuracy: Accuracy | None
    provenance: Provenance
    repair: Repair | None = None
    worth: Worth | None = None

    @property
    def slug(self) -> str:
        return self.variant.slug

    @property
    def title(self) -> str:
        """`<name>/<slug>`, as a person calls it."""
        return f"{self.name}/{self.slug}"

    @property
    def model_bytes(self) -> int:
        """Size of the model file, and of the one beside it with its weights where there is one."""
        return sum(self.files[role].bytes for role in MODEL_ROLES if role in self.files)

    def samples(self) -> Samples:
        """At most 32 real inputs, with preprocessed tensors and the reference's outputs."""
        return read_samples(self.path("samples"))


def open_artifact(path: Path | str) -> Artifact:
    """The artifact in a directory (or at its artifact.json), its digests checked."""
    path = Path(path)
    artifact = read_manifest(path.parent if path.name == Artifact.file_name else path, Artifact)
    if artifact.variant.format not in catalog.FORMATS:
        raise unknown_name("format", artifact.variant.format, catalog.FORMATS, where=str(path))
    return artifact


def newest_artifact(root: Path | str = "artifacts") -> Artifact:
    """The artifact under `root` with the latest `created`, its digests checked."""
    return newest_manifest(Path(root), Artifact, make_one="make one: dlops export, or dlops quickstart for a demo")
