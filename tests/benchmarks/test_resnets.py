"""Every variant of two networks on real images: accuracy with its interval, size, and latency in turns.

A ResNet-20 on CIFAR-10 (`DLOPS_CIFAR10` names a folder or archive of it, else it is downloaded) and a ResNet-18 on
photos (`DLOPS_PHOTOS`). Training takes most of an hour on two cores: runs are kept in runs/experiments/, and what is
there is taken, or gone on with, the next time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dlops.artifact import Artifact
from dlops.bench import cells
from dlops.bench.run import measure, save_report
from dlops.checkpoint import Checkpoint, load_checkpoint
from dlops.environment import describe_environment
from dlops.export.pipeline import export_each
from dlops.export.prune_checkpoint import prune_checkpoint
from dlops.report import Measurement, Report, read_report
from dlops.train.launch import configure, train_recipe

RUNS = Path(__file__).resolve().parents[2] / "runs" / "experiments"
THREADS, BATCHES = 2, (1, 32)
MAX_DROP, MAX_DROP_PRUNED = 1.0, 1.5
WHOLE = (
    "torchscript-fp32", "torchexport-fp32", "aotinductor-fp32", "onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int8dyn",
    "onnx-int8wo", "onnx-fp8", "openvino-fp32", "openvino-fp16", "openvino-int8", "executorch-fp32", "executorch-int8",
)  # fmt: skip
# Without instructions for it, bfloat16 takes ten times as long as fp32.
BFLOAT16 = ("torchscript-bf16", "torchexport-bf16", "openvino-bf16")
SPARSE = ("onnx-fp32-sparse80", "onnx-fp32-sparse24", "onnx-int8-sparse80", "onnx-int8-sparse24")
PRUNED = ("onnx-fp32-pruned50", "onnx-int8-pruned50", "openvino-int8-pruned50")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """settings: of the recipe cnn, for the network. tuning: for fine-tuning what is left after pruning. restarts, and
    all of tuning but the first: of trainings that begin with the weights of the one before, at a high rate again
    (Loshchilov and Hutter 2017)."""

    name: str
    title: str
    data: str
    preset: str | None
    settings: Sequence[str]
    restarts: Sequence[Sequence[str]] = ()
    tuning: Sequence[Sequence[str]]


_SGD = (
    "batch_size=128", "optimizer=sgd", "weight_decay=0.0005", "warmup_epochs=1", "label_smoothing=0", "crop=0.125",
    "precision=bf16",
)  # fmt: skip
RESNET20 = Case(
    name="resnet20", title="Every variant of a ResNet-20 on CIFAR-10 images",
    data=os.environ.get("DLOPS_CIFAR10", "cifar10"), preset="resnet20-cifar10",
    settings=("precision=bf16",), restarts=((*_SGD, "epochs=60", "lr=0.1"),),
    tuning=((*_SGD, "epochs=20", "lr=0.1"), (*_SGD, "epochs=30", "lr=0.1")),
)  # fmt: skip
RESNET18 = Case(
    name="resnet18", title="Every variant of a ResNet-18 at 224×224 on photos",
    data=os.environ.get("DLOPS_PHOTOS", ""), preset=None,
    settings=("network=resnet18", "image_size=224", "precision=bf16"), tuning=(("image_size=224", "epochs=8"),),
)  # fmt: skip


@pytest.mark.timeout(4 * 3600)
def test_a_resnet_20_on_cifar_10(write_page: Callable[..., Path]) -> None:
    rows = _show(RESNET20, write_page)
    dense = rows["onnx-fp32"].artifact.accuracy
    assert dense is not None
    assert dense.reference >= 0.88
    for slug in PRUNED:
        accuracy = rows[slug].artifact.accuracy
        assert accuracy is not None
        assert accuracy.drop_points <= MAX_DROP_PRUNED


@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(not RESNET18.data, reason="DLOPS_PHOTOS names no folder or archive of photos in class folders")
def test_a_resnet_18_on_photos(write_page: Callable[..., Path]) -> None:
    rows = _show(RESNET18, write_page)
    fp32, int8, half = (rows[slug] for slug in ("onnx-fp32", "onnx-int8", "onnx-int8-pruned50"))
    assert _times(fp32, int8, batch=1) >= 2.5
    assert _times(fp32, int8, batch=32) >= 2
    assert _times(fp32, half, batch=1) >= 4
    assert _times(rows["eager"], half, batch=1) >= 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A line of the table. rows, medians_ns: by batch. tuned: whether what was pruned was fine-tuned by its recipe."""

    slug: str
    rows: Mapping[int, Measurement]
    medians_ns: Mapping[int, float]
    artifact: Artifact | None = None
    tuned: bool = False


def _times(base: Shown, other: Shown, *, batch: int) -> float:
    """How many times faster, by the medians of one run."""
    return base.medians_ns[batch] / other.medians_ns[batch]


def _show(case: Case, write_page: Callable[..., Path]) -> Mapping[str, Shown]:
    """Train, export, measure and write the page; by slug, and "eager"."""
    folder = RUNS / case.name
    checkpoint = _trained(case, case.settings, folder / "dense")
    for number, settings in enumerate(case.restarts, start=1):
        checkpoint = _trained(case, [f"init={checkpoint.directory}", *settings], folder / f"restart{number}")
    bf16 = BFLOAT16 if "avx512_bf16" in describe_environment().instruction_sets else ()
    made, refused = _exported(checkpoint, (*WHOLE, *bf16, *SPARSE), folder / "artifacts", max_drop=MAX_DROP)
    pruned, lost = _exported(checkpoint, PRUNED, folder / "artifacts", max_drop=MAX_DROP_PRUNED)
    tuned: dict[str, Artifact] = {}
    if lost:
        again = _pruned(checkpoint, folder / "half")
        for number, settings in enumerate(case.tuning):
            again = _trained(case, [f"init={again.directory}", *settings], folder / f"tuned{number or ''}")
        tuned, refused_again = _exported(again, list(lost), folder / "tuned-artifacts", max_drop=MAX_DROP_PRUNED)
        refused |= refused_again
    artifacts = made | pruned | tuned
    report = _measured(case, list(artifacts.values()), checkpoint, folder / "report")
    samples = report.raw_samples()
    found: dict[str, dict[int, Measurement]] = {}
    for row in report.measurements:
        found.setdefault(row.target, {})[row.load.batch] = row

    def line(slug: str, target: str, artifact: Artifact | None = None) -> Shown:
        rows = found[target]
        medians = {batch: float(np.median(samples[row.samples])) for batch, row in rows.items()}
        return Shown(slug=slug, rows=rows, medians_ns=medians, artifact=artifact, tuned=slug in tuned)

    shown = {"eager": line("eager", "eager")}
    shown |= {slug: line(slug, artifact.title, artifact) for slug, artifact in artifacts.items()}
    _write(case, checkpoint, shown, refused=refused, lost=lost, write_page=write_page)
    return shown


def _measured(case: Case, artifacts: Sequence[Artifact], checkpoint: Checkpoint, folder: Path) -> Report:
    """All in turns within one run, or the report of such a run that is there."""
    if (folder / Report.file_name).exists():
        report = read_report(folder)
        if {row.target for row in report.measurements} == {"eager", *(one.title for one in artifacts)}:
            return report
    measured = measure(
        artifacts, checkpoint=checkpoint, batch=BATCHES, threads=THREADS, max_duration_s=15.0, title=case.title
    )
    return save_report(measured, folder)


def _trained(case: Case, settings: Sequence[str], directory: Path) -> Checkpoint:
    if (directory / "checkpoint.json").exists():
        return load_checkpoint(directory)
    if directory.exists():
        return train_recipe("cnn", run_dir=directory, resume=True)
    tuning = any(setting.startswith("init=") for setting in settings)
    config = configure(
        "cnn", preset=None if tuning else case.preset, overrides=[f"data={case.data}", *settings]
    )  # fmt: skip
    return train_recipe("cnn", config, run_dir=directory)


def _pruned(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    if (directory / "checkpoint.json").exists():
        return load_checkpoint(directory)
    return prune_checkpoint(checkpoint, directory, sparsity="pruned50")


def _exported(
    checkpoint: Checkpoint, slugs: Sequence[str], out: Path, *, max_drop: float
) -> tuple[dict[str, Artifact], dict[str, str]]:
    """By slug: the artifacts, and why the others were refused."""
    made, refused = {}, {}
    for variant, result in export_each(checkpoint, variants=slugs, out=out, max_drop=max_drop):
        if isinstance(result, Artifact):
            made[variant.slug] = result
        else:
            refused[variant.slug] = result.message
    return made, refused


def _write(
    case: Case, checkpoint: Checkpoint, shown: Mapping[str, Shown], *, refused: Mapping[str, str],
    lost: Mapping[str, str], write_page: Callable[..., Path],
) -> None:  # fmt: skip
    fp32 = shown["onnx-fp32"]
    ratios = [
        f"{slug} {' and '.join(f'{_times(fp32, shown[slug], batch=batch):.1f} ×' for batch in BATCHES)}"
        for slug in ("onnx-int8", "onnx-fp32-pruned50", "onnx-int8-pruned50")
        if slug in shown
    ]
    samples = fp32.artifact.accuracy.samples if fp32.artifact is not None and fp32.artifact.accuracy else 0
    metrics = checkpoint.metrics
    says = [
        f"Trained by `dlops train cnn` on {metrics.get('train_samples')} images from random weights"
        + "".join(
            f", then again from those at {_setting(one, 'lr')} ({_setting(one, 'epochs')})" for one in case.restarts
        )
        + "; "
        f"exported, each checked at its gates with a budget of {MAX_DROP:g} point ({MAX_DROP_PRUNED:g} for half of the "
        f"multiply-accumulates removed), and measured in turns in one run: {THREADS} threads, from arrays to arrays, "
        f"accuracy on {samples} test images that nothing was trained or calibrated on; the gates judge by them too. "
        "*lost* are percentage points against the checkpoint with their 95 % interval, *flips* decisions that differ. "
        "`*` marks rows that were not steady, – a median that moved too much to have an interval.",
        f"Against onnx-fp32 at batch {BATCHES[0]} and {BATCHES[1]}: {'; '.join(ratios)}.",
    ]
    if lost:
        says.append(
            "What export's own recovery on the calibration samples left too far below was fine-tuned by its recipe "
            f"(`dlops prune`, `dlops train cnn --init`, "
            f"{' and then '.join(_setting(one, 'epochs') for one in case.tuning)}): "
            + "; ".join(f"{slug}: {_why(why)}" for slug, why in lost.items())
            + "."
        )
    if refused:
        says.append("Refused: " + "; ".join(f"{slug}: {why}" for slug, why in refused.items()) + ".")
    write_page(
        case.name,
        title=case.title,
        says="\n\n".join(says),
        header=[
            "variant", "size", "accuracy %", "lost", "flips",
            *(part for batch in BATCHES for part in (f"p50 ms, batch {batch}", "speed")),
        ],
        rows=[_line(one) for one in shown.values()],
    )  # fmt: skip


def _setting(settings: Sequence[str], name: str) -> str:
    """`lr 0.1` of `lr=0.1`."""
    return next(one for one in settings if one.startswith(f"{name}=")).replace("=", " ")


def _why(message: str) -> str:
    """Of a refusal: how much was lost."""
    found = re.search(r"[\d.]+ points lost \([^)]*\)", message)
    return found[0] if found else message


def _line(one: Shown) -> list[str]:
    accuracy = None if one.artifact is None else one.artifact.accuracy
    first = one.rows[BATCHES[0]]
    times: list[str] = []
    for batch in BATCHES:
        row = one.rows[batch]
        times += [
            cells.milliseconds(row.latency.p50_ns) + ("" if row.verdict.steady else " *"),
            cells.ratio(row.speedup),
        ]
    lost = (
        "–" if accuracy is None else f"{accuracy.drop_points:.2f} ({accuracy.drop_low:.2f} to {accuracy.drop_high:.2f})"
    )
    return [
        one.slug + (", fine-tuned" if one.tuned else ""), cells.size(first.model_bytes), cells.percent(first.accuracy),
        lost, "–" if accuracy is None else str(accuracy.flips), *times,
    ]  # fmt: skip
