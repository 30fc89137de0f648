"""The whole pipeline on real data: train, export, verify, bench, serve, ask, and a table at the end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dlops import catalog, signals
from dlops.artifact import Artifact, Variant
from dlops.bench.pilot import length
from dlops.bench.results import Measured, choose_fastest, merge
from dlops.bench.run import MeasureInterrupted, measure
from dlops.bench.table import render_table
from dlops.checkpoint import Checkpoint
from dlops.console import out, say
from dlops.errors import DlopsError, GateError
from dlops.export.pipeline import export_each
from dlops.export.plan import check_max_drop
from dlops.export.quantize import spread
from dlops.export.verify import verify_artifact
from dlops.report import Report
from dlops.runtimes import SessionOptions, eager
from dlops.runtimes.session import Device
from dlops.samples import Samples
from dlops.serve.launch import ServerProcess, check_installed
from dlops.train.launch import configure, train_recipe
from dlops.workflows.ask import Answers, ask_artifact, ask_service, check_answers
from dlops.workflows.calibration import calibrated
from dlops.workflows.publish import save_or_rescue

VARIANTS = (
    "torchscript-fp32",
    "onnx-fp32",
    "onnx-fp16",
    "onnx-int8",
    "onnx-fp32-pruned50",
    "onnx-int8-pruned50",
)
# One call for latency, one of many items for throughput.
BATCHES = (1, 32)
# One client alone, and enough at once to keep a worker busy.
CONCURRENCY = (1, 8)
# Sent to the service one after another: enough to see that it is the same model, over in a second or two.
ASKED = 100
# Data whose preset makes this quicker than the recipe's own choice of epochs.
_QUICK_PRESETS = ("digits",)
# A demonstration is over in three minutes: of a large model, recovery is cut off and says so.
_RECOVERY_BUDGET_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """refused: slug to reason. report: what was written, with `chosen` naming the variant that was served."""

    checkpoint: Checkpoint
    artifacts: tuple[Artifact, ...]
    refused: dict[str, str]
    answers: Answers
    report: Report


@signals.heard_once()
def quickstart(
    *,
    data: str = "digits",
    recipe: str = "cnn",
    preset: str | None = None,
    overrides: Sequence[str] = (),
    variants: Sequence[str] = VARIANTS,
    max_drop: float = 1.0,
    duration_s: float = 2.0,
    device: Device = "auto",
    command: Sequence[str] = (),
) -> Outcome:
    """Run every stage in the working folder and print the table; the report lies in reports/<time>/.

    preset: of the recipe; for digits the one of that name. max_drop: points of the task's metric that a variant may
    lose. duration_s: of each timed row. A variant that a gate refuses is named and left out; GateError is raised only
    where none passes, and after the report where the service answers otherwise than the artifact that it serves. What
    cannot work in a later stage is refused before the first, as that stage would.
    """
    check_first(variants, max_drop=max_drop, device=device)
    length(duration_s)
    _headline(1, f"train the {recipe} recipe on {data}")
    if preset is None and data in _QUICK_PRESETS:
        preset = data
    config = configure(recipe, preset=preset, overrides=[f"data={data}", *overrides])
    checkpoint = train_recipe(recipe, config)

    _headline(2, f"export {len(variants)} variants, each checked against the checkpoint")
    artifacts, refused = _export(checkpoint, variants, max_drop=max_drop, device=device, command=command)

    _headline(3, "verify every artifact again from its files alone")
    for artifact in artifacts:
        verification = verify_artifact(artifact, options=SessionOptions(device=device), checkpoint=checkpoint)
        say(f"{artifact.slug}: verified on {verification.parity.provider}")

    _headline(4, "time them in process, in turns, against eager PyTorch")
    try:
        measured = measure(
            artifacts,
            checkpoint=checkpoint,
            batch=BATCHES,
            duration_s=duration_s,
            device=device,
            title=f"{checkpoint.name}: variants",
            command=command,
        )
    except MeasureInterrupted as interruption:
        _save_partial(interruption.measured)
        raise
    measured = choose_fastest(measured, max_drop=max_drop)
    chosen = _chosen(measured, artifacts)
    asked = samples_to_ask(checkpoint)

    _headline(5, f"serve {chosen.title} with BentoML, ask it about real samples, and load it")
    try:
        own = ask_artifact(chosen, asked, device=device)
        with ServerProcess(chosen, device=device, isolated=True) as server:
            say(f"serving on {server.url}")
            answers = ask_service(server.url, asked, labels=checkpoint.spec.labels)
            say(f"POST /predict with {answers.asked} held-out samples: {answers.correct} right")
            network = measure(
                [server.url], payload=chosen, concurrency=CONCURRENCY, duration_s=duration_s, command=command
            )
    except BaseException as error:
        # Whatever it is, the minutes of timing before it are not lost.
        rows = [error.measured] if isinstance(error, MeasureInterrupted) else []
        _save_partial(merge(measured, *rows))
        raise
    say("the server has stopped")

    measured = merge(measured, network)
    try:
        measured = calibrated(measured)
    except KeyboardInterrupt:
        _save_partial(measured)
        raise
    report = save_or_rescue(measured, None)
    _conclude(report, chosen, checkpoint, answers, refused)
    check_answers(answers, own, title=chosen.title)
    return Outcome(checkpoint=checkpoint, artifacts=tuple(artifacts), refused=refused, answers=answers, report=report)


def check_first(variants: Sequence[str], *, max_drop: float, device: Device) -> None:
    """Raise before minutes of training what a later stage would: for a bad option, a package or GPU that is missing."""
    check_max_drop(max_drop)
    formats = dict.fromkeys(Variant.parse(slug).format for slug in variants)
    for form in formats:
        catalog.resolve(catalog.FORMATS, "format", form)
        catalog.resolve(catalog.RUNTIMES, "runtime", form)
    # Eager PyTorch is timed beside whatever is exported.
    eager.choose_device(SessionOptions(device=device))
    if "onnx" in formats:
        from dlops.runtimes import onnxruntime

        onnxruntime.choose_device(SessionOptions(device=device))
    check_installed()


def _export(
    checkpoint: Checkpoint, variants: Sequence[str], *, max_drop: float, device: Device, command: Sequence[str]
) -> tuple[list[Artifact], dict[str, str]]:
    made: list[Artifact] = []
    refused: dict[str, str] = {}
    for variant, result in export_each(
        checkpoint, variants=variants, max_drop=max_drop, device=device, recovery_budget_s=_RECOVERY_BUDGET_S,
        command=command,
    ):  # fmt: skip
        if isinstance(result, DlopsError):
            refused[variant.slug] = result.message
        else:
            made.append(result)
    if not made:
        reasons = "; ".join(refused.values())
        raise GateError(f"every variant was refused: {reasons}", hint="train longer, or allow more with --max-drop")
    return made, refused


def _chosen(measured: Measured, artifacts: Sequence[Artifact]) -> Artifact:
    report = measured.report
    if report.chosen is None:
        raise GateError(f"no variant to serve: {report.chosen_because}", hint="allow more with --max-drop")
    say(f"chosen: {report.chosen} ({report.chosen_because})")
    return next(artifact for artifact in artifacts if artifact.title == report.chosen)


def samples_to_ask(checkpoint: Checkpoint) -> Samples:
    """As many as the service is asked about, evenly over the evaluation samples, which folders give class by class."""
    evaluation = checkpoint.samples("evaluation")
    assert evaluation is not None
    return evaluation.take([int(place) for place in spread({"place": np.arange(len(evaluation))}, ASKED)["place"]])


def _conclude(
    report: Report, chosen: Artifact, checkpoint: Checkpoint, answers: Answers, refused: dict[str, str]
) -> None:
    out.print()
    out.print(render_table(report))
    out.print()
    for slug, reason in refused.items():
        out.print(f"refused: {slug}: {reason}", markup=False, soft_wrap=True)
    activate = [] if shutil.which("dlops") else [f"  . {Path(sys.prefix, 'bin', 'activate')}"]
    lines = [
        f"served {chosen.title}: {answers.correct} of {answers.asked} held-out samples answered right",
        f"report: {report.directory / 'report.html'}",
        "",
        "What to type next:",
        *activate,
        f"  dlops serve {chosen.directory}",
        f"  dlops inspect {chosen.directory}",
        "  dlops quickstart --data FOLDER        your own images, one folder a class",
        f"  dlops export {checkpoint.directory} --format onnx --precision int8",
        f"  dlops bench {chosen.directory.parent}/*",
    ]
    out.print("\n".join(lines), markup=False, soft_wrap=True)


def _save_partial(measured: Measured) -> None:
    report = measured.report.model_copy(update={"partial": True})
    kept = calibrated(replace(measured, report=report), may_measure=False)
    directory = save_or_rescue(kept, None).directory
    say(f"what was measured so far is in {directory}, marked partial")


def _headline(number: int, text: str) -> None:
    say(f"\n[{number}/5] {text}")
