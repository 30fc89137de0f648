"""What a checkpoint, an artifact or a report says of itself, as named lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import JsonValue

from dlops.artifact import Accuracy, Artifact, FloatLayer, OwnError, Parity, Repair, Worth
from dlops.checkpoint import Checkpoint
from dlops.manifest import Manifest
from dlops.preprocess import Preprocess
from dlops.report import Calibration, Measurement, Report
from dlops.signature import DimRange, Signature


def title_of(manifest: Manifest) -> str:
    match manifest:
        case Artifact() | Report():
            return manifest.title
        case Checkpoint():
            return manifest.name
        case _:
            raise TypeError(f"{type(manifest).__name__} is no checkpoint, artifact or report")


def summary_of(manifest: Manifest) -> str:
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
            raise TypeError(f"{type(manifest).__name__} is no checkpoint, artifact or report")


def facts_of(manifest: Manifest) -> dict[str, dict[str, str]]:
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
            raise TypeError(f"{type(manifest).__name__} is no checkpoint, artifact or report")


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
        return shown if bound is None else f"{shown} (bound {bound:.3g}{unit})"

    return {
        "checked on": f"{parity.provider}, {parity.samples} samples, batches {', '.join(map(str, parity.batches))}",
        "largest absolute error": line(parity.max_abs, tolerance.max_abs),
        "largest relative error": line(parity.max_rel, tolerance.max_rel),
        "SQNR": line(parity.sqnr_db, tolerance.min_sqnr_db, " dB"),
        "decisions kept": line(parity.agreement, tolerance.min_agreement),
        **({"error of eager fp32 itself": _own_error_text(parity.own_error)} if parity.own_error else {}),
    }


def _own_error_text(own: OwnError) -> str:
    return f"{own.max_abs:.3g} absolute, {own.max_rel:.3g} relative, against float64; the bounds follow from it"


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
    return f"{text} (measured {moment_text(calibration.created)})"


def labels_text(labels: tuple[str, ...]) -> str:
    shown = ", ".join(labels[:10]) or "none"
    return f"{shown}, … ({len(labels)})" if len(labels) > 10 else shown


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in values.items()) or "none"


def _value(value: JsonValue) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def moment_text(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


def size_text(count: int) -> str:
    """A number of bytes in the unit that a person would use."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
