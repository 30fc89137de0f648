"""What a folder holds, said for a person and for a machine: one checkpoint, artifact or report, or all under a root."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from dlops.artifact import Accuracy, Artifact, FloatLayer, Parity, Repair, Worth
from dlops.checkpoint import Checkpoint
from dlops.errors import CorruptError, DlopsError, UsageError
from dlops.manifest import Manifest, Record, check_payload, read_manifest
from dlops.preprocess import Preprocess
from dlops.report import Calibration, Measurement, Report
from dlops.signature import DimRange, Signature

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = Literal["checkpoint", "artifact", "report"]
KINDS: Mapping[Kind, type[Checkpoint] | type[Artifact] | type[Report]] = {
    "checkpoint": Checkpoint,
    "artifact": Artifact,
    "report": Report,
}
# Where the commands put each kind, below the working folder.
FOLDERS: Mapping[Kind, str] = {"checkpoint": "runs", "artifact": "artifacts", "report": "reports"}


class FileState(Record):
    """One payload. problem: what is wrong with it, null where its size and SHA-256 are the manifest's."""

    role: str
    path: str
    bytes: int
    sha256: str
    problem: str | None


class Description(Record):
    """What a folder holds. facts: the manifest's content by heading, each line under its name."""

    kind: Kind
    title: str
    directory: str
    created: datetime
    facts: dict[str, dict[str, str]]
    files: tuple[FileState, ...]
    manifest: dict[str, JsonValue]

    @property
    def is_whole(self) -> bool:
        """Whether every file is the one that the manifest names."""
        return all(file.problem is None for file in self.files)

    def to_json(self) -> str:
        """kind, directory, the files with what is wrong with them, and the manifest as it is on disk."""
        return self.model_dump_json(indent=2, exclude={"facts"})

    def check(self) -> None:
        """Raise CorruptError naming every file that is not what the manifest says."""
        problems = [state.problem for state in self.files if state.problem is not None]
        if problems:
            raise CorruptError("; ".join(problems), hint="copy the whole directory again, or make it again")

    def render(self) -> RenderableType:
        """For a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [
            Text.assemble((f"{self.kind} {self.title}", "bold"), f"\n{self.directory}\nmade {_when(self.created)}")
        ]
        for heading, lines in self.facts.items():
            table = Table(show_header=False, title=heading, title_justify="left")
            for name, value in lines.items():
                table.add_row(Text(name), Text(value))
            parts.append(table)
        files = Table("role", "file", "size", "SHA-256", title="Files", title_justify="left")
        for file in self.files:
            state = Text(file.problem, "bold red") if file.problem else Text(f"{file.sha256[:16]}… matches", "green")
            files.add_row(Text(file.role), Text(file.path), Text(size_text(file.bytes)), state)
        return Group(*parts, files)


class Entry(Record):
    """One folder of a listing. summary: a few words on it. problem: why it cannot be used, null where it can."""

    kind: Kind
    path: str
    title: str
    created: datetime | None
    bytes: int
    summary: str
    problem: str | None = None


class Listing(Record):
    """All that lies under `root`, newest first, the damaged ones after those."""

    root: str
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    def render(self) -> RenderableType:
        """For a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        if not self.entries:
            return Text(f"No checkpoints, artifacts or reports under {self.root}. Make some: dlops quickstart")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("made", no_wrap=True)
        # A path is there to be copied: it is folded where it must be, never cut.
        table.add_column("folder", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        for entry in self.entries:
            what = Text(entry.problem, "bold red") if entry.problem else Text(entry.summary)
            made = entry.created.astimezone().strftime("%m-%d %H:%M") if entry.created else "?"
            size = size_text(entry.bytes) if entry.created else "?"
            # An artifact's folder is its title already.
            named = Text("" if entry.kind == "artifact" else f"{entry.title}: ")
            table.add_row(made, Text(entry.path), size, named + what)
        return table


def describe(path: Path | str) -> Description:
    """What the folder (or its manifest file) is, every file's digest checked.

    A damaged file is reported in `files`, not raised. Raises UsageError where there is no manifest, CorruptError where
    it cannot be read.
    """
    path = Path(path)
    kind, directory = _kind_of(path)
    manifest = read_manifest(directory, KINDS[kind], verify=False)
    return Description(
        kind=kind,
        title=_title(manifest),
        directory=str(directory),
        created=manifest.created,
        facts=_facts(manifest),
        files=tuple(_file_state(manifest, role) for role in manifest.files),
        manifest=manifest.model_dump(mode="json", by_alias=True),
    )


def list_all(root: Path | str = ".") -> Listing:
    """The checkpoints under runs/, artifacts under artifacts/ and reports under reports/ of `root`.

    A damaged one is named with the reason: its manifest cannot be read, or a file is missing or of another size.
    Digests are left to `describe`. Raises UsageError where `root` is not a directory.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root}: not a directory", hint="name the working folder, which has runs/ and artifacts/")
    entries = [
        _entry(kind, path.parent, root)
        for kind, folder in FOLDERS.items()
        for path in sorted((root / folder).rglob(KINDS[kind].file_name))
    ]
    entries.sort(key=lambda entry: entry.created.timestamp() if entry.created else 0.0, reverse=True)
    return Listing(root=str(root.resolve()), entries=tuple(entries))


def size_text(count: int) -> str:
    """A number of bytes in the unit that a person would use."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _kind_of(path: Path) -> tuple[Kind, Path]:
    found: list[Kind] = []
    for kind, type_ in KINDS.items():
        if path.name == type_.file_name and path.is_file():
            return kind, path.parent
        if (path / type_.file_name).is_file():
            found.append(kind)
    if not found:
        problem = "no checkpoint, artifact or report there" if path.exists() else "no such file or directory"
        raise UsageError(f"{path}: {problem}", hint="dlops list shows what there is under the working folder")
    if len(found) > 1:
        raise UsageError(
            f"{path}: a {' and a '.join(found)} in one folder",
            hint=f"name the file: {path / KINDS[found[0]].file_name}, say",
        )
    return found[0], path


def _file_state(manifest: Manifest, role: str) -> FileState:
    payload = manifest.files[role]
    problem = None
    try:
        check_payload(manifest.path(role), payload, role=role)
    except DlopsError as error:
        problem = error.message
    return FileState(role=role, path=payload.path, bytes=payload.bytes, sha256=payload.sha256, problem=problem)


def _entry(kind: Kind, directory: Path, root: Path) -> Entry:
    path = str(directory.relative_to(root))
    try:
        manifest = read_manifest(directory, KINDS[kind], verify=False)
    except DlopsError as error:
        return Entry(
            kind=kind, path=path, title=directory.name, created=None, bytes=0, summary="", problem=error.message
        )
    size = sum(payload.bytes for payload in manifest.files.values())
    return Entry(
        kind=kind, path=path, title=_title(manifest), created=manifest.created, bytes=size,
        summary=_summary(manifest), problem=_quick_problem(manifest),
    )  # fmt: skip


def _quick_problem(manifest: Manifest) -> str | None:
    """What a look at names and sizes finds wrong, without reading gigabytes."""
    for role, payload in manifest.files.items():
        path = manifest.path(role)
        if not path.is_file():
            return f"{payload.path}: the {role} file is missing"
        if path.stat().st_size != payload.bytes:
            return f"{payload.path}: {path.stat().st_size} bytes where the manifest says {payload.bytes}"
    return None


def _title(manifest: Manifest) -> str:
    match manifest:
        case Artifact() | Report():
            return manifest.title
        case Checkpoint():
            return manifest.name
        case _:
            raise TypeError(f"{type(manifest).__name__} is none of {', '.join(KINDS)}")


def _summary(manifest: Manifest) -> str:
    match manifest:
        case Artifact():
            found = manifest.accuracy
            if found is None:
                return f"parity on {manifest.parity.provider}"
            poor = manifest.worth is not None and manifest.worth.verdict == "neither"
            marked = ", neither faster nor smaller" if poor else ""
            return f"{found.value:.2%}, {found.drop_points + 0.0:.2f} points lost{marked}"
        case Checkpoint():
            numbers = {name: value for name, value in manifest.metrics.items() if isinstance(value, float)}
            return ", ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:3])
        case Report():
            steady = sum(measurement.verdict.steady for measurement in manifest.measurements)
            partial = ", cut short" if manifest.partial else ""
            return f"{len(manifest.measurements)} measurements, {steady} steady{partial}"
        case _:
            raise TypeError(f"{type(manifest).__name__} is none of {', '.join(KINDS)}")


def _facts(manifest: Manifest) -> dict[str, dict[str, str]]:
    match manifest:
        case Artifact():
            return _artifact_facts(manifest)
        case Checkpoint():
            return _checkpoint_facts(manifest)
        case Report():
            return {
                "Report": {
                    "command": " ".join(manifest.command),
                    "made on": manifest.environment.cpu,
                    "calibration": _calibration_text(manifest.calibration),
                },
                "Measurements": {
                    f"{place}. {measurement.target}, batch {measurement.load.batch}": _measurement_text(measurement)
                    for place, measurement in enumerate(manifest.measurements, start=1)
                },
            }
        case _:
            raise TypeError(f"{type(manifest).__name__} is none of {', '.join(KINDS)}")


def _checkpoint_facts(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    spec = checkpoint.spec
    pruned = f"{spec.pruning.macs_removed:.0%} of the MACs removed" if spec.pruning else "no"
    return {
        "Model": {
            "version": checkpoint.version,
            "builder": spec.builder or f"none: a person's own module ({spec.source})",
            "arguments": _values(spec.kwargs),
            "task": spec.task,
            "labels": labels_text(spec.labels),
            "pruned": pruned,
        },
        "Signature": signature_lines(checkpoint.signature),
        "Preprocessing": preprocess_lines(spec.preprocess),
        "Training": {
            "recipe": checkpoint.recipe or "none: saved from a script",
            "config": _values(checkpoint.config),
            "metrics": _values(checkpoint.metrics),
            "seed": "not recorded" if checkpoint.seed is None else str(checkpoint.seed),
            "made on": f"{checkpoint.environment.cpu}, dlops {checkpoint.dlops_version}",
        },
    }


def _artifact_facts(artifact: Artifact) -> dict[str, dict[str, str]]:
    variant, made = artifact.variant, artifact.provenance
    return {
        "Model": {
            "version": artifact.version,
            "variant": f"{variant.format}, {variant.precision}, {variant.sparsity or 'dense'}"
            + (", takes raw inputs" if variant.raw else ""),
            "task": artifact.task,
            "labels": labels_text(artifact.labels),
            "needs": ", ".join(artifact.requires),
        },
        "Signature": signature_lines(artifact.signature),
        "Preprocessing": preprocess_lines(artifact.preprocess),
        "Parity": _parity_lines(artifact.parity),
        "Accuracy": {
            "against the checkpoint": _accuracy_text(artifact.accuracy) if artifact.accuracy else "not measured"
        },
        **({"Worth it": _worth_lines(artifact.worth)} if artifact.worth else {}),
        **({"Layers in fp32": _repair_lines(artifact.repair)} if artifact.repair else {}),
        "Provenance": {
            "checkpoint": f"{made.checkpoint} (manifest SHA-256 {made.checkpoint_sha256[:16]}…)",
            "command": " ".join(made.command) or "not recorded",
            "made on": f"{made.environment.cpu}, dlops {made.dlops_version}",
            **{name: _value(value) for name, value in made.notes.items()},
        },
    }


def signature_lines(signature: Signature) -> dict[str, str]:
    def span(limits: DimRange) -> str:
        return str(limits.min) if limits.min == limits.max else f"{limits.min} to {limits.max}"

    return {
        **{
            f"{side} {spec.name}": f"{spec.dtype}[{', '.join(str(dim) for dim in spec.shape)}]"
            for side, specs in (("input", signature.inputs), ("output", signature.outputs))
            for spec in specs
        },
        **{name: span(limits) for name, limits in signature.dims.items()},
    }


def preprocess_lines(preprocess: Preprocess | None) -> dict[str, str]:
    if preprocess is None:
        return {"none": "the model takes tensors as they are"}
    steps = {
        f"{place}. {step.kind}": _values(step.model_dump(mode="json", exclude={"kind"}))
        for place, step in enumerate(preprocess.steps, start=1)
    }
    return {"from": preprocess.input, **steps, "to": f"{preprocess.dtype}{list(preprocess.shape)}"}


def _parity_lines(parity: Parity) -> dict[str, str]:
    tolerance = parity.tolerance

    def line(value: float | None, bound: float | None, unit: str = "", *, none: str = "no error at all") -> str:
        shown = none if value is None else f"{value:.3g}{unit}"
        return shown if bound is None else f"{shown} (bound {bound:g}{unit})"

    return {
        "checked on": f"{parity.provider}, {parity.samples} samples, batches {', '.join(map(str, parity.batches))}",
        "largest absolute error": line(parity.max_abs, tolerance.max_abs),
        "largest relative error": line(parity.max_rel, tolerance.max_rel),
        "SQNR": line(parity.sqnr_db, tolerance.min_sqnr_db, " dB"),
        "decisions kept": line(parity.agreement, tolerance.min_agreement),
    }


def _accuracy_text(accuracy: Accuracy) -> str:
    return (
        f"{accuracy.metric} {accuracy.value:.2%} against {accuracy.reference:.2%} on {accuracy.samples} samples, "
        f"{accuracy.drop_points:+.2f} points lost (95 % interval {accuracy.drop_low:+.2f} to {accuracy.drop_high:+.2f})"
    )


def _worth_lines(worth: Worth) -> dict[str, str]:
    said = {
        "both": "yes: faster and smaller",
        "faster": "yes: faster, and no smaller",
        "smaller": "smaller, and no faster",
        "neither": "NO: neither faster nor smaller",
        "unsure": "no smaller; the machine was too unsteady to say whether it is faster",
    }
    return {
        f"than {worth.parent}": said[worth.verdict],
        "speed": f"{worth.speed:.2f} × (95 % interval {worth.speed_low:.2f} to {worth.speed_high:.2f}) at batch "
        f"{worth.batch}, on the machine that exported it",
        "size": f"1/{worth.size:.2f}",
        **({"why no faster": worth.reason} if worth.reason else {}),
    }


def _repair_lines(repair: Repair) -> dict[str, str]:
    def line(layer: FloatLayer) -> str:
        alone = "no error" if layer.alone_db is None else f"{layer.alone_db:.1f} dB"
        return f"{layer.operator}, {layer.weights:,} weights; alone in int8 {alone}, {layer.share:.1%} of the error"

    return {
        "kept": f"{len(repair.layers)} of {repair.of} layers, {repair.float_share:.1%} of their weights",
        "because": repair.because,
        "tries": f"{repair.tries} on the same evaluation samples",
        **{f"{place}. {layer.name}": line(layer) for place, layer in enumerate(repair.layers, start=1)},
    }


def _measurement_text(measurement: Measurement) -> str:
    median = measurement.latency.p50_ns
    latency = f"median {median.value / 1e6:.3f} ms" if median else "too few samples for a median"
    verdict = "steady" if measurement.verdict.steady else "; ".join(measurement.verdict.reasons)
    return f"{latency}, {measurement.throughput.value:.1f} items/s, {measurement.boundary}; {verdict}"


def _calibration_text(calibration: Calibration | None) -> str:
    if calibration is None:
        return "none"
    text = f"timing adds {calibration.timing.added_ns.value:.0f} ns to a call"
    if calibration.network is not None and calibration.network.floor_ns is not None:
        text += f", client and loopback take {calibration.network.floor_ns.value / 1e6:.3f} ms of a request"
    return f"{text} (measured {_when(calibration.created)})"


def labels_text(labels: tuple[str, ...]) -> str:
    shown = ", ".join(labels[:10]) or "none"
    return f"{shown}, … ({len(labels)})" if len(labels) > 10 else shown


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in values.items()) or "none"


def _value(value: JsonValue) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _when(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
